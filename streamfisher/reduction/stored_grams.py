"""The Gram stage of a stored run: which Grams are built how, whole or by tiles, checked and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamfisher.blocks.structures import assign_blocks, group_blocks
from streamfisher.config import SpectralConfig
from streamfisher.runtime.memory import give_back, working_memory
from streamfisher.reduction import gram as grams
from streamfisher.reduction.gram_sink import GramSink, keep_moment
from streamfisher.reduction.stored_tiles import StoredTiles
from streamfisher.reduction.subsets import ColumnSubset, draw_columns
from streamfisher.reduction.tiles import build_tiled_grams, needs_tiles
from streamfisher.store import RunStore
from streamfisher.store.layout import TILE


def build_stored_grams(
    store: RunStore, config: SpectralConfig, keys: Sequence[str], *, rebuild: bool = False, progress: bool = False
) -> dict[str, float | None]:
    """Build some Grams of a run; only while its lock is held.

    Args:
        store: of the run.
        config: precision, workers and memory budget.
        keys: of the Grams.
        rebuild: compare with what was there, and take nothing from it.
        progress: show a bar.

    Returns:
        Gram key -> `|new - old| / |new|` (Frobenius) where `rebuild` and there was one, else `None`.

    Raises:
        CorruptRunError: stored gradients are missing or do not have the norms they were collected with.
        RunError: they were deleted.
        CapacityError: the reduction does not fit the memory budget, not even by tiles.
    """
    settings = grams.gram_settings(config)
    blocks = group_blocks(assign_blocks(store.parameters, config.block_structure))
    subsets = draw_columns(store.parameters, blocks, config.max_params_per_block, config.seed)
    members = {key: store.gram_members[key] for key in keys}
    budget = working_memory(config.memory_budget)
    names = [name for some in members.values() for name in some]
    if needs_tiles(store.n_samples, budget, max(store.chunk_columns(name) for name in names)):
        return _build_tiles(store, config, members, subsets, budget, rebuild=rebuild, progress=progress)
    sink = GramSink(store, settings, subsampled=frozenset(subsets), compare=rebuild)
    grown = {} if rebuild or config.use_deterministic else _grown(store, settings, subsets)
    built = grams.build_grams(store, config, sink, keys=members, subsets=subsets, grown=grown, progress=progress)
    give_back()
    return dict(built)


def _build_tiles(
    store: RunStore,
    config: SpectralConfig,
    members: Mapping[str, Sequence[str]],
    subsets: Mapping[str, ColumnSubset],
    budget: int,
    *,
    rebuild: bool,
    progress: bool,
) -> dict[str, float | None]:
    """Build Grams that are larger than the memory, see `tiles`."""
    subsampled = frozenset(subsets)
    old = {key for key in members if rebuild and store.has_gram(key)}
    sink = StoredTiles(store, grams.gram_settings(config), members, subsampled=subsampled, rebuild=rebuild, size=TILE)
    built = build_tiled_grams(
        store, config, sink, members, budget=budget, subsets=subsets, size=TILE, progress=progress
    )
    for key in members:
        keep_moment(store, key, subsampled)
    return {key: _relative_change(built[key]) if key in old else None for key in members}


def _relative_change(changes: list[tuple[float, float]]) -> float | None:
    """Return `|new - old| / |new|` from the squared norms of the tiles; `None` where the old one was not finite."""
    change, norm = (sum(parts) for parts in zip(*changes, strict=True))
    if not np.isfinite(change):
        return None
    return float(np.sqrt(change / norm)) if norm else float(np.sqrt(change))


def _grown(store: RunStore, settings: Mapping[str, Any], subsets: Mapping[str, Any]) -> dict[str, grams.GrownGram]:
    """Return the Grams that were made before samples were added; their products need not be formed again."""
    known = store.grams_of_fewer(settings)
    return {
        key: grams.GrownGram(rows, _FewerSamples(store))
        for key, rows in known.items()
        if not set(store.gram_members[key]).intersection(subsets)
    }


@dataclass(frozen=True)
class _FewerSamples:
    """Reads a Gram as it was before the run grew; picklable for Dask workers."""

    store: RunStore

    def __call__(self, key: str) -> np.ndarray:
        return self.store.read_gram(key)[0]
