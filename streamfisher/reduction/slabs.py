"""Slabs of columns for the Gram stage, read ahead: while one is multiplied, a thread reads the next.

A slab has all N rows and the columns of one chunk, or as many as the memory allows. Two buffers take turns, and wait
for the next fold when one ends: to read into fresh memory takes up to half as long again (docs/design.md has figures).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from streamfisher.reduction.read_ahead import read_ahead
from streamfisher.sinks.interface import GradientSource
from streamfisher.store.layout import PANEL

#: What the threads that decode chunks keep of their buffers, in one process.
DECODING_BYTES = 40 << 20


@dataclass(frozen=True)
class SlabPlan:
    """How a parameter's columns are read."""

    columns: int  # of a slab, a multiple of `PANEL`
    ahead: bool  # whether the next slab is read while one is multiplied
    size: int  # bytes of the slabs of one worker


def least_bytes(n_samples: int) -> int:
    """Return the least bytes in which one worker builds Grams: sums of N x N, and one panel as float64."""
    return sums_bytes(n_samples) + 20 * n_samples * PANEL


def sums_bytes(n_samples: int) -> int:
    """Return the bytes of one worker's sums: a fold and a product, or three float64 sums when folds are added."""
    return 24 * n_samples**2


def plan_slabs(rows: GradientSource, name: str, product_dtype: np.dtype, budget: int) -> SlabPlan:
    """Return the slabs with which one worker stays within its budget; at least one panel.

    An entry takes the bytes of its row's dtype once for each slab, what its decoding takes, and 8 more where float32
    rows are multiplied in float64.

    Args:
        rows: where the gradients are.
        name: of the parameter.
        product_dtype: in which it is multiplied.
        budget: bytes of one worker.
    """
    held = rows.numpy_read_dtype.itemsize
    beside = rows.decoding_bytes + (8 if product_dtype.itemsize > held else 0)
    return slabs_within(
        rows.n_samples, rows.parameters[name], rows.chunk_columns(name), held=held, beside=beside, budget=budget
    )


def slabs_within(n: int, columns: int, chunk_columns: int, *, held: int, beside: int, budget: int) -> SlabPlan:
    """Return the slabs of a parameter from its sizes, see `plan_slabs`: what plans and runs both ask.

    Args:
        n: N.
        columns: of a row.
        chunk_columns: columns that are read together at no extra cost.
        held: bytes of an entry of a slab.
        beside: what it takes once more while it is decoded and multiplied.
        budget: bytes of one worker.
    """
    chunk = max(min(chunk_columns // PANEL, -(-columns // PANEL)), 1)  # in panels
    free = budget - sums_bytes(n)
    for slabs in (2, 1):
        panel = n * PANEL * (slabs * held + beside)
        panels = min(max(free // panel, 1), chunk)
        if panels == chunk or slabs == 1:
            break
    return SlabPlan(int(panels * PANEL), slabs == 2 and columns > panels * PANEL, int(panels * panel))


class SlabBuffers:
    """Buffers that wait for the next fold; pickled, as for another process, it is empty."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def __reduce__(self) -> tuple[type[SlabBuffers], tuple[()]]:
        return SlabBuffers, ()

    def take(self, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
        """Return an array of any content, one that was given back where it fits."""
        size = shape[0] * shape[1] * dtype.itemsize
        try:
            found = self._free.pop()  # of another size: it is let go
        except IndexError:
            found = np.empty(0, dtype=np.uint8)
        if found.nbytes != size:
            found = np.empty(size, dtype=np.uint8)
        return found.view(dtype).reshape(shape)

    def give_back(self, buffer: np.ndarray) -> None:
        """Keep a buffer that `take` returned for the next one."""
        self._free.append(buffer.reshape(-1).view(np.uint8))


def read_slabs(
    rows: GradientSource, name: str, start: int, stop: int, plan: SlabPlan, spare: SlabBuffers | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first column and the values, (N, at most `plan.columns`), of each slab from `start` to `stop`.

    A slab is valid until the next one is asked for.

    Args:
        rows: where the gradients are.
        name: of the parameter.
        start: first column.
        stop: one past the last column.
        plan: from `plan_slabs`.
        spare: where buffers come from and go back to.
    """
    spare = spare or SlabBuffers()
    edges = [(left, min(left + plan.columns, stop)) for left in range(start, stop, plan.columns)]
    shape = (rows.n_samples, min(plan.columns, stop - start))
    count = 2 if plan.ahead and len(edges) > 1 else 1
    buffers = [spare.take(shape, rows.numpy_read_dtype) for _ in range(count)]

    def read(turn: int) -> np.ndarray:
        left, right = edges[turn]
        return rows.columns(name, left, right, out=buffers[turn % len(buffers)][:, : right - left])

    slabs = read_ahead(read, range(len(edges)), ahead=count == 2)
    yield from zip((left for left, _ in edges), slabs, strict=True)
    for buffer in buffers:
        spare.give_back(buffer)
