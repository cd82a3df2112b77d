"""A stored run, re-examined: any block structure, centered or not, any subset of samples, without the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamfisher import gram as grams
from streamfisher import spectrum as spectra
from streamfisher.blocks import assign_blocks, group_blocks
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.errors import CorruptRunError, DataError
from streamfisher.spectrum import Spectrum
from streamfisher.store import Manifest, RunLock, RunStore, versions


class Run:
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

    def build_grams(
        self, config: SpectralConfig | None = None, *, rebuild: bool = False, progress: bool = False
    ) -> list[str]:
        """Build the Grams that are missing, one per parameter; return the names of those that were built.

        Args:
            config: precision, workers and memory budget; `None` means those the run was made with.
            rebuild: build all of them again.
            progress: show a bar.

        Raises:
            RunError: the run is not fully collected, or another process is writing it.
            CorruptRunError: stored rows are missing or do not have the norms they were collected with.
        """
        config = config or self.config
        self.store.require_rows()
        settings = grams.gram_settings(config)
        missing = [name for name in self.parameters if rebuild or name not in self.store.grams_done(settings)]
        if not missing:
            return []
        blocks = group_blocks(assign_blocks(self.parameters, config.block_structure))
        subsets = grams.draw_columns(self.parameters, blocks, config.max_params_per_block, config.seed)
        with RunLock(self.path):
            sink = _GramSink(self.store, settings, subsampled=frozenset(subsets))
            grams.build_grams(self.store, config, sink, names=missing, subsets=subsets, progress=progress)
        return missing

    def gram(self, name: str, *, center: bool = False) -> np.ndarray:
        """Return the Gram of one parameter's rows over the valid samples, (n, n) float64."""
        return _subset(self._stored_gram(name, center), self._selection(None), center)

    def spectrum(
        self,
        block_structure: str | Mapping[str, str] | None = None,
        center: bool | None = None,
        samples: slice | Sequence[int] | np.ndarray | None = None,
        top_k: int | None = None,
        *,
        config: SpectralConfig | None = None,
        progress: bool = False,
    ) -> Spectrum:
        """Solve the run under a block structure.

        Args:
            block_structure: 'layer', 'module', 'parameter', 'none', or a mapping from glob pattern to block key; `None`
                means the run's own.
            center: the covariance of gradients instead of the Fisher; `None` means the run's own.
            samples: a slice, indices or a boolean mask over the N samples; `None` means all that are valid.
            top_k: list the largest `top_k` eigenvalues of each block only (the trace stays exact).
            config: solver and Gram options; `None` means those the run was made with.
            progress: show a bar while Grams are built.

        Raises:
            ConfigError: the structure is unknown.
            DataError: fewer than 2 samples are selected.
            RunError: the run is not fully collected.
            CorruptRunError: something stored is missing or altered.
        """
        config = config or self.config
        structure = config.block_structure if block_structure is None else block_structure
        center = config.center_gradients if center is None else center
        assignment = assign_blocks(self.parameters, structure)
        selection = self._selection(samples)
        self.build_grams(config, progress=progress)
        metadata = self.metadata(config) | {"n_samples": len(selection)}
        if samples is not None:
            metadata["samples"] = f"{len(selection)} selected of {self.n_samples}"
        return solve_blocks(
            lambda name: self._stored_gram(name, center)[np.ix_(selection, selection)],
            self.parameters,
            assignment,
            config,
            center=center,
            precision=RowPrecision(self.store.row_dtype, self.store.unit_roundoff),
            metadata=metadata | {"block_structure": structure if isinstance(structure, str) else dict(structure)},
            top_k=top_k,
        )

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

    def _selection(self, samples: slice | Sequence[int] | np.ndarray | None) -> np.ndarray:
        """Return the numbers of the valid samples that are selected, ascending."""
        everything = np.arange(self.n_samples)
        if samples is None:
            selected = everything
        elif isinstance(samples, slice):
            selected = everything[samples]
        else:
            chosen = np.asarray(samples)
            if chosen.dtype == bool and chosen.shape != (self.n_samples,):
                raise DataError(f"a mask over samples must have {self.n_samples} entries, not {chosen.shape}.")
            if (
                chosen.dtype != bool
                and chosen.size
                and not -self.n_samples <= chosen.min() <= chosen.max() < self.n_samples
            ):
                raise DataError(
                    f"sample {chosen.max()} was selected and the run has samples 0 to {self.n_samples - 1}."
                )
            selected = np.unique(everything[chosen])
        valid = self.store.per_sample("valid") == 1
        selected = selected[valid[selected]]
        if len(selected) < 2:
            raise DataError(f"{len(selected)} valid samples are selected; a spectrum needs at least 2.")
        return selected

    def _stored_gram(self, name: str, center: bool) -> np.ndarray:
        """Return the Gram of all rows; where rows are stored centered, with the mean put back unless `center`."""
        gram, mean_products = self.store.read_gram(name)
        if mean_products is not None and not center:
            return spectra.uncenter(gram, mean_products)
        return gram


class _GramSink:
    """Checks a finished Gram against the norms seen while collecting and writes it; picklable for Dask workers."""

    def __init__(self, store: RunStore, settings: Mapping[str, Any], *, subsampled: frozenset[str]):
        self.store, self.settings, self.subsampled = store, dict(settings), subsampled

    def __call__(self, finished: grams.ParameterGram) -> str:
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
        self.store.write_gram(name, finished.gram, finished.mean_products, self.settings)
        return name


@dataclass(frozen=True)
class RowPrecision:
    """How exact gradient rows are."""

    computed: torch.dtype  # they were computed in it
    roundoff: float  # and then held with this unit roundoff


def describe(
    manifest: Manifest, config: SpectralConfig, *, n_stored: int, n_targets: int, skipped: Mapping[int, str]
) -> dict[str, Any]:
    """Return the facts that every result carries, as plain JSON values.

    Args:
        manifest: of the run.
        config: options of the analysis.
        n_stored: samples that were asked for, skipped ones included.
        n_targets: target tokens of the valid samples.
        skipped: sample number -> why it does not count.
    """
    return {
        "n_samples_stored": n_stored,
        "n_target_tokens": n_targets,
        **{key: manifest.data[key] for key in ("sample_unit", "n_sequences") if key in manifest.data},
        "labels": manifest.config["labels"],
        **manifest.loss,
        "model_mode": "eval",
        "skipped_samples": {str(sample): reason for sample, reason in skipped.items()},
        "excluded_parameters": dict(manifest.excluded),
        "coverage_parameters": manifest.probe.get("coverage_parameters"),
        "coverage_squared_norm": manifest.probe.get("coverage_squared_norm"),
        "dtype_row": manifest.layout["dtype_row"],
        "dtype_store": manifest.layout["dtype_store"],
        "stored_centered": manifest.layout["centered"],
        "model": dict(manifest.model),
        "data_fingerprint": manifest.data["fingerprint"],
        "seed": config.seed,
        "collected_with": dict(manifest.versions),
    }


def solve_blocks(
    gram_of: Callable[[str], np.ndarray],
    parameters: Mapping[str, int],
    assignment: Mapping[str, str],
    config: SpectralConfig,
    *,
    center: bool,
    precision: RowPrecision,
    metadata: Mapping[str, Any],
    top_k: int | None = None,
) -> Spectrum:
    """Add the Grams of each block, solve it, and put the whole together.

    Only one block's Gram, one parameter's, and the running sum of all are alive at a time.

    Args:
        gram_of: parameter name -> (N, N) float64 Gram.
        parameters: number of elements of each parameter.
        assignment: block key of each parameter.
        config: solver options.
        center: take the covariance.
        precision: of the rows.
        metadata: goes into the result.
        top_k: list only the largest eigenvalues of each block.
    """
    product = torch.float64 if precision.computed == torch.float64 else config.dtype_gram
    blocks: dict[str, spectra.BlockSpectrum] = {}
    whole: np.ndarray | None = None
    squared, dominance = 0.0, 0.0
    for key, names in group_blocks(assignment).items():
        K = _sum(gram_of(name) for name in names)
        if center:
            raw_trace = float(np.trace(K))
            K = spectra.center(K)
            centered_trace = float(np.trace(K))
            if centered_trace > 0:
                dominance = max(dominance, len(K) * (raw_trace - centered_trace) / centered_trace)
        squared += float(np.vdot(K, K))
        whole = K.copy() if whole is None else whole + K
        n_params = sum(parameters[name] for name in names)
        blocks[key] = spectra.block_spectrum(
            key, K, n_params, config, product=product, roundoff=precision.roundoff, top_k=top_k
        )
    assert whole is not None  # a run has at least one parameter
    if product == torch.float32 and dominance > spectra.MEAN_DOMINANCE_LIMIT:
        warnings.warn(
            f"the mean gradient dominates (N |mean|^2 / trace = {dominance:.1e}): centering the Gram loses digits. "
            "Collect with store_centered=True and float32 or float64 rows for an accurate tail.",
            stacklevel=2,
        )
    facts = {
        **metadata,
        "centered": center,
        "normalization": spectra.NORMALIZATION[center],
        "block_diagonal_error": spectra.block_diagonal_error(squared, float(np.vdot(whole, whole))),
        **({"mean_dominance": dominance} if center else {}),
        "dtype_gram": dtype_name(product),
        "dtype_eigensolve": dtype_name(config.dtype_eigensolve),
        "parameter_subsampling": config.max_params_per_block,
        "analysed_with": versions(),
    }
    backward_noise = spectra.backward_noise(precision.computed, float(np.trace(whole)) / len(whole))
    blocks = {key: block.with_floor(backward_noise) for key, block in blocks.items()}
    return Spectrum(blocks, spectra.union(blocks, config.top_k_eigenvalues), facts)


def open_run(path: str | Path) -> Run:
    """Open a stored run for reading.

    Raises:
        RunError: the folder does not exist or is not a run.
        CorruptRunError: its manifest is damaged or of another format version.
    """
    return Run(path)


def _sum(matrices: Iterable[np.ndarray]) -> np.ndarray:
    """Add matrices in the order given, holding two at a time."""
    total: np.ndarray | None = None
    for matrix in matrices:
        if total is None:
            total = np.array(matrix)
        else:
            total += matrix
    assert total is not None  # a block has at least one parameter
    return total


def _subset(K: np.ndarray, selection: np.ndarray, center: bool) -> np.ndarray:
    K = K[np.ix_(selection, selection)]
    return spectra.center(K) if center else K
