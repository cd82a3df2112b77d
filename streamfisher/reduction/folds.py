"""Folds: products of many columns of gradient rows, added up into N x N sums, in one Dask task.

A task has the columns of one fold, or the folds of one chunk where that is wider, so that each chunk is read once. Its
sums stay apart until they are added in the order of the columns: how wide chunks are changes no bit of the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamfisher.gradients.factors import matrix_shape
from streamfisher.reduction.factor_gram import factor_folds
from streamfisher.reduction.kernels import FactorUse, choose_kernel, parts_of, use_of
from streamfisher.reduction.products import panel_sum
from streamfisher.reduction.read_ahead import Coming
from streamfisher.reduction.slabs import SlabBuffers, plan_slabs, read_slabs
from streamfisher.reduction.subsets import ColumnSubset
from streamfisher.runtime.threads import limit_threads
from streamfisher.sinks.interface import GradientSource
from streamfisher.store.layout import FOLD, PANEL

#: Parameters of fewer columns are multiplied in float64 whatever `dtype_gram` is. The rounding errors of float32
#: products average out over the columns, to `u / sqrt(P)`; over a few they do not, and there float64 costs nothing.
WIDE = 16 * PANEL
#: Bytes of the sums that one task returns, at most, unless one alone takes more.
_SUMS_BYTES = 16 << 20


@dataclass(frozen=True)
class Products:
    """How tasks multiply."""

    dtype: torch.dtype
    device: str  # 'cpu', 'cuda' or 'auto'
    threads: int | None  # of BLAS, set in the task; None: they were set for the whole process
    budget: int  # bytes for one worker
    buffers: SlabBuffers  # of all workers of a process
    coming: Coming | None = None  # of tasks of this process

    def begin(self, name: str, start: int) -> None:
        """Do what a task begins with."""
        limit_threads(self.threads)
        if self.coming is not None:
            self.coming.begun(name, start)


#: New rows of a Gram, (N - known, N) float64, and the rows times their mean, (N + 1,), where they are centered.
Fold = tuple[np.ndarray, np.ndarray | None]


def dtype_of_products(columns: int, dtype_gram: torch.dtype, row_dtype: np.dtype | None) -> np.dtype:
    """Return the dtype in which the products of rows of so many columns are formed.

    Args:
        columns: of a row.
        dtype_gram: what the config asks for.
        row_dtype: in which rows were computed.
    """
    wide = dtype_gram == torch.float64 or columns < WIDE or row_dtype == np.float64
    return np.dtype("float64" if wide else "float32")


def product_dtype_of(rows: Any, name: str, dtype_gram: torch.dtype) -> np.dtype:
    """Return the dtype in which a parameter's products are formed."""
    return dtype_of_products(rows.parameters[name], dtype_gram, getattr(rows, "numpy_row_dtype", None))


def fold_ranges(rows: GradientSource, name: str) -> list[tuple[int, int]]:
    """Return the first column and one past the last of each task of a parameter."""
    folds = min(rows.chunk_columns(name) // FOLD, _SUMS_BYTES // (8 * rows.n_samples**2))
    return ranges_of(rows.parameters[name], folds)


def ranges_of(columns: int, folds: int = 1) -> list[tuple[int, int]]:
    """Return the first column and one past the last of every so many folds; one range at least."""
    width = max(folds, 1) * FOLD
    return [(start, min(start + width, columns)) for start in range(0, max(columns, 1), width)]


def use_in(rows: Any, name: str) -> FactorUse:
    """Return how the factors of a parameter are used."""
    return use_of(rows.segments(name), matrix_shape(rows.shape(name)), rows.n_samples)


def factor_ranges(rows: Any, name: str, dtype_gram: torch.dtype, workers: int) -> list[tuple[int, int]]:
    """Return the first column and one past the last of each task of factors, see `parts_of`.

    Each reads the other factor once: there are no more than workers, unless their sums take much memory.
    """
    use = use_in(rows, name)
    single = product_dtype_of(rows, name, dtype_gram) == np.float32
    parts = parts_of(choose_kernel(use, single=single), use)
    some = max(1, min(-(-len(parts) // workers), _SUMS_BYTES // (8 * rows.n_samples**2)))
    return [(parts[first][0], parts[min(first + some, len(parts)) - 1][1]) for first in range(0, len(parts), some)]


def fold_factors(rows: Any, name: str, start: int, stop: int, how: Products, known: int) -> list[Fold]:
    """Return the rows from `known` on of the Gram of each part of a parameter's factors, from `start` to `stop`."""
    how.begin(name, start)
    use, dtype = use_in(rows, name), product_dtype_of(rows, name, how.dtype)
    parts = parts_of(choose_kernel(use, single=dtype == np.float32), use)
    found = factor_folds(
        rows.segments(name),
        use,
        [part for part in parts if start <= part[0] < stop],
        known=known,
        new_sum=lambda: panel_sum(rows.n_samples, known, how.device),
        dtype=dtype,
        budget=how.budget,
    )
    return [(gram, None) for gram in found]


def fold_rows(
    rows: GradientSource,
    name: str,
    start: int,
    stop: int,
    how: Products,
    subset: ColumnSubset | None,
    known: int,
) -> list[Fold]:
    """Return the rows from `known` on of the Grams of columns `start` to `stop`, and those columns times the mean.

    One for each `FOLD` columns, in their order.
    """
    how.begin(name, start)
    folds = []
    for _, panels in itertools.groupby(_panels(rows, name, start, stop, how), key=lambda panel: panel[0] // FOLD):
        total = panel_sum(rows.n_samples, known, how.device)
        products = None
        for left, panel, mean in panels:
            if subset is not None:
                inside = subset.inside(left, left + panel.shape[1])
                panel, mean = panel[:, inside], None if mean is None else mean[inside]
            total.add(panel)
            if mean is not None:
                here = np.append(panel.astype(np.float64) @ mean, mean @ mean)
                products = here if products is None else products + here
        gram = total.result()
        if subset is not None:
            gram, products = gram * subset.scale, None if products is None else products * subset.scale
        folds.append((gram, products))
    return folds or [(panel_sum(rows.n_samples, known, how.device).result(), None)]


def _panels(
    rows: GradientSource, name: str, start: int, stop: int, how: Products
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yield the first column of each panel, its values, valid until the next, and the mean of its columns."""
    product_dtype = product_dtype_of(rows, name, how.dtype)
    plan = plan_slabs(rows, name, product_dtype, how.budget)
    for left, slab in read_slabs(rows, name, start, stop, plan, how.buffers):
        if slab.dtype != np.float64:  # of float64 rows, products are never formed in less
            slab = slab.astype(product_dtype, copy=False)
        mean = rows.mean(name, left, left + slab.shape[1])
        for first in range(0, slab.shape[1], PANEL):
            part = slice(first, first + PANEL)
            yield left + first, slab[:, part], None if mean is None else mean[part]


def add_folds(total: Fold | None, folds: Sequence[Fold]) -> Fold:
    """Add the next folds, in the order of the columns. None is changed: a cluster may do a task again."""
    for gram, products in folds:
        if total is None:
            total = gram, products
        else:
            total = total[0] + gram, None if total[1] is None else total[1] + products
    assert total is not None  # a task returns one fold at least
    return total
