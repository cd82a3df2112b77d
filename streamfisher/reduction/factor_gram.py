"""The Gram of a parameter whose gradients are held as factors, `g_i = sum_t L_it^T R_it`, by the cheaper of three ways.

    slabs      rows are formed a slab of columns at a time and multiplied as rows are:
               2 M m n + N^2 m n operations, M positions in all, L (T, m), R (T, n)
    pairwise   <g_i, g_j> = sum_{t,s} (L_it . L_js)(R_it . R_js), rows never exist:  M^2 (m + n)
    by token   where L is one-hot (an embedding), only positions of the same token meet:
               at most M N n, after adding up each sample's positions of that token

Pairwise and by token are done in float64 whatever `dtype_gram` is: their inner products are short, so float32's
rounding would not average out. Which way is taken, and the panels of its sums, follow from sizes alone, so neither the
memory budget nor the number of workers changes a bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from streamfisher.byte_sizes import format_bytes
from streamfisher.errors import CapacityError
from streamfisher.reduction.products import ArrayModule, PanelSum
from streamfisher.reduction.read_ahead import read_ahead
from streamfisher.reduction.slabs import sums_bytes
from streamfisher.store.factors import FactorSegment
from streamfisher.store.layout import PANEL

Kernel = Literal["slabs", "pairwise", "tokens"]

#: Columns of R that are in memory at a time, for all positions.
RIGHT_COLUMNS = 1024
#: A slab of formed rows is at most so many bytes of float32, and at most so many panels wide.
_SLAB_BYTES = 64 << 20
_SLAB_PANELS = 16
#: Positions of one tile of the pairwise form.
_TILE = 1024
#: float64 products against float32 ones.
FLOAT64_COST = 2.0


def choose_kernel(segments: Sequence[FactorSegment], shape: tuple[int, int], n_samples: int, *, single: bool) -> Kernel:
    """Return the way that takes the fewest operations.

    Args:
        segments: all uses of the parameter.
        shape: (m, n), of a gradient.
        n_samples: N.
        single: slabs would be multiplied in float32.
    """
    by_token = bool(segments) and all(segment.left.dtype is None for segment in segments)
    positions = sum(sum(segment.lengths) for segment in segments)
    return cheapest_kernel(positions, shape, n_samples, by_token=by_token, single=single)


def cheapest_kernel(
    positions: float, shape: tuple[int, int], n_samples: int, *, by_token: bool, single: bool
) -> Kernel:
    """Return the way that takes the fewest operations, see `choose_kernel`: what plans and runs both ask.

    Args:
        positions: of all samples and uses.
        shape: (m, n), of a gradient.
        n_samples: N.
        by_token: every left factor is one-hot.
        single: slabs would be multiplied in float32.
    """
    if by_token:
        return "tokens"
    slabs, pairwise = kernel_operations(positions, shape, n_samples)
    return "pairwise" if pairwise * (FLOAT64_COST if single else 1.0) < slabs else "slabs"


def kernel_operations(positions: float, shape: tuple[int, int], n_samples: int) -> tuple[float, float]:
    """Return the floating-point operations of the slab form and of the pairwise form."""
    m, n = shape
    return (2.0 * positions + n_samples**2) * m * n, positions**2 * (m + n)


def slab_heights(shape: tuple[int, int], n_samples: int) -> tuple[int, int]:
    """Return (rows of W, columns of W) of one slab: fixed by the sizes."""
    width = min(shape[1], RIGHT_COLUMNS)
    columns = min(max(_SLAB_BYTES // (4 * n_samples), PANEL), _SLAB_PANELS * PANEL)
    return max(1, min(columns // width, shape[0])), width


def slab_memory(positions: int, shape: tuple[int, int], n_samples: int, itemsize: int) -> tuple[int, int]:
    """Return the least bytes that the slab form needs, and those that let it read every factor once."""
    height, width = slab_heights(shape, n_samples)
    fixed = positions * width * itemsize + n_samples * height * width * itemsize + sums_bytes(n_samples)
    return fixed + positions * height * itemsize, fixed + positions * shape[0] * itemsize


def least_kernel_bytes(
    kernel: Kernel, positions: int, longest: int, shape: tuple[int, int], n_samples: int, itemsize: int
) -> int:
    """Return the least bytes in which one worker makes the Gram of a parameter's factors.

    Args:
        kernel: how.
        positions: of all samples and uses.
        longest: positions of the largest batch.
        shape: (m, n), of a gradient.
        n_samples: N.
        itemsize: bytes of a number of a formed row.
    """
    if kernel == "slabs":
        return slab_memory(positions, shape, n_samples, itemsize)[0]
    if kernel == "tokens":
        return sums_bytes(n_samples) + 64 * 32 * positions  # the sums of 64 columns
    return sums_bytes(n_samples) + 24 * longest * sum(shape)  # the factors of two batches


def add_slabs(
    segments: Sequence[FactorSegment],
    shape: tuple[int, int],
    n_samples: int,
    total: PanelSum,
    *,
    dtype: np.dtype,
    budget: int,
) -> None:
    """Form all rows a slab at a time and add their products.

    Args:
        segments: all uses of the parameter.
        shape: (m, n), of a gradient.
        n_samples: N.
        total: what the panels are added to.
        dtype: of rows and products.
        budget: bytes that may be in memory at a time.

    Raises:
        CapacityError: one slab and the columns it is formed from are more than the budget.
    """
    m, n = shape
    positions = sum(sum(segment.lengths) for segment in segments)
    height, width = slab_heights(shape, n_samples)
    least, whole = slab_memory(positions, shape, n_samples, dtype.itemsize)
    if least > budget:
        raise CapacityError(
            f"a slab of {n_samples} rows formed from {positions:,} positions needs {format_bytes(least)} and the "
            f"budget of a worker is {format_bytes(budget)}. Lower n_workers, or raise memory_budget."
        )
    spare = (budget - least) // max(positions * height * dtype.itemsize, 1)
    tall = m if whole <= budget else height * (1 + int(spare))
    arrays = total.arrays
    slab = arrays.empty((n_samples, height * width), dtype)
    left: _Sides | None = None
    parts = [(start, min(start + width, n)) for start in range(0, n, width)]
    # The next columns are read while these are multiplied, where there is room for both.
    ahead = whole + positions * width * dtype.itemsize <= budget
    rights = read_ahead(lambda part: _Sides(segments, "right", *part, dtype, arrays), parts, ahead=ahead)
    for (start, stop), right in zip(parts, rights, strict=True):
        columns = stop - start
        for top in range(0, m, tall):
            if left is None or tall < m:
                left = None  # before the next one is read, so that two are never there
                left = _Sides(segments, "left", top, min(top + tall, m), dtype, arrays)
            for first in range(top, min(top + tall, m), height):
                rows = min(height, m - first, top + tall - first)
                block = slab[:, : rows * columns]
                _form(block.reshape(n_samples, rows, columns), left, right, first, arrays)
                for panel in range(0, rows * columns, PANEL):
                    total.add(block[:, panel : panel + PANEL])


class _Sides:
    """Some columns of one factor, of all positions, in memory: one array for each segment."""

    def __init__(
        self, segments: Sequence[FactorSegment], side: str, start: int, stop: int, dtype: np.dtype, arrays: ArrayModule
    ):
        self.start, self.segments = start, segments
        self.values = []
        for segment in segments:
            of = getattr(segment, side)
            values = of.read() if of.dtype is None else of.read(start, stop).astype(dtype, copy=False)
            self.values.append(values if of.dtype is None else arrays.take(values))


def _form(block: Any, left: _Sides, right: _Sides, first: int, arrays: ArrayModule) -> None:
    """Fill (N, rows, columns) with `sum_t L_it[first : first + rows]^T R_it`; `right` holds just these columns."""
    written = np.zeros(block.shape[0], dtype=bool)
    rows = block.shape[1]
    for segment, L, R in zip(left.segments, left.values, right.values, strict=True):
        offsets = segment.offsets
        if segment.left.dtype is None:
            here = slice(segment.start, segment.start + len(segment.lengths))
            fresh = segment.start + np.flatnonzero(~written[here])
            block[fresh] = 0
            written[here] = True
            inside = np.flatnonzero((L >= first) & (L < first + rows))
            samples = segment.start + np.searchsorted(offsets, inside, side="right") - 1
            arrays.scatter(block, samples, L[inside] - first, R[inside])
            continue
        L = L[:, first - left.start : first - left.start + rows]
        for start, stop, length in _runs(segment.lengths):
            where, here = slice(offsets[start], offsets[stop]), slice(segment.start + start, segment.start + stop)
            if length == 0:
                continue
            a = L[where].reshape(stop - start, length, rows).swapaxes(1, 2)
            b = R[where].reshape(stop - start, length, -1)
            if not written[here].any():
                arrays.multiply(a, b, block[here])
            else:
                block[segment.start + start + np.flatnonzero(~written[here])] = 0
                block[here] += a @ b
            written[here] = True
    block[np.flatnonzero(~written)] = 0


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first, one past the last, length) of consecutive samples of the same length."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or lengths[stop] != lengths[start]:
            yield start, stop, lengths[start]
            start = stop


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


def token_gram(segments: Sequence[FactorSegment], n_samples: int, *, known: int = 0, budget: int) -> np.ndarray:
    """Return the rows from `known` on of the Gram of an embedding: (N - known, N) float64.

    Token by token: the gradients of a sample's positions of that token are added up, and the sums multiplied.

    Args:
        segments: all uses of the parameter.
        n_samples: N.
        known: so many of the first rows are left out.
        budget: bytes that may be in memory; what does not fit at once is taken some columns at a time.
    """
    gram = np.zeros((n_samples, n_samples))
    ids = np.concatenate([segment.left.read() for segment in segments])
    samples = np.concatenate([np.repeat(np.arange(len(s.lengths)) + s.start, s.lengths) for s in segments])
    if len(ids) == 0:
        return gram[known:]
    order = np.lexsort((samples, ids))
    ids, samples = ids[order], samples[order]
    starts = np.flatnonzero(np.append(True, (np.diff(ids) != 0) | (np.diff(samples) != 0)))
    ids, samples = ids[starts], samples[starts]
    bounds = [*np.flatnonzero(np.append(True, np.diff(ids) != 0)), len(ids)]
    width = segments[0].right.width
    columns = min(width, max(64, budget // (32 * len(order)) // 64 * 64))
    for left in range(0, width, columns):
        values = np.concatenate([segment.right.read(left, min(left + columns, width)) for segment in segments])
        sums = np.add.reduceat(values[order].astype(np.float64), starts, axis=0)
        del values
        for start, stop in itertools.pairwise(bounds):
            block, where = sums[start:stop], samples[start:stop]
            gram[np.ix_(where, where)] += block @ block.T
    return gram[known:]


def factor_gram(
    segments: Sequence[FactorSegment],
    shape: tuple[int, int],
    n_samples: int,
    *,
    known: int,
    total: PanelSum,
    dtype: np.dtype,
    budget: int,
) -> np.ndarray:
    """Return the rows from `known` on of the Gram of a parameter's gradients: (N - known, N) float64.

    Args:
        segments: all uses of the parameter.
        shape: (m, n), of a gradient.
        n_samples: N.
        known: so many of the first rows are left out.
        total: an empty sum of panels, for slabs.
        dtype: of rows and products of slabs.
        budget: bytes that may be in memory at a time.

    Raises:
        CapacityError: not even one slab fits.
        CorruptRunError: a factor is missing or fails its checksum.
    """
    kernel = choose_kernel(segments, shape, n_samples, single=dtype == np.float32)
    if kernel == "tokens":
        return token_gram(segments, n_samples, known=known, budget=budget)
    if kernel == "pairwise":
        return pairwise_gram(segments, n_samples, known=known, budget=budget)
    add_slabs(segments, shape, n_samples, total, dtype=dtype, budget=budget)
    return total.result()
