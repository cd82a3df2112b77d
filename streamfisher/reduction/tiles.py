"""Grams larger than the memory, built tile by tile: K_IJ = sum over panels of columns of G_I G_J^T.

A tile has `TILE` rows and columns whatever the budget and the number of workers, and each of its panels is one product
of fixed shape, so they change no bit. Sums are float64, a panel's product has the precision that `gram.py` gives it. A
diagonal tile is a `syrk`, exactly symmetric; the mirror image of any other is written beside it, so K is exactly
symmetric. A tile is written whole and then marked; a run that was killed goes on with those that are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, Protocol

import dask
import numpy as np

from streamfisher.byte_sizes import format_bytes
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError, CorruptRunError
from streamfisher.reduction.folds import dtype_of_products
from streamfisher.reduction.products import scaled_product
from streamfisher.reduction.slabs import least_bytes
from streamfisher.reduction.subsets import ColumnSubset
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.dask_pool import TaskBar, active_client, compute, compute_on
from streamfisher.runtime.threads import blas_threads, limit_threads, worker_count
from streamfisher.sinks.interface import GradientSource
from streamfisher.solving.tiled_gram import TILE
from streamfisher.store.layout import PANEL


@dataclass(frozen=True)
class Tile:
    """One tile of a Gram, on or above the diagonal."""

    row: int
    column: int
    rows: slice  # of the samples
    columns: slice  # of the samples

    @property
    def key(self) -> str:
        """Return its name in markers: `3-5`."""
        return f"{self.row}-{self.column}"


class TileSink(Protocol):
    """Where finished tiles go."""

    def todo(self, key: str, tiles: Sequence[Tile]) -> list[Tile]:
        """Return the tiles of a Gram that are not finished; makes room for it."""

    def write(self, key: str, finished: FinishedTile) -> Any:
        """Check, write and mark a tile."""

    def finish(self, key: str, tiles: Sequence[Tile]) -> None:
        """Mark the Gram as complete."""


@dataclass(frozen=True)
class FinishedTile:
    """A tile and, on the diagonal of centered rows, what they have in common with their mean."""

    tile: Tile
    values: np.ndarray  # (rows, columns) float64
    mean_products: np.ndarray | None  # (rows + 1,): `<c_i, m>` and, last, `<m, m>`


def tiles_of(n_samples: int, size: int = TILE) -> list[Tile]:
    """Return the tiles on and above the diagonal, row by row."""
    ranges = [slice(start, min(start + size, n_samples)) for start in range(0, n_samples, size)]
    pairs = combinations_with_replacement(range(len(ranges)), 2)
    return [Tile(i, j, ranges[i], ranges[j]) for i, j in pairs]


def whole_bytes(n_samples: int, workers: int) -> int:
    """Return the least memory in which whole Grams are built: `workers (24 N^2 + 20 N PANEL)`."""
    return workers * least_bytes(n_samples)


def tile_bytes(workers: int, chunk_columns: int, size: int = TILE) -> int:
    """Return the memory in which tiles are built: a tile, a product, and two parts of a slab twice for each worker."""
    slab = max(chunk_columns, PANEL)
    return workers * (24 * size**2 + 2 * size * (8 * slab + 8 * PANEL))


def needs_tiles(n_samples: int, budget: int, chunk_columns: int, size: int = TILE) -> bool:
    """Return whether a Gram must be built by tiles: whole, it does not fit the budget even with one worker.

    Raises:
        CapacityError: nor does one tile.
    """
    if whole_bytes(n_samples, 1) <= budget:
        return False
    least = tile_bytes(1, chunk_columns, size)
    if least > budget:
        raise CapacityError(
            f"the reduction of {n_samples} samples needs {format_bytes(whole_bytes(n_samples, 1))}, or "
            f"{format_bytes(least)} by tiles, and the budget is {format_bytes(budget)}. Raise memory_budget to "
            f"{format_bytes(least)} or more."
        )
    return True


def tile_workers(workers: int, budget: int, chunk_columns: int, size: int = TILE) -> int:
    """Return how many workers, at most `workers`, may build tiles at once within the budget."""
    return max(1, min(workers, budget // tile_bytes(1, chunk_columns, size)))


def build_tiled_grams(
    rows: GradientSource,
    config: SpectralConfig,
    sink: TileSink,
    keys: Mapping[str, Sequence[str]],
    *,
    budget: int,
    subsets: Mapping[str, ColumnSubset] | None = None,
    size: int | None = None,
    progress: bool = False,
) -> dict[str, list[Any]]:
    """Build Grams tile by tile with Dask; tiles that are finished are not built again.

    Args:
        rows: where the gradients are.
        config: `dtype_gram`, `gram_device`, `n_workers` and `use_deterministic` count here.
        sink: receives each tile in the task that finished it.
        keys: the parameters of each Gram.
        budget: bytes that all workers together may use.
        subsets: columns to use of some parameters, see `subsets.draw_columns`.
        size: rows of a tile; `None` means `TILE`.
        progress: show a bar.

    Returns:
        What `sink.write` returned of the tiles that were built, in their order.

    Raises:
        CorruptRunError: a tile is not finite, or does not have the norms that were seen while collecting.
    """
    tiles = tiles_of(rows.n_samples, size or TILE)
    widest = max(rows.chunk_columns(name) for names in keys.values() for name in names)
    workers = tile_workers(worker_count(config), budget, widest, size or TILE)
    client = active_client()
    threads = None if client is None else blas_threads(1, config)
    built: dict[str, list[Any]] = {}
    todo = {key: sink.todo(key, tiles) for key in keys}
    with Bar(total=sum(map(len, todo.values())), desc="Gram", unit="tile", disable=not progress) as bar:
        for key, names in keys.items():
            tasks = [
                dask.delayed(_build_and_write, pure=False)(rows, key, names, tile, config, subsets or {}, sink, threads)
                for tile in todo[key]
            ]
            if client is not None:
                built[key] = compute_on(client, tasks, False)
            else:
                built[key] = compute(tasks, workers, config, TaskBar(bar, "_build_and_write"))
            sink.finish(key, tiles)
    return built


def _build_and_write(
    rows: GradientSource,
    key: str,
    names: Sequence[str],
    tile: Tile,
    config: SpectralConfig,
    subsets: Mapping[str, ColumnSubset],
    sink: TileSink,
    threads: int | None,
) -> Any:
    limit_threads(threads)
    return sink.write(key, build_tile(rows, names, tile, config, subsets))


def build_tile(
    rows: GradientSource, names: Sequence[str], tile: Tile, config: SpectralConfig, subsets: Mapping[str, ColumnSubset]
) -> FinishedTile:
    """Return one tile of the Gram of some parameters together.

    Args:
        rows: where the gradients are.
        names: the parameters.
        tile: which one.
        config: `dtype_gram` and `gram_device`.
        subsets: columns to use of some parameters.

    Raises:
        CorruptRunError: the tile is not finite: rows are missing or altered.
    """
    total = np.zeros((tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start))
    mean_products: np.ndarray | None = None
    for name in names:
        subset, width = subsets.get(name), max(rows.chunk_columns(name) // PANEL, 1) * PANEL
        scale = 1.0 if subset is None else subset.scale
        for left in range(0, rows.parameters[name], width):
            right = min(left + width, rows.parameters[name])
            inside = slice(None) if subset is None else subset.inside(left, right)
            product, mean = _slab_product(rows, name, tile, left, right, inside, config)
            total += product if subset is None else scale * product
            if mean is not None:
                mean_products = scale * mean if mean_products is None else mean_products + scale * mean
    if not np.isfinite(total).all():
        raise CorruptRunError(
            f"the Gram of {', '.join(names[:3])} is not finite between samples {tile.rows.start} to "
            f"{tile.rows.stop - 1} and {tile.columns.start} to {tile.columns.stop - 1}: gradient rows are missing, "
            "altered, or too large. `streamfisher verify` tells which."
        )
    return FinishedTile(tile, total, mean_products)


def _slab_product(
    rows: GradientSource,
    name: str,
    tile: Tile,
    left: int,
    right: int,
    inside: slice | np.ndarray,
    config: SpectralConfig,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the tile of one slab of columns, and what its rows have in common with the mean that was subtracted."""
    diagonal = tile.row == tile.column

    def read(samples: slice) -> np.ndarray:
        found = rows.columns(name, left, right, samples)[:, inside]
        return found.astype(dtype_of_products(rows.parameters[name], config.dtype_gram, found.dtype), copy=False)

    upper = read(tile.rows)
    lower = upper if diagonal else read(tile.columns)
    total = np.zeros((len(upper), len(lower)))
    for first in range(0, upper.shape[1], PANEL):
        panel = np.ascontiguousarray(upper[:, first : first + PANEL])
        other = panel if diagonal else np.ascontiguousarray(lower[:, first : first + PANEL])
        total += scaled_product(panel, other, config.gram_device)
    mean = rows.mean(name, left, right) if diagonal else None
    if mean is None:
        return total, None
    mean = mean[inside]
    return total, np.append(upper.astype(np.float64) @ mean, mean @ mean)
