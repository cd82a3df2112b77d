"""Gram matrices of gradient rows, K = G G^T, one per parameter, by Dask, in bounded memory.

The columns of G are read in slabs. Each slab is multiplied in panels of `PANEL` columns (float32 or float64 products)
and added up in float64, which keeps the error of float32 products near 2e-8 of the largest eigenvalue. One Dask task
*folds* many slabs into one N x N sum; the folds of a parameter are added in the order of its columns. Panels and folds
depend on the data only, so neither the memory budget nor the number of workers changes a bit of the result.

`numpy`'s `b @ b.T` calls `syrk`: half the work of a general product, and exactly symmetric.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from streamfisher.store.layout import PANEL

#: Columns of one Dask task, at most: enough products to outweigh one addition of an N x N sum.
FOLD = 64 * PANEL

#: Parameters of fewer columns are multiplied in float64 whatever `dtype_gram` is. The rounding errors of float32
#: products average out over the columns, to `u / sqrt(P)`; over a few they do not, and there float64 costs nothing.
WIDE = 16 * PANEL

#: Largest entries of a panel whose float32 products stay far from the ends of float32's range.
_SAFE_PEAK = (1e-12, 1e12)


class GradientRows(Protocol):
    """Anything that holds per-sample gradients by columns: a run on disk, or arrays in memory."""

    n_samples: int
    parameters: Mapping[str, int]  # name -> number of columns

    def chunk_columns(self, name: str) -> int:
        """Return the columns that are read together at no extra cost."""

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return (N, stop - start) float32 or float64."""

    def mean(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return the mean gradient that was subtracted from the rows, or `None`."""


class MemoryRows:
    """Gradient rows held in memory, `{name: (N, P_k)}`, with the same face as a stored run."""

    def __init__(self, rows: Mapping[str, np.ndarray]):
        self.rows = dict(rows)
        self.parameters = {name: values.shape[1] for name, values in rows.items()}
        self.n_samples = next(iter(rows.values())).shape[0] if rows else 0

    def chunk_columns(self, name: str) -> int:
        """Return `PANEL`: any column is as near as any other."""
        return PANEL

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return a view of (N, stop - start)."""
        return self.rows[name][:, start:stop]

    def mean(self, name: str, start: int, stop: int) -> None:
        """Return `None`: rows in memory are never centered."""


@dataclass(frozen=True)
class ColumnSubset:
    """Columns of one parameter drawn at random, and the factor that keeps the expected Gram the true one."""

    columns: np.ndarray  # int64, ascending
    scale: float  # P_b / k: the Gram of the drawn columns is multiplied by it


@dataclass(frozen=True)
class ParameterGram:
    """The Gram of one parameter's rows as they are held."""

    name: str
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
    names: Iterable[str] | None = None,
    subsets: Mapping[str, ColumnSubset] | None = None,
    progress: bool = False,
) -> list[Any]:
    """Build the Gram of every parameter with Dask and hand each to `sink` in the task that finished it.

    A Dask `distributed` client, where one is active, runs the tasks; otherwise threads of this process do.

    Args:
        rows: where the gradients are.
        config: `dtype_gram`, `n_workers`, `memory_budget` and `use_deterministic` count here.
        sink: receives each `ParameterGram`; with a distributed client it runs on a worker.
        names: which parameters; `None` means all.
        subsets: columns to use of some parameters, see `draw_columns`.
        progress: show a bar.

    Returns:
        What `sink` returned, in the order of `names`.

    Raises:
        CapacityError: not even one panel fits the memory budget.
        CorruptRunError: a Gram is not finite: rows are missing or altered.
    """
    names = list(rows.parameters if names is None else names)
    subsets = subsets or {}
    workers = config.n_workers or len(os.sched_getaffinity(0))
    panels = panels_per_slab(rows.n_samples, workers, config.memory_budget)
    tasks, n_folds = [], 0
    for name in names:
        folds = [
            dask.delayed(_fold, pure=False)(rows, name, start, stop, panels, config.dtype_gram, subsets.get(name))
            for start, stop in _fold_ranges(rows.parameters[name])
        ]
        n_folds += len(folds)
        tasks.append(dask.delayed(_finish, pure=False)(name, folds, subsets.get(name), sink))
    with _blas_threads(workers, config.use_deterministic), _Progress(n_folds, enabled=progress):
        return list(dask.compute(*tasks, **_scheduler(workers)))


def panels_per_slab(n_samples: int, workers: int, memory_budget: int | None) -> int:
    """Return how many panels each worker may hold so that the reduction stays within its budget.

    A worker holds a slab as read and as multiplied, the sum, one product and the fold it adds to:
    `N S (4 + 4 + 4) + 20 N^2` bytes with float32 products, counted here as if they were float64.

    Raises:
        CapacityError: one panel per worker is already more than the budget.
    """
    budget = memory_budget or psutil.virtual_memory().available // 2
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


def _fold(
    rows: GradientRows,
    name: str,
    start: int,
    stop: int,
    panels: int,
    dtype: torch.dtype,
    subset: ColumnSubset | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the Gram of columns `start` to `stop` in float64, and the products of those columns with the mean."""
    total = np.zeros((rows.n_samples, rows.n_samples))
    products = None
    product_dtype = np.float64 if dtype == torch.float64 or rows.parameters[name] < WIDE else np.float32
    chunk = rows.chunk_columns(name)
    # Whole chunks at a time, so that none is read twice.
    width = max(panels * PANEL // max(chunk, 1) * chunk, min(chunk, panels * PANEL), 1)
    for left in range(start, stop, width):
        right = min(left + width, stop)
        slab = rows.columns(name, left, right)
        if slab.dtype != np.float64:
            slab = slab.astype(product_dtype, copy=False)
        mean = rows.mean(name, left, right)
        for first in range(0, right - left, PANEL):
            panel = slab[:, first : first + PANEL]
            if subset is not None:
                inside = _inside(subset.columns, left + first, left + first + panel.shape[1])
                panel = panel[:, inside]
            panel = np.ascontiguousarray(panel)
            total += _product(panel)
            if mean is not None:
                part = mean[first : first + PANEL]
                part = part if subset is None else part[inside]
                here = np.append(panel.astype(np.float64) @ part, part @ part)
                products = here if products is None else products + here
        del slab
    return total, products


def _product(panel: np.ndarray) -> np.ndarray:
    """Return `panel @ panel.T`, without the underflow or overflow that squaring extreme float32 gradients would bring.

    Scaling by a power of two is exact, so it changes no bit of a product that needed none.
    """
    if panel.dtype != np.float32 or panel.size == 0:
        return panel @ panel.T
    peak = float(max(panel.max(), -panel.min()))
    if not np.isfinite(peak) or peak == 0.0 or _SAFE_PEAK[0] < peak < _SAFE_PEAK[1]:
        return panel @ panel.T
    exponent = int(np.floor(np.log2(peak)))
    scaled = np.ldexp(panel, -exponent)
    return np.ldexp((scaled @ scaled.T).astype(np.float64), 2 * exponent)


def _finish(
    name: str,
    folds: list[tuple[np.ndarray, np.ndarray | None]],
    subset: ColumnSubset | None,
    sink: Callable[[ParameterGram], Any],
) -> Any:
    """Add the folds in the order of the columns, check, and hand the Gram on."""
    scale = 1.0 if subset is None else subset.scale
    gram, products = folds[0]
    for more, more_products in folds[1:]:
        gram = gram + more
        products = None if products is None else products + more_products
    if not np.isfinite(gram).all():
        samples = np.flatnonzero(~np.isfinite(gram.diagonal()))
        raise CorruptRunError(
            f"the Gram of {name} is not finite: the gradient rows of samples {_list(samples)} are missing, altered, or "
            f"too large for {gram.dtype} products. `streamfisher verify` tells which."
        )
    return sink(ParameterGram(name, gram * scale, None if products is None else products * scale))


def _inside(columns: np.ndarray, start: int, stop: int) -> np.ndarray:
    first, last = np.searchsorted(columns, [start, stop])
    return columns[first:last] - start


def _list(samples: np.ndarray) -> str:
    shown = ", ".join(str(sample) for sample in samples[:8])
    return shown + (f" and {len(samples) - 8} more" if len(samples) > 8 else "")


def _scheduler(workers: int) -> dict[str, Any]:
    """Use the active distributed client where there is one, else threads."""
    distributed = sys.modules.get("distributed")  # a client can only be active where it was imported
    if distributed is not None:
        try:
            distributed.default_client()
            return {}
        except ValueError:
            pass  # imported, but no client is active
    return {"scheduler": "threads", "num_workers": workers}


def _blas_threads(workers: int, deterministic: bool) -> threadpoolctl.threadpool_limits:
    """Share the cores between the workers' BLAS calls; one thread each where bits must not depend on the machine."""
    cores = len(os.sched_getaffinity(0))
    return threadpoolctl.threadpool_limits(1 if deterministic else max(1, cores // workers))


class _Progress(Callback):
    """One bar over the folds of all parameters."""

    def __init__(self, total: int, *, enabled: bool):
        super().__init__()
        self.bar = tqdm(total=total, desc="Gram", unit="fold", disable=not enabled)

    def _posttask(self, key: Any, *_: Any) -> None:
        if str(key[0] if isinstance(key, tuple) else key).startswith("_fold-"):
            self.bar.update(1)

    def __exit__(self, *error: Any) -> None:
        self.bar.close()
        super().__exit__(*error)
