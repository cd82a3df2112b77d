"""Gram matrices of gradient rows, K = G G^T, one per parameter or group of them, by Dask, in bounded memory.

The columns of G are read in slabs. Each slab is multiplied in panels of `PANEL` columns (float32 or float64 products)
and added up in float64, which keeps the error of float32 products near 2e-8 of the largest eigenvalue. A Dask task
*folds* many slabs into one N x N sum (`folds.py`); the folds of a parameter are added in the order of its columns, each
as soon as it and the sum before it are there. Panels and folds depend on the data only, so neither the memory budget
nor the number of workers changes a bit of the result.

Gradients that are held as factors are reduced by `factor_gram.py`, by parts that are folds too (`kernels.py`).

After a run has grown, only the products with its new rows are formed (`products.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import dask
import numpy as np

from streamfisher.byte_sizes import format_bytes
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.errors import CapacityError, CorruptRunError
from streamfisher.reduction.folds import (
    Fold,
    Products,
    add_folds,
    factor_ranges,
    fold_factors,
    fold_ranges,
    fold_rows,
    product_dtype_of,
    use_in,
)
from streamfisher.reduction.kernels import choose_kernel, least_kernel_bytes
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
    # The largest first: what is left at the end, when there is less to do than workers, is little.
    order = sorted(keys, key=lambda key: -sum(rows.parameters[name] for name in keys[key]))
    graph = _Folds(rows, [name for key in order for name in keys[key]], subsets, config)
    with graph:
        tasks = {}
        for key in order:
            members = keys[key]
            known = grown[key].known if key in grown else 0
            total = None
            for name in members:
                for start, stop in graph.ranges(name):
                    total = graph.task(add_folds, total, graph.folds(name, start, stop, known))
            tasks[key] = graph.task(_finish, key, total, grown.get(key), graph.in_float32(members), sink)
        return graph.compute([tasks[key] for key in keys], progress=progress)


def build_folds(
    rows: GradientSource, pieces: Sequence[tuple[str, int, int]], config: SpectralConfig
) -> list[list[Fold]]:
    """Return the products of some columns of some parameters, as they are added up in `build_grams`.

    Args:
        rows: where the gradients are.
        pieces: parameter, first column and one past the last: of rows whole folds, of factors whole parts.
        config: as for `build_grams`.

    Raises:
        CapacityError: not even one panel fits the memory budget.
    """
    if not pieces:
        return []
    with _Folds(rows, list(dict.fromkeys(name for name, _, _ in pieces)), {}, config, pieces) as graph:
        return graph.compute([graph.folds(*piece, 0) for piece in pieces])


class _Folds(contextlib.ExitStack):
    """Tasks that multiply, in the order in which they are asked for. A context manager: while they are computed.

    Args:
        rows: where the gradients are.
        names: parameters, in the order of the tasks.
        subsets: columns to use of some.
        config: of the products.
        pieces: name, first and last column of each task, where they are not all columns.

    Raises:
        CapacityError: not even one panel fits the memory budget.
    """

    def __init__(
        self,
        rows: GradientSource,
        names: Sequence[str],
        subsets: Mapping[str, ColumnSubset],
        config: SpectralConfig,
        pieces: Sequence[tuple[str, int, int]] | None = None,
    ) -> None:
        super().__init__()
        self._rows, self._subsets, self._config, self._client = rows, subsets, config, active_client()
        self._factored = {name for name in names if rows.representation(name) == "factors" and name not in subsets}
        self._workers, self._budget = _share_memory(rows, names, self._factored, config)
        self._pieces = pieces or [(name, *columns) for name in names for columns in self.ranges(name)]
        self._held = dask.delayed(rows, traverse=False)  # one node of the graph: a cluster's workers open a run once
        self._numbers, self._token = itertools.count(_LAST, -1), uuid.uuid4().hex

    def __enter__(self) -> Self:
        super().__enter__()
        coming, config = None, self._config
        if self._client is None and isinstance(self._rows, OnFiles):
            coming = self.enter_context(Coming(self._rows, self._pieces, self._workers))
        threads = None if self._client is None else blas_threads(1, config)
        self._how = Products(config.dtype_gram, config.gram_device, threads, self._budget, SlabBuffers(), coming)
        return self

    def ranges(self, name: str) -> list[tuple[int, int]]:
        """Return the columns of each task of a parameter."""
        if name not in self._factored:
            return fold_ranges(self._rows, name)
        return factor_ranges(self._rows, name, self._config.dtype_gram, self._workers)

    def task(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a task. Of those that nothing else sets in order, Dask begins with the last by name."""
        name = f"{function.__name__}-{next(self._numbers)}-{self._token}"
        return dask.delayed(function, pure=False)(*arguments, dask_key_name=name)

    def folds(self, name: str, start: int, stop: int, known: int) -> Any:
        """Return the task of some columns of a parameter."""
        if name in self._factored:
            return self.task(fold_factors, self._held, name, start, stop, self._how, known)
        return self.task(fold_rows, self._held, name, start, stop, self._how, self._subsets.get(name), known)

    def in_float32(self, names: Sequence[str]) -> bool:
        """Return whether products of any of some parameters are formed in float32."""
        return any(in_float32(self._rows, name, self._config, as_factors=name in self._factored) for name in names)

    def compute(self, tasks: Sequence[Any], *, progress: bool = False) -> list[Any]:
        """Return what tasks return."""
        if self._client is not None:
            return compute_on(self._client, tasks, progress)
        with Bar(total=len(self._pieces), desc="Gram", unit="fold", disable=not progress) as bar:
            return compute(tasks, self._workers, self._config, TaskBar(bar, "fold_rows", "fold_factors"))


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
    use, lengths = use_in(rows, name), [sum(segment.lengths) for segment in rows.segments(name)]
    itemsize = product_dtype_of(rows, name, config.dtype_gram).itemsize
    return least_kernel_bytes(choose_kernel(use, single=itemsize == 4), use, max(lengths, default=0), itemsize)


def in_float32(rows: GradientSource, name: str, config: SpectralConfig, *, as_factors: bool) -> bool:
    """Return whether products of a parameter are formed in float32; those of its factors are only where rows are."""
    if product_dtype_of(rows, name, config.dtype_gram) == np.float64:
        return False
    return not as_factors or choose_kernel(use_in(rows, name), single=True) == "slabs"


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
