"""`FisherSpectral`: the Fisher spectrum of a model on one batch, in one call.

The same engine as a stored run. `storage_mode` says where the gradient rows live meanwhile: 'full' on the model's
device, 'chunked' in host memory (`chunk_size` rows at a time on the device), 'streaming' in a Zarr run, temporary or
at `store_path`. The numbers are the same.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamfisher.analysis.facts import describe
from streamfisher.api import collect
from streamfisher.blocks.structures import assign_blocks, group_blocks
from streamfisher.collection.guard import OwnGuard
from streamfisher.collection.passes import run_pass
from streamfisher.collection.prepare import make_manifest
from streamfisher.collection.producers import model_producer
from streamfisher.collection.survey import survey
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import make_units
from streamfisher.data.samples import Samples
from streamfisher.errors import ConfigError, DataError
from streamfisher.gradients.producer import Wave
from streamfisher.reduction import gram as grams
from streamfisher.reduction.subsets import draw_columns
from streamfisher.results.spectrum import NORMALIZATION, Spectrum
from streamfisher.runtime.determinism import deterministic
from streamfisher.sinks.memory import MemoryRows, MemorySink
from streamfisher.solving.solve import Eigenproblem, RowPrecision, solve_blocks


class FisherSpectral:
    """Spectrum of the empirical Fisher `F = (1/N) G^T G` of a model on a batch.

    Gradients are taken in `eval()`: dropout is off and BatchNorm uses its running statistics, so that a sample's
    gradient does not depend on the other samples; the model's mode is restored. A sample's loss is the *sum* of its
    token losses.

    Args:
        config: every option; `None` means the defaults.
        gradient_cache: an object whose `per_sample_gradients`, where it is there and not empty, is used instead of the
            model: a list with one `{parameter name: tensor}` per sample.
    """

    def __init__(self, config: SpectralConfig | None = None, gradient_cache: Any = None):
        self.config = config or SpectralConfig()
        self.gradient_cache = gradient_cache

    def compute_fisher_spectrum(
        self,
        model: nn.Module | None,
        batch: Mapping[str, Tensor] | None,
        n_samples: int | None = None,
        block_structure: str | None = None,
        center_gradients: bool | None = None,
        precomputed_gradients: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Any]:
        """Return `{'global': metrics, 'per_block': {name: metrics}, 'metadata': facts}`.

        Args:
            model: any `nn.Module`; not needed where gradients are given.
            batch: `input_ids` (integers, or floats for a model that takes vectors), and optionally `attention_mask`,
                `labels` (default: the inputs) and whatever else the model takes, all with a common batch axis.
            n_samples: use the first so many; `None` means all.
            block_structure: 'layer', 'module', 'parameter' or 'none'; `None` means the config's.
            center_gradients: subtract the mean gradient (the covariance); `None` means the config's.
            precomputed_gradients: one `{parameter name: tensor}` per sample, instead of model and batch.

        Returns:
            The spectrum as plain values; every block's metrics are those of `BlockSpectrum.metrics`. Empty input or
            fewer than 2 samples give a warning and `per_block == {}`, with the reason in `metadata['error']`.

        Raises:
            StreamfisherError: whatever `collect` raises, except for empty input.
        """
        config = self.config.replace(
            block_structure=self.config.block_structure if block_structure is None else block_structure,
            center_gradients=self.config.center_gradients if center_gradients is None else center_gradients,
        )
        if config.project is not None and config.storage_mode != "streaming":
            raise ConfigError(
                f"project={config.project} makes a stored run smaller, and storage_mode={config.storage_mode!r} stores "
                "none; set storage_mode='streaming', or leave project out."
            )
        given = precomputed_gradients
        if given is None:
            given = getattr(self.gradient_cache, "per_sample_gradients", None) or None
        if given is not None:
            given = given[:n_samples]
            if len(given) < 2:
                return _empty(config, f"{len(given)} precomputed gradients were given; a spectrum needs at least 2")
            return _from_gradients(given, config).to_dict()
        size = _batch_size(batch)
        size = size if n_samples is None else min(n_samples, size)
        if model is None or size < 2:
            return _empty(
                config,
                "no model was given" if model is None else f"the batch has {size} samples; at least 2 are needed",
            )
        if config.storage_mode == "streaming":
            return _streamed(model, batch, size, config).to_dict()
        return _in_memory(model, batch, size, config).to_dict()


def _in_memory(model: nn.Module, batch: Any, n_samples: int, config: SpectralConfig) -> Spectrum:
    """Hold all rows in memory: on the model's device ('full'), or on the host, a chunk at a time ('chunked')."""
    if config.storage_mode == "full":
        config = config.replace(chunk_size=n_samples)
    with deterministic(config.use_deterministic, config.seed):
        data = survey(model, batch, config, n_samples=n_samples)
        with model_producer(model, data, config) as producer:
            manifest = make_manifest(model, producer, data, config, None, producer.probe())
            batches = data.batches(model, config)
            wave = Wave(0, tuple(producer.parameters), batches, tuple(batches))
            sink = MemorySink(producer, make_units(len(data.samples), config.chunk_size))
            producer.begin(wave)
            run_pass(
                producer,
                sink,
                wave,
                sink.todo(),
                guard=OwnGuard(producer, sink.parameters, config.guard_every),
                skip_nonfinite=config.on_nonfinite == "skip",
            )
        n_valid = len(data.samples) - len(sink.skipped)
        if n_valid < 2:
            raise DataError(f"{n_valid} of {len(data.samples)} samples are valid; a spectrum needs at least 2.")
        facts = describe(manifest, config, n_stored=len(data.samples), n_targets=sink.n_targets, skipped=sink.skipped)
        return _solve(sink.source(), config, facts)


def _streamed(model: nn.Module, batch: Any, n_samples: int, config: SpectralConfig) -> Spectrum:
    """Go through a Zarr run, kept at `store_path` or in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="streamfisher-") as folder:
        path = Path(config.store_path) if config.store_path else Path(folder) / "run.zarr"
        run = collect(model, batch, path, config=config, n_samples=n_samples)
        return run.spectrum(config.block_structure, config.center_gradients, config=config)


def _from_gradients(gradients: Sequence[Mapping[str, Tensor]], config: SpectralConfig) -> Spectrum:
    names = list(gradients[0])
    for index, sample in enumerate(gradients):
        if list(sample) != names and set(sample) != set(names):
            different = sorted(set(sample) ^ set(names))
            raise DataError(f"gradient {index} has other parameters than gradient 0: {', '.join(different[:5])}.")
    rows = {}
    for name in names:
        values = [torch.as_tensor(sample[name]).detach().reshape(-1) for sample in gradients]
        wide = any(value.dtype == torch.float64 for value in values)
        dtype = torch.float64 if wide else config.dtype_compute
        if len({value.numel() for value in values}) > 1:
            raise DataError(f"the gradients of {name} have different sizes: {sorted({v.numel() for v in values})}.")
        rows[name] = torch.stack([value.to("cpu", dtype) for value in values]).numpy()
        bad = np.flatnonzero(~np.isfinite(rows[name]).all(axis=1))
        if len(bad):
            raise DataError(f"gradient {bad[0]} is not finite in {name}.")
    facts = {
        "n_samples_stored": len(gradients),
        "sample_unit": config.sample_unit,
        "loss_reduction": "precomputed gradients",
        "seed": config.seed,
    }
    return _solve(MemoryRows(rows), config, facts)


def _solve(rows: MemoryRows, config: SpectralConfig, facts: Mapping[str, Any]) -> Spectrum:
    assignment = assign_blocks(rows.parameters, config.block_structure)
    subsets = draw_columns(rows.parameters, group_blocks(assignment), config.max_params_per_block, config.seed)
    finished = grams.build_grams(rows, config, _keep, subsets=subsets)
    by_name = {parameter.name: parameter.gram for parameter in finished}
    dtypes = {values.dtype for values in rows.rows.values()}
    computed = torch.float32 if np.dtype("float32") in dtypes else torch.float64
    problem = Eigenproblem(
        rows.parameters,
        assignment,
        config,
        center=config.center_gradients,
        precision=RowPrecision(computed, float(torch.finfo(computed).eps) / 2),
        metadata={**facts, "n_samples": rows.n_samples, "block_structure": config.block_structure},
        single=[name for name, size in rows.parameters.items() if size >= grams.WIDE],
        layers=assign_blocks(rows.parameters, "layer"),
    )
    return solve_blocks(by_name.__getitem__, problem)


def _keep(parameter: grams.ParameterGram) -> grams.ParameterGram:
    return parameter


def _batch_size(batch: Mapping[str, Tensor] | None) -> int:
    return (
        len(Samples(batch)) if batch and any(torch.as_tensor(v).numel() for v in batch.values() if v is not None) else 0
    )


def _empty(config: SpectralConfig, reason: str) -> dict[str, Any]:
    warnings.warn(f"empty Fisher spectrum: {reason}.", stacklevel=3)
    return {
        "global": {},
        "per_block": {},
        "metadata": {
            "error": reason,
            "n_samples": 0,
            "sample_unit": config.sample_unit,
            "normalization": NORMALIZATION[config.center_gradients],
        },
    }
