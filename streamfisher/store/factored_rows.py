"""Columns of gradient rows formed from their factors, for whoever wants rows and need not know how they are held."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamfisher.store.factors import Segment


def columns_of_segments(
    segments: Sequence[Segment],
    shape: tuple[int, int],
    start: int,
    stop: int,
    first: int,
    last: int,
    dtype: np.dtype,
) -> np.ndarray:
    """Return columns `start` to `stop` of the rows of samples `first` to `last`: (last - first, stop - start).

    Column `a n + b` of a row is entry (a, b) of `sum_t L_it^T R_it`, an (m, n) matrix.

    Args:
        segments: all uses of the parameter.
        shape: (m, n).
        start: first column.
        stop: one past the last column.
        first: first sample.
        last: one past the last sample.
        dtype: in which products are formed.
    """
    _, width = shape
    top, bottom = start // width, -(-stop // width)  # the matrix rows that the columns lie in
    found = np.zeros((last - first, bottom - top, width), dtype=dtype)
    for segment in segments:
        if segment.start >= last or segment.start + len(segment.lengths) <= first or not sum(segment.lengths):
            continue
        right = segment.right.read().astype(dtype, copy=False)
        by_index = segment.left.dtype is None
        left = segment.left.read() if by_index else segment.left.read(top, bottom).astype(dtype, copy=False)
        offsets = segment.offsets
        for place in range(max(first - segment.start, 0), min(last - segment.start, len(segment.lengths))):
            positions = slice(offsets[place], offsets[place + 1])
            target = found[segment.start + place - first]
            if by_index:
                ids = left[positions]
                inside = (ids >= top) & (ids < bottom)
                np.add.at(target, ids[inside] - top, right[positions][inside])
            else:
                target += left[positions].T @ right[positions]
    return found.reshape(last - first, -1)[:, start - top * width : stop - top * width]
