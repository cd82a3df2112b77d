"""A stored run, re-examined: any block structure, centered or not, any subset of samples, without the model."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.analysis.block_grams import stored_gram
from streamfisher.analysis.direction_analyses import DirectionAnalyses
from streamfisher.analysis.facts import describe
from streamfisher.config import SpectralConfig
from streamfisher.reduction import gram as grams
from streamfisher.reduction.stored_grams import build_stored_grams
from streamfisher.results.notebook import run_html
from streamfisher.runtime.run_log import RunLog
from streamfisher.solving.selection import select
from streamfisher.store import RunLock, RunStore


class StoredRun(DirectionAnalyses):
    """A run on disk, opened for looking: everything that needs no model."""

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

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Return `{parameter name: number of elements}` of the captured parameters."""
        return {item["name"]: math.prod(item["shape"]) for item in self.manifest.parameters}

    @property
    def losses(self) -> np.ndarray:
        """Return the per-sample losses, (N,) float64."""
        return self.store.samples.per_sample("loss")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, N={self.n_samples}, P={sum(self.parameters.values())})"

    def _repr_html_(self) -> str:
        return run_html(self)

    def build_grams(self, config: SpectralConfig | None = None, *, progress: bool = False) -> list[str]:
        """Build the Grams that are missing; return the keys (names of parameters, by default) of those that were built.

        Args:
            config: precision, workers and memory budget; `None` means those the run was made with.
            progress: show a bar.

        Raises:
            RunError: the run is not fully collected, or another process is writing it.
            CorruptRunError: stored rows are missing or do not have the norms they were collected with.
        """
        config = self.config if config is None else SpectralConfig.of(config)
        self.store.markers.require_collected()
        done = self.store.grams.done(grams.gram_settings(config))
        return list(self._build([key for key in self.store.gram_members if key not in done], config, progress=progress))

    def rebuild_grams(self, config: SpectralConfig | None = None, *, progress: bool = False) -> dict[str, float | None]:
        """Build every Gram again from the stored rows and say whether it agrees with the one that was there.

        Args:
            config: precision, workers and memory budget; `None` means those the run was made with.
            progress: show a bar.

        Returns:
            Gram key -> `|new - old| / |new|` (Frobenius); `None` where there was none, or it could not be read.

        Raises:
            RunError: the run is not fully collected, or another process is writing it.
            CorruptRunError: stored rows are missing or do not have the norms they were collected with.
        """
        self.store.markers.require_collected()
        return self._build(
            list(self.store.gram_members),
            self.config if config is None else SpectralConfig.of(config),
            rebuild=True,
            progress=progress,
        )

    def _build(
        self, keys: list[str], config: SpectralConfig, *, rebuild: bool = False, progress: bool = False
    ) -> dict[str, float | None]:
        if not keys:
            return {}
        self.store.fsync = config.fsync
        with RunLock(self.path), RunLog(self.path, "grams", grams=len(keys)):
            before = self._versions_of_grams()
            try:
                return build_stored_grams(self.store, config, keys, rebuild=rebuild, progress=progress)
            finally:
                if self._versions_of_grams() != before:
                    self.store.named.clear()  # spectra there are of other Grams

    def _versions_of_grams(self) -> set[tuple[str, int, int]]:
        """Return what tells a Gram's marker from another one that takes its place."""
        found = ((path.name, path.stat()) for path in (self.path / "done").glob("gram-*.json"))
        return {(name, facts.st_ino, facts.st_mtime_ns) for name, facts in found}

    def gram(self, name: str, *, center: bool = False) -> np.ndarray:
        """Return the Gram of one parameter's rows over the valid samples, (n, n) float64."""
        chosen = select(self.n_samples, self.store.samples.per_sample("valid") == 1)
        K = chosen.restrict(stored_gram(self.store.grams, name, center))
        return chosen.center(K) if center else K

    def metadata(self, config: SpectralConfig | None = None) -> dict[str, Any]:
        """Return the facts that a result of this run must carry: what N counts, what was left out, and of what."""
        valid = self.store.samples.per_sample("valid") == 1
        return describe(
            self.manifest,
            self.config if config is None else SpectralConfig.of(config),
            n_stored=self.n_samples,
            n_targets=int(self.store.samples.per_sample("n_targets")[valid].sum()),
            skipped=self.store.samples.skipped(),
        )

    def info(self) -> dict[str, Any]:
        """Return what the run holds and how far it is, as plain JSON values."""
        store = self.store
        done = store.markers.finished_units()
        samples_done = sum(len(unit) for unit in store.units if unit.index in done)
        return {
            "path": str(self.path),
            "format_version": self.manifest.format_version,
            "n_samples": self.n_samples,
            "samples_done": samples_done,
            "complete": samples_done == self.n_samples,
            "grams_done": len(store.grams.done(grams.gram_settings(self.config))),
            "n_grams": len(store.gram_members),
            "n_parameters": len(self.parameters),
            "n_waves": len(store.waves),
            "gradients_deleted": [name for name in self.parameters if store.kept.is_deleted(name)],
            "factored_parameters": [name for name in self.parameters if store.rows.representation(name) == "factors"],
            "total_params": sum(self.parameters.values()),
            "projected_parameters": [name for name, size in self.parameters.items() if store.parameters[name] < size],
            "bytes_on_disk": store.bytes_on_disk(),
            "config": dict(self.manifest.config),
            "model": dict(self.manifest.model),
            "data": {key: value for key, value in self.manifest.data.items() if key != "chunk_digests"},
            "loss": dict(self.manifest.loss),
            "layout": dict(self.manifest.layout),
            "probe": dict(self.manifest.probe),
            "excluded": dict(self.manifest.excluded),
            "skipped": {str(sample): reason for sample, reason in store.samples.skipped().items()},
            "versions": dict(self.manifest.versions),
        }
