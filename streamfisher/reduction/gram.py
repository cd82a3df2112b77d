"""Gram matrices of gradient rows, K = G G^T, one per parameter or group of them, by Dask, in bounded memory.

The columns of G are read in slabs. Each slab is multiplied in panels of `PANEL` columns (float32 or float64 products)
and added up in float64, which keeps the error of float32 products near 2e-8 of the largest eigenvalue. A Dask task
*folds* many slabs into one N x N sum (`folds.py`); the folds of a parameter are added in the order of its columns, each
as soon as it and the sum before it are there. Panels and folds depend on the data only, so neither the memory budget
nor the number of workers changes a bit of the result.

Gradients that are held as factors are reduced by `factor_gram.py`, one task for each parameter.

After a run has grown, only the products with its new rows are formed (`products.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask
import numpy as np

from streamfisher.byte_sizes import format_bytes
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.errors import CapacityError, CorruptRunError
from streamfisher.gradients.factors import matrix_shape
from streamfisher.reduction.factor_gram import choose_kernel, least_kernel_bytes
from streamfisher.reduction.folds import (
    Fold,
    Products,
    add_folds,
    fold_factors,
    fold_ranges,
    fold_rows,
    product_dtype_of,
)
from streamfisher.reduction.products import complete
from streamfisher.reduction.read_ahead import Coming
from streamfisher.reduction.slabs import SlabBuffers, least_bytes
from streamfisher.reduction.subsets import ColumnSubset
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.dask_pool import TaskBar, active_client, compute, compute_on
from streamfisher.runtime.memory import working_memory
from streamfisher.runtime.threads import blas_threads, worker_count
from streamfisher.sinks.interface import GradientSource, OnFiles

#: Number of the first task; those that follow have as many digits.
_LAST = 999_999_999


@dataclass(frozen=True)
class GrownGram:
    """A Gram of the first rows, made before the run grew."""

    known: int  # so many rows, whose products with each other it holds
    read: Callable[[str], np.ndarray]  # parameter -> (at least known, at least known) float64
    single: bool = True  # float32 products are in it


@dataclass(frozen=True)
class ParameterGram:
    """The Gram of the rows of one parameter, or of a group of them, as they are held."""

    name: str  # the parameter's, or the group's key
    gram: np.ndarray  # (N, N) float64, exactly symmetric
    mean_products: np.ndarray | None  # (N + 1,): rows times the mean, and its square; only for centered rows
    single: bool  # float32 products are in it; else all were formed in float64


def gram_settings(config: SpectralConfig) -> dict[str, Any]:
    """Return what decides the bits of a Gram besides the rows; stored beside it."""
    settings: dict[str, Any] = {"dtype_gram": dtype_name(config.dtype_gram)}
    if config.max_params_per_block is not None:
        settings |= {
            "max_params_per_block": config.max_params_per_block,
            "subsampled_blocks": config.block_structure,
            "seed": config.seed,
        }
    return settings


def build_grams(
    rows: GradientSource,
    config: SpectralConfig,
    sink: Callable[[ParameterGram], Any],
    *,
    keys: Mapping[str, Sequence[str]] | None = None,
    subsets: Mapping[str, ColumnSubset] | None = None,
    grown: Mapping[str, GrownGram] | None = None,
    progress: bool = False,
) -> list[Any]:
    """Build Grams with Dask and hand each to `sink` in the task that finished it.

    A Dask `distributed` client, where one is active, runs the tasks; otherwise threads of this process do.

    Args:
        rows: where the gradients are.
        config: `dtype_gram`, `gram_device`, `n_workers`, `memory_budget` and `use_deterministic` count here.
        sink: receives each `ParameterGram`; with a distributed client it runs on a worker.
        keys: Gram key -> parameters whose Grams it sums; `None` means one for each parameter.
        subsets: columns to use of some parameters, see `draw_columns`.
        grown: Grams that exist for the first rows; only products with further rows are formed.
        progress: show a bar.

    Returns:
        What `sink` returned, in the order of `keys`.

    Raises:
        CapacityError: not even one panel fits the memory budget.
        CorruptRunError: a Gram is not finite: rows are missing or altered.
    """
    keys = {name: [name] for name in rows.parameters} if keys is None else keys
    subsets, grown = subsets or {}, grown or {}
    names = [name for members in keys.values() for name in members]
    factored = {name for name in names if rows.representation(name) == "factors" and name not in subsets}
    workers, budget = _share_memory(rows, names, factored, config)
    ranges = {name: [(0, rows.parameters[name])] if name in factored else fold_ranges(rows, name) for name in names}
    client = active_client()
    with contextlib.ExitStack() as stack:
        coming = None
        if client is None and isinstance(rows, OnFiles):
            order = [(name, *columns) for name in names for columns in ranges[name]]
            coming = stack.enter_context(Coming(rows, order, workers))
        threads = None if client is None else blas_threads(1, config)
        products = Products(config.dtype_gram, config.gram_device, threads, budget, SlabBuffers(), coming)
        held = dask.delayed(rows, traverse=False)  # one node of the graph: a cluster's workers open a run once each
        numbers, token = itertools.count(_LAST, -1), uuid.uuid4().hex

        def task(function: Callable[..., Any], *arguments: Any) -> Any:
            """Return a task. Of those that nothing else sets in order, Dask begins with the last by name."""
            name = f"{function.__name__}-{next(numbers)}-{token}"
            return dask.delayed(function, pure=False)(*arguments, dask_key_name=name)

        tasks = []
        for key, members in keys.items():
            known = grown[key].known if key in grown else 0
            total = None
            for name in members:
                for start, stop in ranges[name]:
                    if name in factored:
                        part = task(fold_factors, held, name, products, known)
                    else:
                        part = task(fold_rows, held, name, start, stop, products, subsets.get(name), known)
                    total = task(add_folds, total, part)
            single = any(_in_float32(rows, name, config, as_factors=name in factored) for name in members)
            tasks.append(task(_finish, key, total, grown.get(key), single, sink))
        if client is not None:
            return compute_on(client, tasks, progress)
        with Bar(total=sum(map(len, ranges.values())), desc="Gram", unit="fold", disable=not progress) as bar:
            return compute(tasks, workers, config, TaskBar(bar, "fold_rows", "fold_factors"))


def _share_memory(
    rows: GradientSource, names: Sequence[str], factored: set[str], config: SpectralConfig
) -> tuple[int, int]:
    """Return workers, and bytes for each; fewer workers where memory asks for it.

    Raises:
        CapacityError: not even one worker can work within the budget.
    """
    of_factors = max((_factor_memory(rows, name, config) for name in factored), default=0)
    of_rows = least_bytes(rows.n_samples) if len(factored) < len(names) else 0
    return share_memory(rows.n_samples, of_rows, of_factors, config, working_memory(config.memory_budget))


def share_memory(n_samples: int, of_rows: int, of_factors: int, config: SpectralConfig, budget: int) -> tuple[int, int]:
    """Return workers, and bytes for each: what plans and runs both ask.

    Args:
        n_samples: N.
        of_rows: least bytes in which one worker reduces rows; 0 where there are none.
        of_factors: and factors.
        config: `n_workers` counts.
        budget: bytes of all workers.

    Raises:
        CapacityError: not even one worker can work within the budget.
    """
    workers = worker_count(config)
    least, what = max((of_factors, " of factors"), (of_rows, ""))
    if config.n_workers is None:
        workers = max(1, min(workers, int(budget // max(least, 1))))
    if least > budget // workers:
        raise CapacityError(
            f"{n_samples} samples need {format_bytes(least * workers)} for the reduction{what} with "
            f"{workers} workers and the budget is {format_bytes(budget)}. Lower n_workers (1 needs "
            f"{format_bytes(least)}) or raise memory_budget."
        )
    return workers, int(budget // workers)


def _factor_memory(rows: Any, name: str, config: SpectralConfig) -> int:
    """Return the least bytes that the reduction of a parameter's factors needs."""
    segments, shape = rows.segments(name), matrix_shape(rows.shape(name))
    itemsize = product_dtype_of(rows, name, config.dtype_gram).itemsize
    kernel = choose_kernel(segments, shape, rows.n_samples, single=itemsize == 4)
    lengths = [sum(segment.lengths) for segment in segments]
    return least_kernel_bytes(kernel, sum(lengths), max(lengths, default=0), shape, rows.n_samples, itemsize)


def _in_float32(rows: GradientSource, name: str, config: SpectralConfig, *, as_factors: bool) -> bool:
    """Return whether products of a parameter are formed in float32; those of its factors are only where rows are."""
    if product_dtype_of(rows, name, config.dtype_gram) == np.float64:
        return False
    shape = matrix_shape(rows.shape(name)) if as_factors else (0, 0)
    return not as_factors or choose_kernel(rows.segments(name), shape, rows.n_samples, single=True) == "slabs"


def _finish(name: str, total: Fold, grown: GrownGram | None, single: bool, sink: Callable[[ParameterGram], Any]) -> Any:
    """Put the new rows to those that are known, check, and hand the Gram on."""
    gram, products = total
    gram = complete(gram, None if grown is None else grown.read(name)[: grown.known, : grown.known])
    return sink(finished(name, gram, products, single=single or (grown is not None and grown.single)))


def finished(name: str, gram: np.ndarray, products: np.ndarray | None, *, single: bool) -> ParameterGram:
    """Return a Gram that is known to be finite.

    Raises:
        CorruptRunError: it is not; the message names the samples.
    """
    if not np.isfinite(gram).all():
        samples = np.flatnonzero(~np.isfinite(gram.diagonal()))
        raise CorruptRunError(
            f"the Gram of {name} is not finite: the gradient rows of samples {_list(samples)} are missing, altered, or "
            f"too large for {gram.dtype} products. `streamfisher verify` tells which."
        )
    return ParameterGram(name, gram, products, single)


def _list(samples: np.ndarray) -> str:
    shown = ", ".join(str(sample) for sample in samples[:8])
    return shown + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")
