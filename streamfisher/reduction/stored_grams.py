"""The Gram stage of a stored run: which Grams are built how, whole or by tiles, checked and written."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamfisher.blocks.structures import assign_blocks, group_blocks
from streamfisher.config import SpectralConfig
from streamfisher.errors import CorruptRunError
from streamfisher.reduction import gram as grams
from streamfisher.reduction.device_grams import build_device_grams
from streamfisher.reduction.moment import has_moment, moment_of, stored_moment
from streamfisher.reduction.stored_tiles import StoredTiles
from streamfisher.reduction.subsets import ColumnSubset, draw_columns
from streamfisher.reduction.tiles import build_tiled_grams, needs_tiles
from streamfisher.runtime import run_log as runlog
from streamfisher.runtime.memory import give_back, working_memory
from streamfisher.sinks.device import DeviceGradients
from streamfisher.sinks.interface import GradientSource
from streamfisher.sinks.memory_source import MemoryRows
from streamfisher.solving.tiled_gram import TILE
from streamfisher.store import RunStore


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
    if needs_tiles(store.n_samples, budget, max(store.rows.chunk_columns(name) for name in names)):
        return _build_tiles(store, config, members, subsets, budget, rebuild=rebuild, progress=progress)
    sink = GramSink(store, settings, subsampled=frozenset(subsets), compare=rebuild)
    grown = {} if rebuild or config.use_deterministic else _grown(store, settings, subsets)
    with store.marking_together():
        built = grams.build_grams(
            store.rows, config, sink, keys=members, subsets=subsets, grown=grown, progress=progress
        )
    give_back()
    return dict(built)


def build_held_grams(
    store: RunStore,
    source: GradientSource | DeviceGradients,
    valid: np.ndarray,
    config: SpectralConfig,
    keys: Sequence[str],
    *,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Build Grams of gradients that are held in memory or on a device, and write them to a run, with their moments.

    Args:
        store: of the run.
        source: the gradients of all its samples, of the parameters of `keys`.
        valid: (N,) bool, which samples count.
        config: precision, workers and memory budget.
        keys: of the Grams.
        progress: show a bar.

    Returns:
        Gram key -> its diagonal, (N,) float64.

    Raises:
        CorruptRunError: a gradient is not finite.
        CapacityError: the reduction does not fit the memory budget.
    """
    sink = HeldGramSink(store, grams.gram_settings(config), source, valid)
    members = {key: store.gram_members[key] for key in keys}
    with store.marking_together():
        if isinstance(source, DeviceGradients):
            return dict(map(sink, build_device_grams(source, config, members, progress=progress)))
        return dict(grams.build_grams(source, config, sink, keys=members, progress=progress))


@dataclass(frozen=True)
class HeldGramSink:
    """Writes the Gram of gradients that are held, and its moment; picklable for Dask workers."""

    store: RunStore
    settings: Mapping[str, Any]
    source: GradientSource | DeviceGradients | None  # not needed where no Gram has a moment
    valid: np.ndarray  # (N,) bool

    def __call__(self, finished: grams.ParameterGram) -> tuple[str, np.ndarray]:
        """Write a Gram; return its key and its diagonal, (N,) float64."""
        key, moment = finished.name, None
        if has_moment(self.store, key):
            source = self.source
            assert source is not None
            rows = MemoryRows({key: source.on_host(key)}) if isinstance(source, DeviceGradients) else source
            moment = moment_of(rows, key, self.store.parameters[key], self.valid)
        self.store.grams.write(
            key, finished.gram, finished.mean_products, self.settings, moment, single=finished.single
        )
        runlog.event("gram", stage="grams", gram=key, samples=len(finished.gram))
        return key, finished.gram.diagonal().copy()


def build_unstored_grams(
    store: RunStore, config: SpectralConfig, keys: Sequence[str], *, progress: bool = False
) -> list[grams.ParameterGram]:
    """Build some Grams of a run in memory, checked as those that are stored; nothing is written.

    Raises:
        StreamfisherError: as `build_stored_grams`.
    """
    blocks = group_blocks(assign_blocks(store.parameters, config.block_structure))
    subsets = draw_columns(store.parameters, blocks, config.max_params_per_block, config.seed)
    members = {key: store.gram_members[key] for key in keys}
    sink = _CheckedGram(NormCheck(store, frozenset(subsets)))
    built = grams.build_grams(store.rows, config, sink, keys=members, subsets=subsets, progress=progress)
    give_back()
    return built


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
    old = {key for key in members if rebuild and store.grams.has(key)}
    sink = StoredTiles(store, grams.gram_settings(config), members, subsampled=subsampled, rebuild=rebuild, size=TILE)
    built = build_tiled_grams(
        store.rows, config, sink, members, budget=budget, subsets=subsets, size=TILE, progress=progress
    )
    return {key: _relative_change(built[key]) if key in old else None for key in members}


def _relative_change(changes: list[tuple[float, float]]) -> float | None:
    """Return `|new - old| / |new|` from the squared norms of the tiles; `None` where the old one was not finite."""
    change, norm = (sum(parts) for parts in zip(*changes, strict=True))
    if not np.isfinite(change):
        return None
    return float(np.sqrt(change / norm)) if norm else float(np.sqrt(change))


def _grown(store: RunStore, settings: Mapping[str, Any], subsets: Mapping[str, Any]) -> dict[str, grams.GrownGram]:
    """Return the Grams that were made before samples were added; their products need not be formed again."""
    known = store.grams.of_fewer(settings)
    return {
        key: grams.GrownGram(rows, _FewerSamples(store), store.grams.marker(key).get("float32_products", True) is True)
        for key, rows in known.items()
        if not set(store.gram_members[key]).intersection(subsets)
    }


@dataclass(frozen=True)
class _FewerSamples:
    """Reads a Gram as it was before the run grew; picklable for Dask workers."""

    store: RunStore

    def __call__(self, key: str) -> np.ndarray:
        return self.store.grams.read(key)[0]


class GramSink:
    """Checks a finished Gram against the norms seen while collecting and writes it; picklable for Dask workers."""

    def __init__(
        self, store: RunStore, settings: Mapping[str, Any], *, subsampled: frozenset[str], compare: bool = False
    ):
        self.settings, self.compare = dict(settings), compare
        self.store, self.subsampled, self.norms = store, subsampled, NormCheck(store, subsampled)

    def __call__(self, finished: grams.ParameterGram) -> tuple[str, float | None]:
        """Write a Gram; return its key and how far one that was there is from it, relatively.

        Raises:
            CorruptRunError: its diagonal is not what was seen while collecting.
        """
        name = finished.name
        self.norms.check(finished)
        difference = self._difference(finished) if self.compare else None
        moment = stored_moment(self.store, name, self.subsampled)
        self.store.grams.write(
            name, finished.gram, finished.mean_products, self.settings, moment, single=finished.single
        )
        runlog.event("gram", stage="grams", gram=name, samples=len(finished.gram))
        return name, difference

    def _difference(self, finished: grams.ParameterGram) -> float | None:
        """Return how far the Gram that is stored is from the new one, relatively."""
        try:
            old, _ = self.store.grams.read(finished.name)
        except CorruptRunError:
            return None
        if old.shape != finished.gram.shape:
            return None
        norm = float(np.linalg.norm(finished.gram))
        distance = float(np.linalg.norm(finished.gram - old))
        return distance / norm if norm else distance


@dataclass(frozen=True)
class _CheckedGram:
    """Checks a finished Gram and hands it back; picklable for Dask workers."""

    norms: NormCheck

    def __call__(self, finished: grams.ParameterGram) -> grams.ParameterGram:
        self.norms.check(finished)
        return finished


class NormCheck:
    """Holds the diagonals of Grams against the norms that were seen while collecting, which each process reads once.

    Args:
        store: of the run.
        subsampled: parameters of which some columns are drawn; their Grams have other diagonals.
    """

    def __init__(self, store: RunStore, subsampled: frozenset[str]) -> None:
        self.store, self.subsampled = store, subsampled
        self._lock = threading.Lock()
        self._squares: np.ndarray | None = None  # (N, K) float64

    def __reduce__(self) -> tuple[type[NormCheck], tuple[RunStore, frozenset[str]]]:
        return NormCheck, (self.store, self.subsampled)

    def check(self, finished: grams.ParameterGram) -> None:
        """Refuse a Gram whose diagonal is not what was seen while collecting.

        Raises:
            CorruptRunError: it names the samples.
        """
        store, members = self.store, self.store.gram_members[finished.name]
        if self.subsampled.intersection(members):
            return
        with self._lock:
            if self._squares is None:
                self._squares = store.samples.per_sample("squared_norm")
        expected = self._squares[:, [store.run.columns[member] for member in members]].sum(axis=1)
        wrong = np.flatnonzero(np.abs(finished.gram.diagonal() - expected) > store.rows.norm_tolerance * expected)
        if len(wrong):
            raise CorruptRunError(
                f"{store.path}: the stored rows of {finished.name} do not have the norms they were collected with "
                f"(samples {', '.join(map(str, wrong[:8]))}{' and more' if len(wrong) > 8 else ''}). "
                "`streamfisher verify` tells which chunks are affected."
            )
