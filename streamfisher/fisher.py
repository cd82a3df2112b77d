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
from torch.utils.data import Dataset

from streamfisher.analysis.in_memory import spectrum_of_gradients
from streamfisher.api import collect
from streamfisher.collection.in_memory import spectrum_in_memory
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.config.kinds import optional, whole
from streamfisher.data.samples import Samples
from streamfisher.data.sources import refuse_splits
from streamfisher.errors import ConfigError, DataError, NonFiniteError
from streamfisher.results.spectrum import NORMALIZATION, Spectrum
from streamfisher.solving.blocksolver import empty_block
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
        self.config = SpectralConfig.of(config)
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
            return _with_options(spectrum_of_gradients(given, config).to_dict(), config, requested)
        if not isinstance(batch, Mapping | None):
            raise DataError(
                f"batch is a {type(batch).__name__}; it must be one dict of batched tensors. Datasets, DataLoaders and "
                "iterators are for streamfisher.collect."
            )
        if batch is not None:
            refuse_splits(batch)
            batch = _tensors_of(batch)
        size = _batch_size(batch)
        requested = size if n_samples is None else n_samples
        size = min(requested, size)
        if model is None or batch is None or size < 2:
            reason = "no model was given" if model is None else f"the batch has {size} samples; at least 2 are needed"
            return _empty(config, reason, requested)
        compute = _streamed if config.storage_mode == "streaming" else spectrum_in_memory
        try:
            return _with_options(compute(model, batch, size, config).to_dict(), config, requested)
        except NonFiniteError as error:
            if config.on_nonfinite != "skip":
                raise
            return _empty(config, f"{str(error).rstrip('.')}; at least 2 samples are needed", requested)


def _streamed(model: nn.Module, batch: Any, n_samples: int, config: SpectralConfig) -> Spectrum:
    """Go through a Zarr run, kept at `store_path` or in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="streamfisher-") as folder:
        path = Path(config.store_path) if config.store_path else Path(folder) / "run.zarr"
        run = collect(model, batch, path, config=config, n_samples=n_samples)
        return run.spectrum(config.block_structure, config.center_gradients, config=config)


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
    if isinstance(value, bool | int | float | str | bytes | Mapping | Dataset):
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
