"""`FisherSpectral`: the Fisher spectrum of a model on one batch, in one call.

The same engine as a stored run. `storage_mode` says where the gradient rows live meanwhile: 'full' on the model's
device, 'chunked' in host memory (`chunk_size` rows at a time on the device), 'streaming' in a Zarr run, temporary or
at `store_path`. The numbers are the same.
"""

from __future__ import annotations

import dataclasses
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
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.config.kinds import optional, whole
from streamfisher.data.batches import make_units
from streamfisher.data.samples import Samples
from streamfisher.errors import ConfigError, DataError, NonFiniteError
from streamfisher.gradients.producer import GradientProducer, Wave
from streamfisher.models.dtypes import in_dtype
from streamfisher.planning.representation import choose_representation
from streamfisher.reduction import gram as grams
from streamfisher.reduction.subsets import draw_columns
from streamfisher.results.spectrum import NORMALIZATION, Spectrum
from streamfisher.runtime.caller_state import modes_of_its_own
from streamfisher.runtime.determinism import deterministic
from streamfisher.sinks.memory import MemoryRows, MemorySink
from streamfisher.solving.blocksolver import empty_block
from streamfisher.solving.combine import union
from streamfisher.solving.solve import Eigenproblem, RowPrecision, solve_blocks
from streamfisher.version import versions


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
            The spectrum as plain values; every block's metrics are those of `BlockSpectrum.metrics`. Empty input, fewer
            than 2 samples, or (with `on_nonfinite='skip'`) fewer than 2 with a finite gradient give a warning and
            `per_block == {}`, with the reason in `metadata['error']` and every key of `global` as ever.

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
        n_samples = optional(whole(0)).check("n_samples", n_samples)
        given = precomputed_gradients
        if given is None:
            given = getattr(self.gradient_cache, "per_sample_gradients", None) or None
        if given is not None:
            requested = len(given) if n_samples is None else n_samples
            given = given[:n_samples]
            if len(given) < 2:
                reason = f"{len(given)} precomputed gradients were given; a spectrum needs at least 2"
                return _empty(config, reason, requested)
            return _with_options(_from_gradients(given, config).to_dict(), config, requested)
        if not isinstance(batch, Mapping | None):
            raise DataError(
                f"batch is a {type(batch).__name__}; it must be one dict of batched tensors. Datasets, DataLoaders and "
                "iterators are for streamfisher.collect."
            )
        batch = None if batch is None else _tensors_of(batch)
        size = _batch_size(batch)
        requested = size if n_samples is None else n_samples
        size = min(requested, size)
        if model is None or size < 2:
            reason = "no model was given" if model is None else f"the batch has {size} samples; at least 2 are needed"
            return _empty(config, reason, requested)
        compute = _streamed if config.storage_mode == "streaming" else _in_memory
        try:
            return _with_options(compute(model, batch, size, config).to_dict(), config, requested)
        except NonFiniteError as error:
            if config.on_nonfinite != "skip":
                raise
            return _empty(config, f"{str(error).rstrip('.')}; at least 2 samples are needed", requested)


@modes_of_its_own()
def _in_memory(model: nn.Module, batch: Any, n_samples: int, config: SpectralConfig) -> Spectrum:
    """Hold all rows in memory: on the model's device ('full'), or on the host, a chunk at a time ('chunked')."""
    if config.storage_mode == "full":
        config = config.replace(chunk_size=n_samples)
    model = in_dtype(model, config.dtype_model)
    with deterministic(config.use_deterministic, config.seed):
        data = survey(model, batch, config, n_samples=n_samples)
        with model_producer(model, data, config) as producer:
            manifest = make_manifest(model, producer, data, config, None, producer.probe())
            batches = data.batches(model, config)
            wave = Wave(0, tuple(producer.parameters), batches, tuple(batches))
            sink = MemorySink(producer, make_units(len(data.samples), config.chunk_size), _factored(producer, config))
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
            raise NonFiniteError(f"{n_valid} of {len(data.samples)} samples have finite gradients.")
        facts = describe(manifest, config, n_stored=len(data.samples), n_targets=sink.n_targets, skipped=sink.skipped)
        return _solve(sink.source(), config, facts)


def _factored(producer: GradientProducer, config: SpectralConfig) -> list[str]:
    """Return the parameters whose factors are smaller than their rows."""
    if config.representation == "dense" or config.max_params_per_block is not None:
        return []
    shapes, _ = producer.shapes()
    chosen = choose_representation(shapes, config.representation, row_itemsize=producer.row_dtype.itemsize)
    return [name for name, held in chosen.items() if held == "factors"]


def _streamed(model: nn.Module, batch: Any, n_samples: int, config: SpectralConfig) -> Spectrum:
    """Go through a Zarr run, kept at `store_path` or in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="streamfisher-") as folder:
        path = Path(config.store_path) if config.store_path else Path(folder) / "run.zarr"
        run = collect(model, batch, path, config=config, n_samples=n_samples)
        return run.spectrum(config.block_structure, config.center_gradients, config=config)


def _from_gradients(gradients: Sequence[Mapping[str, Tensor]], config: SpectralConfig) -> Spectrum:
    """Solve gradients that were computed elsewhere; each block of the samples that have it, wholly."""
    names = list(dict.fromkeys(name for sample in gradients for name in sample))
    facts = {
        "n_samples_stored": len(gradients),
        "sample_unit": config.sample_unit,
        "loss_reduction": "precomputed gradients",
        "seed": config.seed,
    }
    holders = _holders(gradients, group_blocks(assign_blocks(names, config.block_structure)))
    if all(len(numbers) == len(gradients) for numbers in holders.values()):
        return _solve(_rows_of(gradients, names, range(len(gradients)), config), config, facts)
    assignment = assign_blocks(names, config.block_structure)
    parts = {
        key: _solve(
            _rows_of(gradients, [name for name in names if assignment[name] == key], numbers, config), config, facts
        )
        for key, numbers in holders.items()
    }
    return _together(parts, len(gradients), config)


def _holders(gradients: Sequence[Mapping[str, Tensor]], blocks: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Return block -> the samples that have its parameters.

    Raises:
        DataError: a sample has part of a block, or fewer than 2 have one.
    """
    holders: dict[str, list[int]] = {key: [] for key in blocks}
    for key, members in blocks.items():
        for index, sample in enumerate(gradients):
            held = {name for name in members if name in sample}
            if not held:
                continue
            holders[key].append(index)
            first = holders[key][0]
            if different := sorted(held ^ {name for name in members if name in gradients[first]}):
                raise DataError(
                    f"gradient {index} has other parameters of the block {key} than gradient {first}: "
                    f"{', '.join(different[:5])}. A sample has all parameters of a block, or none."
                )
    for key, numbers in holders.items():
        if len(numbers) < 2:
            raise DataError(f"{len(numbers)} of {len(gradients)} gradients have the block {key}; 2 are needed.")
    return holders


def _together(parts: Mapping[str, Spectrum], n_samples: int, config: SpectralConfig) -> Spectrum:
    """Put blocks of different samples together: each has an N of its own, and nothing is known between them."""
    blocks = {key: part.blocks[key] for key, part in parts.items()}
    whole = dataclasses.replace(union(blocks, config.top_k_eigenvalues), n_samples=n_samples)
    first = next(iter(parts.values()))
    unreached = [name for part in parts.values() for name in part.metadata.get("parameters_without_gradient", [])]
    metadata = {
        **first.metadata,
        "n_samples": n_samples,
        "n_samples_per_block": {key: block.n_samples for key, block in blocks.items()},
        "block_diagonal_error": None,
        **({"parameters_without_gradient": unreached} if unreached else {}),
    }
    return Spectrum(blocks, whole, metadata)


def _rows_of(
    gradients: Sequence[Mapping[str, Tensor]], names: Sequence[str], numbers: Sequence[int], config: SpectralConfig
) -> MemoryRows:
    """Return the gradients of some samples as rows.

    Raises:
        DataError: sizes differ, or a gradient is not finite.
    """
    rows = {}
    for name in names:
        values = [torch.as_tensor(gradients[number][name]).detach().reshape(-1) for number in numbers]
        if any(value.is_meta for value in values):
            raise DataError(f"the gradients of {name} are on the meta device and have no values.")
        wide = any(value.dtype == torch.float64 for value in values)
        dtype = torch.float64 if wide else config.dtype_compute
        if len({value.numel() for value in values}) > 1:
            raise DataError(f"the gradients of {name} have different sizes: {sorted({v.numel() for v in values})}.")
        rows[name] = torch.stack([value.to("cpu", dtype) for value in values]).numpy()
        bad = np.flatnonzero(~np.isfinite(rows[name]).all(axis=1))
        if len(bad):
            raise DataError(f"gradient {numbers[bad[0]]} is not finite in {name}.")
    return MemoryRows(rows)


def _solve(rows: MemoryRows, config: SpectralConfig, facts: Mapping[str, Any]) -> Spectrum:
    assignment = assign_blocks(rows.parameters, config.block_structure)
    subsets = draw_columns(rows.parameters, group_blocks(assignment), config.max_params_per_block, config.seed)
    finished = grams.build_grams(rows, config, _keep, subsets=subsets)
    by_name = {parameter.name: parameter.gram for parameter in finished}
    computed = torch.float64 if rows.numpy_row_dtype == np.float64 else torch.float32
    problem = Eigenproblem(
        rows.parameters,
        assignment,
        config,
        center=config.center_gradients,
        precision=RowPrecision(computed, float(torch.finfo(computed).eps) / 2),
        metadata={**facts, "n_samples": rows.n_samples, "block_structure": config.block_structure},
        single=[parameter.name for parameter in finished if parameter.single],
        layers=assign_blocks(rows.parameters, "layer"),
    )
    return solve_blocks(by_name.__getitem__, problem)


def _keep(parameter: grams.ParameterGram) -> grams.ParameterGram:
    return parameter


def _batch_size(batch: Mapping[str, Tensor] | None) -> int:
    return (
        len(Samples(batch)) if batch and any(torch.as_tensor(v).numel() for v in batch.values() if v is not None) else 0
    )


def _tensors_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a batch that are tensors, or arrays of numbers; others are left out with a notice."""
    kept = {key: value for key, value in batch.items() if value is None or _is_numeric(value)}
    left = {key: value for key, value in batch.items() if key not in kept}
    if left:
        shown = ", ".join(f"{key} ({type(value).__name__})" for key, value in left.items())
        warnings.warn(f"left out of the batch, as no tensors: {shown}. Set them on the model.", stacklevel=3)
    return kept


def _is_numeric(value: Any) -> bool:
    if isinstance(value, Tensor):
        return True
    if isinstance(value, bool | int | float | str | bytes | Mapping):
        return False
    try:
        return np.asarray(value).dtype.kind in "biuf"
    except (TypeError, ValueError):
        return False


def _with_options(results: dict[str, Any], config: SpectralConfig, requested: int) -> dict[str, Any]:
    """Return results whose metadata also say what was asked for."""
    asked = {
        "n_samples_requested": requested,
        "eps": config.eps,
        "regularization": config.regularization,
        "use_deterministic": config.use_deterministic,
    }
    return {**results, "metadata": {**results["metadata"], **asked}}


def _empty(config: SpectralConfig, reason: str, requested: int) -> dict[str, Any]:
    """Return a result of nothing with the keys of any other."""
    warnings.warn(f"empty Fisher spectrum: {reason}.", stacklevel=3)
    nothing = dataclasses.replace(empty_block("global", 0, 0), reason=reason)
    metadata = {
        "error": reason,
        "n_samples_stored": 0,
        "sample_unit": config.sample_unit,
        "loss_reduction": None,
        "seed": config.seed,
        "n_samples": 0,
        "block_structure": config.block_structure,
        "centered": config.center_gradients,
        "normalization": NORMALIZATION[config.center_gradients],
        "block_diagonal_error": None,
        "dtype_gram": dtype_name(config.dtype_gram),
        "dtype_eigensolve": dtype_name(config.dtype_eigensolve),
        "solver": config.solver,
        "parameter_subsampling": config.max_params_per_block,
        "analysed_with": versions(),
    }
    return _with_options(Spectrum({}, nothing, metadata).to_dict(), config, requested)
