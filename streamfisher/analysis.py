"""A stored run, re-examined: any block structure, centered or not, any subset of samples, without the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from streamfisher import gram as grams
from streamfisher.analyses import Analyses
from streamfisher.blockgrams import stored_gram
from streamfisher.blocks import assign_blocks, group_blocks
from streamfisher.config import SpectralConfig
from streamfisher.errors import CorruptRunError
from streamfisher.moment import moment_of
from streamfisher.selection import select
from streamfisher.solve import RowPrecision, describe, solve_blocks
from streamfisher.store import RunLock, RunStore
from streamfisher.store.layout import TILE
from streamfisher.store.tiled import StoredTiles
from streamfisher.tiled_solve import budget_of
from streamfisher.tiles import build_tiled_grams, needs_tiles, whole_bytes

__all__ = ["RowPrecision", "Run", "describe", "open_run", "solve_blocks"]


class Run(Analyses):
    """An open run: what `collect` and `open_run` return."""

    def __init__(self, path: str | Path):
        self.store = RunStore(path)
        self.manifest = self.store.manifest
        self.config = SpectralConfig.from_dict(self.manifest.config)

    @property
    def path(self) -> Path:
        """Return the run's folder."""
        return self.store.path

    @property
    def n_samples(self) -> int:
        """Return N, counting skipped samples too."""
        return self.store.n_samples

    @property
    def parameters(self) -> dict[str, int]:
        """Return `{parameter name: number of elements}` of the captured parameters."""
        return dict(self.store.parameters)

    @property
    def losses(self) -> np.ndarray:
        """Return the per-sample losses, (N,) float64."""
        return self.store.per_sample("loss")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, N={self.n_samples}, P={sum(self.parameters.values())})"

    def _repr_html_(self) -> str:
        from streamfisher.html_report import run_html

        return run_html(self)

    def add(
        self,
        model: nn.Module,
        samples: Any,
        *,
        loss: Callable[..., Any] | None = None,
        n_samples: int | None = None,
        progress: bool = False,
    ) -> Run:
        """Compute the gradients of further samples into this run; return it, opened again.

        Args:
            model: the model the run was made with.
            samples: all samples, those of the run first; what is new is what comes after them.
            loss: the same as when the run was made.
            n_samples: how many to use, from the first; `None` means all.
            progress: show a bar.

        Raises:
            RunMismatchError: model or first samples are not those of the run, or its rows are stored centered.
        """
        from streamfisher.collect import collect  # the one place where analysis asks for more data

        return collect(model, samples, self.path, config=self.config, loss=loss, n_samples=n_samples, progress=progress)

    def build_grams(self, config: SpectralConfig | None = None, *, progress: bool = False) -> list[str]:
        """Build the Grams that are missing, one per parameter; return the names of those that were built.

        Args:
            config: precision, workers and memory budget; `None` means those the run was made with.
            progress: show a bar.

        Raises:
            RunError: the run is not fully collected, or another process is writing it.
            CorruptRunError: stored rows are missing or do not have the norms they were collected with.
        """
        config = config or self.config
        self.store.require_rows()
        settings = grams.gram_settings(config)
        done = self.store.grams_done(settings)
        return list(self._build([name for name in self.parameters if name not in done], config, progress=progress))

    def rebuild_grams(self, config: SpectralConfig | None = None, *, progress: bool = False) -> dict[str, float | None]:
        """Build every Gram again from the stored rows and say whether it agrees with the one that was there.

        Args:
            config: precision, workers and memory budget; `None` means those the run was made with.
            progress: show a bar.

        Returns:
            Parameter -> `|new - old| / |new|` (Frobenius); `None` where there was none, or it could not be read.

        Raises:
            RunError: the run is not fully collected, or another process is writing it.
            CorruptRunError: stored rows are missing or do not have the norms they were collected with.
        """
        self.store.require_rows()
        return self._build(list(self.parameters), config or self.config, rebuild=True, progress=progress)

    def _build(
        self, names: list[str], config: SpectralConfig, *, rebuild: bool = False, progress: bool = False
    ) -> dict[str, float | None]:
        if not names:
            return {}
        settings = grams.gram_settings(config)
        blocks = group_blocks(assign_blocks(self.parameters, config.block_structure))
        subsets = grams.draw_columns(self.parameters, blocks, config.max_params_per_block, config.seed)
        budget = budget_of(config)
        widest = max(self.store.chunk_columns(name) for name in names)
        with RunLock(self.path):
            if needs_tiles(self.n_samples, budget, widest):
                return self._build_tiles(names, config, subsets, budget, rebuild=rebuild, progress=progress)
            if config.n_workers is None:  # fewer workers where not all have room for a sum of their own
                each = whole_bytes(self.n_samples, 1)
                config = config.replace(n_workers=max(1, min(len(os.sched_getaffinity(0)), budget // each)))
            sink = _GramSink(self.store, settings, subsampled=frozenset(subsets), compare=rebuild)
            grown = {} if rebuild or config.use_deterministic else self._grown(settings, subsets)
            built = grams.build_grams(
                self.store, config, sink, names=names, subsets=subsets, grown=grown, progress=progress
            )
        return dict(built)

    def _build_tiles(
        self,
        names: list[str],
        config: SpectralConfig,
        subsets: Mapping[str, grams.ColumnSubset],
        budget: int,
        *,
        rebuild: bool,
        progress: bool,
    ) -> dict[str, float | None]:
        """Build Grams that are larger than the memory, see `tiles`."""
        keys = {name: [name] for name in names}
        old = {name for name in names if rebuild and self.store.has_gram(name)}
        sink = StoredTiles(
            self.store, grams.gram_settings(config), keys, subsampled=frozenset(subsets), rebuild=rebuild, size=TILE
        )
        built = build_tiled_grams(
            self.store, config, sink, keys, budget=budget, subsets=subsets, size=TILE, progress=progress
        )
        for name in names:
            keep_moment(self.store, name, frozenset(subsets))
        return {name: _relative_change(built[name]) if name in old else None for name in names}

    def _grown(self, settings: Mapping[str, Any], subsets: Mapping[str, Any]) -> dict[str, grams.GrownGram]:
        """Return the Grams that were made before samples were added; their products need not be formed again."""
        known = self.store.grams_of_fewer(settings)
        return {
            name: grams.GrownGram(rows, _FewerSamples(self.store))
            for name, rows in known.items()
            if name not in subsets
        }

    def gram(self, name: str, *, center: bool = False) -> np.ndarray:
        """Return the Gram of one parameter's rows over the valid samples, (n, n) float64."""
        chosen = select(self.n_samples, self.store.per_sample("valid") == 1)
        K = chosen.restrict(stored_gram(self.store, name, center))
        return chosen.center(K) if center else K

    def metadata(self, config: SpectralConfig | None = None) -> dict[str, Any]:
        """Return the facts that a result of this run must carry: what N counts, what was left out, and of what."""
        valid = self.store.per_sample("valid") == 1
        return describe(
            self.manifest,
            config or self.config,
            n_stored=self.n_samples,
            n_targets=int(self.store.per_sample("n_targets")[valid].sum()),
            skipped=self.store.skipped(),
        )

    def info(self) -> dict[str, Any]:
        """Return what the run holds and how far it is, as plain JSON values."""
        store = self.store
        done = store.done_units()
        samples_done = sum(len(unit) for unit in store.units if unit.index in done)
        return {
            "path": str(self.path),
            "format_version": self.manifest.format_version,
            "n_samples": self.n_samples,
            "samples_done": samples_done,
            "complete": samples_done == self.n_samples,
            "grams_done": len(store.grams_done(grams.gram_settings(self.config))),
            "n_parameters": len(self.parameters),
            "total_params": sum(self.parameters.values()),
            "bytes_on_disk": store.bytes_on_disk(),
            "config": dict(self.manifest.config),
            "model": dict(self.manifest.model),
            "data": {key: value for key, value in self.manifest.data.items() if key != "chunk_digests"},
            "loss": dict(self.manifest.loss),
            "layout": dict(self.manifest.layout),
            "probe": dict(self.manifest.probe),
            "excluded": dict(self.manifest.excluded),
            "skipped": {str(sample): reason for sample, reason in store.skipped().items()},
            "versions": dict(self.manifest.versions),
        }


@dataclass(frozen=True)
class _FewerSamples:
    """Reads a parameter's Gram as it was before the run grew; picklable for Dask workers."""

    store: RunStore

    def __call__(self, name: str) -> np.ndarray:
        return self.store.read_gram(name)[0]


class _GramSink:
    """Checks a finished Gram against the norms seen while collecting and writes it; picklable for Dask workers."""

    def __init__(
        self, store: RunStore, settings: Mapping[str, Any], *, subsampled: frozenset[str], compare: bool = False
    ):
        self.store, self.settings, self.subsampled, self.compare = store, dict(settings), subsampled, compare

    def __call__(self, finished: grams.ParameterGram) -> tuple[str, float | None]:
        name = finished.name
        if name not in self.subsampled:
            column = list(self.store.parameters).index(name)
            expected = self.store.per_sample("squared_norm")[:, column]
            found = finished.gram.diagonal()
            tolerance = self.store.norm_tolerance
            wrong = np.flatnonzero(np.abs(found - expected) > tolerance * expected)
            if len(wrong):
                raise CorruptRunError(
                    f"{self.store.path}: the stored rows of {name} do not have the norms they were collected with "
                    f"(samples {', '.join(map(str, wrong[:8]))}{' and more' if len(wrong) > 8 else ''}). "
                    "`streamfisher verify` tells which chunks are affected."
                )
        difference = self._difference(finished) if self.compare else None
        self.store.write_gram(name, finished.gram, finished.mean_products, self.settings)
        keep_moment(self.store, name, self.subsampled)
        return name, difference

    def _difference(self, finished: grams.ParameterGram) -> float | None:
        """Return how far the Gram that is stored is from the new one, relatively."""
        try:
            old, _ = self.store.read_gram(finished.name)
        except CorruptRunError:
            return None
        if old.shape != finished.gram.shape:
            return None
        norm = float(np.linalg.norm(finished.gram))
        distance = float(np.linalg.norm(finished.gram - old))
        return distance / norm if norm else distance


def keep_moment(store: RunStore, name: str, subsampled: frozenset[str]) -> None:
    """Write the second moment of a parameter that has fewer elements than there are samples."""
    if name not in subsampled and store.parameters[name] < store.n_samples:
        valid = store.per_sample("valid") == 1
        store.write_moment(name, moment_of(store, name, store.parameters[name], valid))


def _relative_change(changes: list[tuple[float, float]]) -> float | None:
    """Return `|new - old| / |new|` from the squared norms of the tiles; `None` where the old one was not finite."""
    change, norm = (sum(parts) for parts in zip(*changes, strict=True))
    if not np.isfinite(change):
        return None
    return float(np.sqrt(change / norm)) if norm else float(np.sqrt(change))


def open_run(path: str | Path) -> Run:
    """Open a stored run for reading.

    Raises:
        RunError: the folder does not exist or is not a run.
        CorruptRunError: its manifest is damaged or of another format version.
    """
    return Run(path)
