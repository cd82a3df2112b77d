"""The Gram of a block as an operator that reads it tile by tile: for N whose `N x N` does not fit the memory.

Samples, weights and centering are congruences (`selection.py`), applied to each tile as it is read, so a tile is
exactly the part of the matrix that would be solved. Only tiles on and above the diagonal are read; the Grams of a
block's parameters are added tile by tile. Every product is one pass over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from streamfisher.errors import CorruptRunError
from streamfisher.solving.centering import CENTERING_ROUNDING
from streamfisher.solving.selection import Selection

#: Rows and columns of one tile of a Gram that is too large for memory; a multiple of the chunks of stored Grams.
TILE = 2048

#: Gram, rows, columns -> that part of it, float64.
ReadTile = Callable[[str, slice, slice], np.ndarray]


@dataclass(frozen=True)
class _Part:
    """The selected samples of one row of tiles."""

    stored: slice  # of the run's samples
    inside: np.ndarray  # which of those are selected, counted from `stored.start`
    places: slice  # where they are among the selected samples


class TiledGram:
    """The (n, n) matrix whose eigenvalues, over n, are those of a block's Fisher (or covariance); never held whole.

    Args:
        read: a part of a stored Gram.
        names: the Grams that are added up.
        n_stored: N, rows of the stored Grams.
        selection: which of them count, and how much.
        center: take the rows less their mean.
        mean_products: of each Gram whose rows are stored centered and shall not be, `<c_i, m>` and, last, `<m, m>`.
        tile: rows of a tile; the bits of a product depend on it.
    """

    def __init__(
        self,
        read: ReadTile,
        names: Sequence[str],
        n_stored: int,
        selection: Selection,
        *,
        center: bool,
        mean_products: Mapping[str, np.ndarray] | None = None,
        tile: int | None = None,
    ):
        self.read, self.names, self.n = read, list(names), len(selection)
        self.n_samples, self.samples = self.n, selection.samples
        self.parts = list(_parts(selection.samples, n_stored, tile or TILE))
        self.offsets = np.zeros(self.n)  # added to rows and to columns
        self.constant = 0.0
        self.mean_products = mean_products or {}
        for products in self.mean_products.values():
            self.offsets += products[:-1][selection.samples]
            self.constant += float(products[-1])
        weights = np.ones(self.n) if selection.weights is None else selection.weights
        self.scale: np.ndarray | None = None  # factors of rows and of columns
        self.dominance = 0.0  # n |mean|^2 over the trace of the covariance
        if center:
            p = weights / weights.sum()
            trace, largest, means = 0.0, 0.0, np.zeros(self.n)
            for rows, columns, K in self.tiles():
                _multiply(K, rows, columns, p, means)
                trace += float(np.trace(K)) if rows == columns else 0.0
                largest = max(largest, float(K.diagonal().max())) if rows == columns else largest
            self.offsets = self.offsets - means
            self.constant += float(p @ means)
            removed = float(2 * means.sum() - self.n * (p @ means))
            self.dominance = self.n * removed / (trace - removed) if trace > removed else 0.0
            if abs(trace - removed) <= self.n * CENTERING_ROUNDING * largest and self._is_rounding(largest):
                self.dominance, weights = 0.0, np.zeros(self.n)
        factor = selection.factor
        if factor != 1.0 or selection.weights is not None or not weights.any():
            self.scale = np.sqrt(weights * factor)
        self._sums: tuple[float, float] | None = None

    def tiles(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Yield (rows, columns, part of the matrix) on and above the diagonal, in a fixed order.

        Raises:
            CorruptRunError: a tile is not finite.
        """
        pairs = list(combinations_with_replacement(self.parts, 2))
        with ThreadPoolExecutor(1) as ahead:  # the next tile is read while this one is multiplied
            coming = ahead.submit(self._tile, *pairs[0])
            for place, (left, right) in enumerate(pairs):
                K = coming.result()
                if place + 1 < len(pairs):
                    coming = ahead.submit(self._tile, *pairs[place + 1])
                yield left.places, right.places, K

    def _is_rounding(self, largest: float) -> bool:
        """Return whether nothing but rounding is left of the matrix, see `centering.without_rounding`."""
        return all(float(np.abs(K).max()) <= CENTERING_ROUNDING * largest for _, _, K in self.tiles())

    def diagonals(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each Gram's diagonal, (n,) float64, neither centered nor weighted: only tiles on it are read."""
        for name in self.names:
            tiles = (self.read(name, part.stored, part.stored)[part.inside, part.inside] for part in self.parts)
            diagonal = np.concatenate(list(tiles))
            products = self.mean_products.get(name)
            if products is not None:
                diagonal = diagonal + 2 * products[:-1][self.samples] + products[-1]
            yield name, diagonal

    def diagonal(self) -> np.ndarray:
        """Return the diagonal, (n,) float64: only tiles on it are read."""
        return np.concatenate([self._tile(part, part).diagonal() for part in self.parts])

    def rows(self, places: np.ndarray) -> np.ndarray:
        """Return some rows, (len(places), n) float64: only the rows of tiles that they are in are read."""
        found = np.empty((len(places), self.n))
        for left in self.parts:
            wanted = np.flatnonzero((places >= left.places.start) & (places < left.places.stop))
            for right in self.parts if len(wanted) else ():
                found[wanted, right.places] = self._tile(left, right)[places[wanted] - left.places.start]
        return found

    def matvec(self, X: np.ndarray) -> np.ndarray:
        """Return K X, (n, b) float64: one pass over the stored tiles."""
        Y = np.zeros_like(X, dtype=np.float64)
        for rows, columns, K in self.tiles():
            _multiply(K, rows, columns, X, Y)
        return Y

    @property
    def trace(self) -> float:
        """Return the exact trace."""
        return self._summed()[0]

    @property
    def squared_norm(self) -> float:
        """Return `|K|_F^2`, exactly."""
        return self._summed()[1]

    def _summed(self) -> tuple[float, float]:
        if self._sums is None:
            trace = squared = 0.0
            for rows, columns, K in self.tiles():
                trace += float(np.trace(K)) if rows == columns else 0.0
                squared += float(np.vdot(K, K)) * (1 if rows == columns else 2)
            self._sums = trace, squared
        return self._sums

    def _tile(self, left: _Part, right: _Part) -> np.ndarray:
        total: np.ndarray | None = None
        for name in self.names:
            stored = self.read(name, left.stored, right.stored)
            part = stored[np.ix_(left.inside, right.inside)]
            total = part if total is None else np.add(total, part, out=total)
        assert total is not None  # a block has at least one parameter
        total += self.offsets[left.places, None]
        total += self.offsets[None, right.places]
        total += self.constant
        if self.scale is not None:
            total *= self.scale[left.places, None]
            total *= self.scale[None, right.places]
        if not np.isfinite(total).all():
            raise CorruptRunError(
                f"the Gram of {', '.join(self.names[:3])}{' and others' if len(self.names) > 3 else ''} is not finite "
                f"in samples {left.stored.start} to {left.stored.stop - 1}: a part is missing or damaged. "
                "`streamfisher gram --rebuild` remakes it."
            )
        return total


def _multiply(K: np.ndarray, rows: slice, columns: slice, X: np.ndarray, Y: np.ndarray) -> None:
    """Add the products of one tile, and of its mirror image, to Y."""
    Y[rows] += K @ X[columns]
    if rows != columns:
        Y[columns] += K.T @ X[rows]


def _parts(samples: np.ndarray, n_stored: int, tile: int) -> Iterator[_Part]:
    for start in range(0, n_stored, tile):
        stop = min(start + tile, n_stored)
        first, last = (int(place) for place in np.searchsorted(samples, [start, stop]))
        if first < last:
            yield _Part(slice(start, stop), samples[first:last] - start, slice(first, last))
