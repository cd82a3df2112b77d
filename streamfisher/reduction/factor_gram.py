"""The Gram of a parameter whose gradients are held as factors, without rows: see `kernels.py`.

Pairwise and by token are done in float64 whatever `dtype_gram` is: their inner products are short, so float32's
rounding would not average out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from streamfisher.reduction.factor_slabs import slab_folds
from streamfisher.reduction.kernels import FactorUse, choose_kernel
from streamfisher.reduction.products import PanelSum
from streamfisher.store.factors import FactorSegment

#: Positions of one tile of the pairwise form.
_TILE = 1024


def pairwise_gram(segments: Sequence[FactorSegment], n_samples: int, *, known: int = 0, budget: int) -> np.ndarray:
    """Return the rows from `known` on of the Gram by the pairwise form: (N - known, N) float64.

    A tile holds the positions of whole samples, at least one; only tiles on and below the diagonal are formed.

    Args:
        segments: all uses of the parameter.
        n_samples: N.
        known: so many of the first rows are left out.
        budget: bytes of factors that may be in memory; beyond it they are read again for each row of tiles.
    """
    gram = np.zeros((n_samples, n_samples))
    tiles = [tile for segment in segments for tile in _tiles(segment)]
    tiles.sort(key=lambda tile: (tile.first, tile.last))
    held = _Held(budget)
    for row, tile in enumerate(tiles):
        if tile.last <= known:
            continue
        L, R = tile.read(held)
        for other in tiles[: row + 1]:
            L2, R2 = (L, R) if other is tile else other.read(held)
            products = _inner(L, L2)
            products *= R @ R2.T
            sums = np.add.reduceat(np.add.reduceat(products, tile.starts, axis=0), other.starts, axis=1)
            gram[np.ix_(tile.samples, other.samples)] += sums
            if other is not tile:
                gram[np.ix_(other.samples, tile.samples)] += sums.T
    return ((gram + gram.T) / 2)[known:]


class _Held:
    """Segments that were read, as many as fit."""

    def __init__(self, budget: int):
        self.budget, self.size = budget, 0
        self.values: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(self, segment: FactorSegment) -> tuple[np.ndarray, np.ndarray]:
        found = self.values.get(id(segment))
        if found is None:
            found = segment.left.read(), segment.right.read()
            size = found[0].nbytes + found[1].nbytes
            if self.size + size <= self.budget:
                self.values[id(segment)], self.size = found, self.size + size
        return found


class _Tile:
    """The positions of some consecutive samples in one segment."""

    def __init__(self, segment: FactorSegment, first: int, last: int):
        self.segment = segment
        offsets = segment.offsets
        self.where = slice(int(offsets[first]), int(offsets[last]))
        present = [place for place in range(first, last) if segment.lengths[place]]
        self.samples = np.array([segment.start + place for place in present], dtype=np.int64)
        self.starts = np.array([offsets[place] - offsets[first] for place in present], dtype=np.int64)
        self.first, self.last = segment.start + first, segment.start + last

    def read(self, held: _Held) -> tuple[np.ndarray, np.ndarray]:
        """Return L (or ids) and R of the tile's positions, in float64."""
        left, right = (side[self.where] for side in held.read(self.segment))
        return (left if left.ndim == 1 else left.astype(np.float64)), right.astype(np.float64)


def _tiles(segment: FactorSegment) -> list[_Tile]:
    tiles, first, size = [], 0, 0
    for place, length in enumerate(segment.lengths):
        if size and size + length > _TILE:
            tiles.append(_Tile(segment, first, place))
            first, size = place, 0
        size += length
    if size:
        tiles.append(_Tile(segment, first, len(segment.lengths)))
    return tiles


def _inner(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return inner products of positions, either side of which may be ids of one-hot rows."""
    if one.ndim == 1 and other.ndim == 1:
        return (one[:, None] == other[None, :]).astype(np.float64)
    if one.ndim == 1:
        return np.ascontiguousarray(other[:, one].T)
    if other.ndim == 1:
        return np.ascontiguousarray(one[:, other])
    return one @ other.T


def token_folds(
    segments: Sequence[FactorSegment], use: FactorUse, parts: Sequence[tuple[int, int]], *, known: int = 0
) -> list[np.ndarray]:
    """Return the rows from `known` on of the Gram of each part of an embedding's columns: (N - known, N) float64.

    Token by token: the gradients of a sample's positions of that token are added up, and the sums multiplied.

    Args:
        segments: all uses of the parameter.
        use: of them.
        parts: some that follow one another, see `parts_of`.
        known: so many of the first rows are left out.
    """
    n_samples = use.n_samples
    ids = np.concatenate([segment.left.read() for segment in segments])
    samples = np.concatenate([np.repeat(np.arange(len(s.lengths)) + s.start, s.lengths) for s in segments])
    folds = [np.zeros((n_samples - known, n_samples)) for _ in parts] if len(ids) == 0 else []
    if folds:
        return folds
    order = np.lexsort((samples, ids))
    ids, samples = ids[order], samples[order]
    starts = np.flatnonzero(np.append(True, (np.diff(ids) != 0) | (np.diff(samples) != 0)))
    ids, samples = ids[starts], samples[starts]
    bounds = [*np.flatnonzero(np.append(True, np.diff(ids) != 0)), len(ids)]
    for left, right in parts:
        gram = np.zeros((n_samples, n_samples))
        values = np.concatenate([segment.right.read(left, right) for segment in segments])
        sums = _sums(values, order, starts)
        del values
        for start, stop in itertools.pairwise(bounds):
            block, where = sums[start:stop], samples[start:stop]
            gram[np.ix_(where, where)] += block @ block.T
        folds.append(gram[known:])
    return folds


def _sums(values: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sums of `values[order]` from each start to the next, float64; most are of one row, and only taken."""
    counts = np.diff(starts, append=len(order))
    sums = values[order[starts]].astype(np.float64)
    several = counts > 1
    if several.any():
        rows = values[order[np.repeat(several, counts)]].astype(np.float64)
        sums[several] = np.add.reduceat(rows, np.cumsum(counts[several]) - counts[several], axis=0)
    return sums


def factor_folds(
    segments: Sequence[FactorSegment],
    use: FactorUse,
    parts: Sequence[tuple[int, int]],
    *,
    known: int,
    new_sum: Callable[[], PanelSum],
    dtype: np.dtype,
    budget: int,
) -> list[np.ndarray]:
    """Return the rows from `known` on of the Gram of each part of a parameter's gradients: (N - known, N) float64.

    Args:
        segments: all uses of the parameter.
        use: of them.
        parts: some that follow one another, see `parts_of`.
        known: so many of the first rows are left out.
        new_sum: returns an empty sum of panels, for slabs.
        dtype: of rows and products of slabs.
        budget: bytes that may be in memory at a time.

    Raises:
        CapacityError: not even one slab fits.
        CorruptRunError: a factor is missing or fails its checksum.
    """
    kernel = choose_kernel(use, single=dtype == np.float32)
    if kernel == "tokens":
        return token_folds(segments, use, parts, known=known)
    if kernel == "pairwise":
        return [pairwise_gram(segments, use.n_samples, known=known, budget=budget)]
    return slab_folds(segments, use, parts, new_sum, dtype=dtype, budget=budget)
