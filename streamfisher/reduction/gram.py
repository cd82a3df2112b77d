"""Gram matrices of gradient rows, K = G G^T, one per parameter or group of them, by Dask, in bounded memory.

The columns of G are read in slabs. Each slab is multiplied in panels of `PANEL` columns (float32 or float64 products)
and added up in float64, which keeps the error of float32 products near 2e-8 of the largest eigenvalue. One Dask task
*folds* many slabs into one N x N sum; the folds of a parameter are added in the order of its columns. Panels and folds
depend on the data only, so neither the memory budget nor the number of workers changes a bit of the result.

Gradients that are held as factors are reduced by `factor_gram.py`, one task for each parameter.

After a run has grown, only the products with its new rows are formed (`products.py`).
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import dask
import numpy as np
import psutil
import threadpoolctl
import torch
from dask.callbacks import Callback
from tqdm import tqdm

from streamfisher.config import SpectralConfig, dtype_name, format_bytes
from streamfisher.errors import CapacityError, CorruptRunError
from streamfisher.gradients.factors import matrix_shape
from streamfisher.reduction.factor_gram import choose_kernel, factor_gram, slab_memory
from streamfisher.reduction.products import complete, panel_sum
from streamfisher.store.layout import PANEL

#: Columns of one Dask task, at most: enough products to outweigh one addition of an N x N sum.
FOLD = 64 * PANEL

#: Parameters of fewer columns are multiplied in float64 whatever `dtype_gram` is. The rounding errors of float32
#: products average out over the columns, to `u / sqrt(P)`; over a few they do not, and there float64 costs nothing.
WIDE = 16 * PANEL


class GradientRows(Protocol):
    """Anything that holds per-sample gradients by columns: a run on disk, or arrays in memory."""

    n_samples: int
    parameters: Mapping[str, int]  # name -> number of columns

    def chunk_columns(self, name: str) -> int:
        """Return the columns that are read together at no extra cost."""

    def columns(self, name: str, start: int, stop: int, rows: slice | None = None) -> np.ndarray:
        """Return (N, stop - start) float32 or float64, or a range of those rows."""

    def mean(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return the mean gradient that was subtracted from the rows, or `None`."""

    def representation(self, name: str) -> str:
        """Return 'factors' where there are `segments` and a `shape` to reduce instead of columns, else 'dense'."""


class MemoryRows:
    """Gradient rows held in memory, `{name: (N, P_k)}`, with the same face as a stored run."""

    def __init__(self, rows: Mapping[str, np.ndarray]):
        self.rows = dict(rows)
        self.parameters = {name: values.shape[1] for name, values in rows.items()}
        self.n_samples = next(iter(rows.values())).shape[0] if rows else 0

    def chunk_columns(self, name: str) -> int:
        """Return `PANEL`: any column is as near as any other."""
        return PANEL

    def columns(self, name: str, start: int, stop: int, rows: slice | None = None) -> np.ndarray:
        """Return a view of (N, stop - start), or of a range of those rows."""
        return self.rows[name][rows or slice(None), start:stop]

    def mean(self, name: str, start: int, stop: int) -> None:
        """Return `None`: rows in memory are never centered."""

    def representation(self, name: str) -> str:
        """Return 'dense'."""
        return "dense"


@dataclass(frozen=True)
class ColumnSubset:
    """Columns of one parameter drawn at random, and the factor that keeps the expected Gram the true one."""

    columns: np.ndarray  # int64, ascending
    scale: float  # P_b / k: the Gram of the drawn columns is multiplied by it


@dataclass(frozen=True)
class GrownGram:
    """A Gram of the first rows, made before the run grew."""

    known: int  # so many rows, whose products with each other it holds
    read: Callable[[str], np.ndarray]  # parameter -> (at least known, at least known) float64


@dataclass(frozen=True)
class _Products:
    """How tasks multiply."""

    dtype: torch.dtype
    device: str  # 'cpu', 'cuda' or 'auto'
    threads: int | None  # of BLAS, set in the task; None: they were set for the whole process
    budget: int  # bytes for one worker


@dataclass(frozen=True)
class ParameterGram:
    """The Gram of the rows of one parameter, or of a group of them, as they are held."""

    name: str  # the parameter's, or the group's key
    gram: np.ndarray  # (N, N) float64, exactly symmetric
    mean_products: np.ndarray | None  # (N + 1,): rows times the mean, and its square; only for centered rows


def draw_columns(
    parameters: Mapping[str, int], blocks: Mapping[str, Sequence[str]], max_params: int | None, seed: int
) -> dict[str, ColumnSubset]:
    """Draw at most `max_params` columns of each block, the same in every process and run.

    The generator is seeded with `seed` and the SHA-1 of the block's name. With k of P_b columns drawn, the Gram is
    scaled by P_b / k, so its expectation is the Gram of the whole block.

    Args:
        parameters: columns of each parameter.
        blocks: parameters of each block.
        max_params: k; `None` draws nothing.
        seed: of the run.

    Returns:
        The subset of each parameter of the blocks that are larger than `max_params`.
    """
    subsets: dict[str, ColumnSubset] = {}
    if max_params is None:
        return subsets
    for key, names in blocks.items():
        total = sum(parameters[name] for name in names)
        if total <= max_params:
            continue
        word = int.from_bytes(hashlib.sha1(key.encode()).digest()[:8], "little")
        generator = np.random.Generator(np.random.PCG64([seed, word]))
        drawn = np.sort(generator.choice(total, size=max_params, replace=False, shuffle=False))
        offset = 0
        for name in names:
            inside = drawn[(drawn >= offset) & (drawn < offset + parameters[name])] - offset
            subsets[name] = ColumnSubset(inside.astype(np.int64), total / max_params)
            offset += parameters[name]
    return subsets


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
    rows: GradientRows,
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
    workers, panels, budget = _share_memory(rows, names, factored, config)
    client = _client()
    products = _Products(config.dtype_gram, config.gram_device, None if client is None else _threads(1, config), budget)
    tasks, n_folds = [], 0
    for key, members in keys.items():
        known = grown[key].known if key in grown else 0
        folds = []
        for name in members:
            if name in factored:
                folds.append(dask.delayed(_factor_fold, pure=False)(rows, name, products, known))
                continue
            folds += [
                dask.delayed(_fold, pure=False)(rows, name, start, stop, panels, products, subsets.get(name), known)
                for start, stop in _fold_ranges(rows.parameters[name])
            ]
        n_folds += len(folds)
        tasks.append(dask.delayed(_finish, pure=False)(key, folds, grown.get(key), sink))
    if client is not None:
        return _on_cluster(client, tasks, progress)
    with threadpoolctl.threadpool_limits(_threads(workers, config)), _Progress(n_folds, enabled=progress):
        return list(dask.compute(*tasks, **_scheduler(workers)))


def _share_memory(
    rows: GradientRows, names: Sequence[str], factored: set[str], config: SpectralConfig
) -> tuple[int, int, int]:
    """Return workers, panels of a slab of rows, and bytes for each worker; fewer workers where memory asks for it.

    Raises:
        CapacityError: not even one worker can work within the budget.
    """
    budget = config.memory_budget or psutil.virtual_memory().available // 2
    workers = config.n_workers or len(os.sched_getaffinity(0))
    least = max((_factor_memory(rows, name, config) for name in factored), default=0)
    if config.n_workers is None:
        panel = 24 * rows.n_samples**2 + 20 * rows.n_samples * PANEL
        each = max(least, panel if len(factored) < len(names) else 0, 1)
        workers = max(1, min(workers, int(budget // each)))
    if least > budget // workers:
        raise CapacityError(
            f"{rows.n_samples} samples need {format_bytes(least * workers)} for the reduction of factors with "
            f"{workers} workers and the budget is {format_bytes(budget)}. Lower n_workers (1 needs "
            f"{format_bytes(least)}) or raise memory_budget."
        )
    panels = panels_per_slab(rows.n_samples, workers, budget) if len(factored) < len(names) else 1
    return workers, panels, int(budget // workers)


def _factor_memory(rows: Any, name: str, config: SpectralConfig) -> int:
    """Return the least bytes that the reduction of a parameter's factors needs."""
    segments, shape = rows.segments(name), matrix_shape(rows.shape(name))
    itemsize = _product_dtype(rows, name, config.dtype_gram).itemsize
    kernel = choose_kernel(segments, shape, rows.n_samples, single=itemsize == 4)
    positions = sum(sum(segment.lengths) for segment in segments)
    if kernel == "slabs":
        return slab_memory(positions, shape, rows.n_samples, itemsize)[0]
    if kernel == "tokens":
        return 24 * rows.n_samples**2 + 64 * 32 * positions  # the sums of 64 columns
    longest = max((sum(segment.lengths) for segment in segments), default=0)
    return 24 * rows.n_samples**2 + 24 * longest * sum(shape)  # the factors of two batches


def _product_dtype(rows: Any, name: str, dtype_gram: torch.dtype) -> np.dtype:
    """Return the dtype in which a parameter's products are formed."""
    wide = dtype_gram == torch.float64 or rows.parameters[name] < WIDE
    return np.dtype("float64" if wide or getattr(rows, "numpy_row_dtype", None) == np.float64 else "float32")


def panels_per_slab(n_samples: int, workers: int, budget: int) -> int:
    """Return how many panels each worker may hold so that the reduction stays within its budget.

    A worker holds a slab as read and as multiplied, the sum, one product and the fold it adds to:
    `N S (4 + 4 + 4) + 20 N^2` bytes with float32 products, counted here as if they were float64.

    Raises:
        CapacityError: one panel per worker is already more than the budget.
    """
    fixed = workers * 24 * n_samples**2
    panel = workers * 20 * n_samples * PANEL
    if fixed + panel > budget:
        raise CapacityError(
            f"{n_samples} samples need {format_bytes(fixed + panel)} for the reduction with {workers} workers and the "
            f"budget is {format_bytes(budget)}. Lower n_workers (1 needs {format_bytes((fixed + panel) / workers)}) or "
            "raise memory_budget."
        )
    return int(min((budget - fixed) // panel, FOLD // PANEL))


def _fold_ranges(n_columns: int) -> list[tuple[int, int]]:
    return [(start, min(start + FOLD, n_columns)) for start in range(0, max(n_columns, 1), FOLD)]


def _factor_fold(rows: Any, name: str, how: _Products, known: int) -> tuple[np.ndarray, None]:
    """Return the rows from `known` on of the Gram of a parameter that is held as factors."""
    if how.threads is not None:
        threadpoolctl.threadpool_limits(how.threads)
    found = factor_gram(
        rows.segments(name),
        matrix_shape(rows.shape(name)),
        rows.n_samples,
        known=known,
        total=panel_sum(rows.n_samples, known, how.device),
        dtype=_product_dtype(rows, name, how.dtype),
        budget=how.budget,
    )
    return found, None


def _fold(
    rows: GradientRows,
    name: str,
    start: int,
    stop: int,
    panels: int,
    how: _Products,
    subset: ColumnSubset | None,
    known: int,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the rows from `known` on of the Gram of columns `start` to `stop`, and those columns times the mean."""
    if how.threads is not None:
        threadpoolctl.threadpool_limits(how.threads)
    total = panel_sum(rows.n_samples, known, how.device)
    products = None
    product_dtype = _product_dtype(rows, name, how.dtype)
    chunk = rows.chunk_columns(name)
    # Whole chunks at a time, so that none is read twice.
    width = max(panels * PANEL // max(chunk, 1) * chunk, min(chunk, panels * PANEL), 1)
    for left in range(start, stop, width):
        right = min(left + width, stop)
        slab = rows.columns(name, left, right)
        if slab.dtype != np.float64:  # of float64 rows, products are never formed in less
            slab = slab.astype(product_dtype, copy=False)
        mean = rows.mean(name, left, right)
        for first in range(0, right - left, PANEL):
            panel = slab[:, first : first + PANEL]
            if subset is not None:
                inside = _inside(subset.columns, left + first, left + first + panel.shape[1])
                panel = panel[:, inside]
            panel = np.ascontiguousarray(panel)
            total.add(panel)
            if mean is not None:
                part = mean[first : first + PANEL]
                part = part if subset is None else part[inside]
                here = np.append(panel.astype(np.float64) @ part, part @ part)
                products = here if products is None else products + here
        del slab
    if subset is None:
        return total.result(), products
    return total.result() * subset.scale, None if products is None else products * subset.scale


def _finish(
    name: str,
    folds: list[tuple[np.ndarray, np.ndarray | None]],
    grown: GrownGram | None,
    sink: Callable[[ParameterGram], Any],
) -> Any:
    """Add the folds in the order of the columns, check, and hand the Gram on."""
    gram, products = folds[0]
    for more, more_products in folds[1:]:
        gram = gram + more
        products = None if products is None else products + more_products
    gram = complete(gram, None if grown is None else grown.read(name)[: grown.known, : grown.known])
    if not np.isfinite(gram).all():
        samples = np.flatnonzero(~np.isfinite(gram.diagonal()))
        raise CorruptRunError(
            f"the Gram of {name} is not finite: the gradient rows of samples {_list(samples)} are missing, altered, or "
            f"too large for {gram.dtype} products. `streamfisher verify` tells which."
        )
    return sink(ParameterGram(name, gram, products))


def _inside(columns: np.ndarray, start: int, stop: int) -> np.ndarray:
    first, last = np.searchsorted(columns, [start, stop])
    return columns[first:last] - start


def _list(samples: np.ndarray) -> str:
    shown = ", ".join(str(sample) for sample in samples[:8])
    return shown + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")


def _client() -> Any:
    """Return the active distributed client, or `None`."""
    distributed = sys.modules.get("distributed")  # a client can only be active where it was imported
    if distributed is None:
        return None
    try:
        return distributed.default_client()
    except ValueError:
        return None


def _scheduler(workers: int) -> dict[str, Any]:
    """Use the active distributed client where there is one, else threads."""
    return {"scheduler": "threads", "num_workers": workers} if _client() is None else {}


def _on_cluster(client: Any, tasks: Sequence[Any], progress: bool) -> list[Any]:
    """Compute the tasks on a cluster; a worker that dies has its tasks done again by another."""
    from distributed import as_completed

    futures = client.compute(list(tasks))
    with tqdm(total=len(futures), desc="Gram", unit="parameter", disable=not progress) as bar:
        for _ in as_completed(futures):
            bar.update(1)
    return client.gather(futures)


def _threads(workers: int, config: SpectralConfig) -> int:
    """Share the cores between the workers' BLAS calls; one thread each where bits must not depend on the machine."""
    return 1 if config.use_deterministic else max(1, len(os.sched_getaffinity(0)) // workers)


class _Progress(Callback):
    """One bar over the folds of all parameters."""

    def __init__(self, total: int, *, enabled: bool):
        super().__init__()
        self.bar = tqdm(total=total, desc="Gram", unit="fold", disable=not enabled)

    def _posttask(self, key: Any, *_: Any) -> None:
        if str(key[0] if isinstance(key, tuple) else key).startswith(("_fold-", "_factor_fold-")):
            self.bar.update(1)

    def __exit__(self, *error: Any) -> None:
        self.bar.close()
        super().__exit__(*error)
