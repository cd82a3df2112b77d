"""Rows of gradients that are held as factors, formed a slab of columns at a time and multiplied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from streamfisher.byte_sizes import format_bytes
from streamfisher.errors import CapacityError
from streamfisher.reduction.kernels import FactorUse, slab_heights, slab_memory
from streamfisher.reduction.products import ArrayModule, PanelSum
from streamfisher.reduction.read_ahead import read_ahead
from streamfisher.store.factors import FactorSegment
from streamfisher.store.layout import PANEL


def slab_folds(
    segments: Sequence[FactorSegment],
    use: FactorUse,
    parts: Sequence[tuple[int, int]],
    new_sum: Callable[[], PanelSum],
    *,
    dtype: np.dtype,
    budget: int,
) -> list[np.ndarray]:
    """Form the rows of some parts a slab at a time and multiply them.

    Args:
        segments: all uses of the parameter.
        use: of them.
        parts: some that follow one another, see `parts_of`.
        new_sum: returns an empty sum of panels.
        dtype: of rows and products.
        budget: bytes that may be in memory at a time.

    Returns:
        The products of each part, (N - known, N) float64.

    Raises:
        CapacityError: one slab and the columns it is formed from are more than the budget.
    """
    if use.is_turned:
        segments = [replace(segment, left=segment.right, right=segment.left) for segment in segments]
    m, n_samples, positions = use.turned[0], use.n_samples, use.positions
    height, width = slab_heights(use.turned, n_samples)
    least, whole = slab_memory(use, dtype.itemsize)
    if least > budget:
        raise CapacityError(
            f"a slab of {n_samples} rows formed from {positions:,} positions needs {format_bytes(least)} and the "
            f"budget of a worker is {format_bytes(budget)}. Lower n_workers, or raise memory_budget."
        )
    spare = (budget - least) // max(positions * height * dtype.itemsize, 1)
    tall = m if whole <= budget else height * (1 + int(spare))
    total = new_sum()
    arrays = total.arrays
    slab = arrays.empty((n_samples, height * width), dtype)
    left: _Sides | None = None
    # The next columns are read while these are multiplied, where there is room for both.
    ahead = whole + positions * width * dtype.itemsize <= budget
    rights = read_ahead(lambda part: _Sides(segments, "right", *part, dtype, arrays), parts, ahead=ahead)
    folds = []
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
        folds.append(total.result())
        total = new_sum()
    return folds


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
