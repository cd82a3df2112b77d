"""The one place that chooses where a run's gradients come from: the whole model, or a stream of its layers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from streamfisher.collection.probe_batch import first_samples, probe_batch
from streamfisher.collection.survey import RunData
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import collate
from streamfisher.errors import CapacityError, ConfigError, ModelError, StreamError
from streamfisher.gradients import GradientEngine
from streamfisher.gradients.model_producer import ModelProducer
from streamfisher.gradients.projection import Projection
from streamfisher.models.offload import to_model
from streamfisher.models.sharding import is_sharded
from streamfisher.models.weights import Resident
from streamfisher.planning.choice import streams_layers
from streamfisher.planning.machine import Machine, this_machine
from streamfisher.planning.tracing import captured_names, trace_model
from streamfisher.runtime.ranks import Ranks
from streamfisher.store import RunStore
from streamfisher.stream.layer_stream import LayerStream
from streamfisher.stream.producer import StreamProducer
from streamfisher.stream.settings import check_settings

#: What says that a producer cannot be had, so that with `stream='auto'` the other one is.
REFUSALS = {False: (CapacityError,), True: (CapacityError, StreamError, ConfigError)}


def make_producer(
    streamed: bool,
    model: nn.Module,
    data: RunData,
    config: SpectralConfig,
    *,
    weights: Resident | None = None,
    ranks: Ranks | None = None,
) -> ModelProducer | StreamProducer:
    """Return the producer of a run's gradients; a context manager.

    Args:
        streamed: layer by layer, instead of the whole model.
        model: on its device.
        data: the samples of the run.
        config: of the run.
        weights: where a streamed layer's weights come from; `None`: they are in memory.
        ranks: that divide what a stream prepares.

    Raises:
        ConfigError: a setting needs the whole model at once.
        StreamError: the loss cannot be streamed.
    """
    if not streamed:
        return model_producer(model, data, config)
    check_streamable(model, config)
    stream = LayerStream(
        model,
        data.loss,
        include=config.include,
        exclude=config.exclude,
        dtype_compute=config.dtype_compute,
        deterministic=config.use_deterministic,
        weights=weights,
    )
    return StreamProducer(stream, lambda: first_samples(data, model), ranks)


def model_producer(model: nn.Module, data: RunData, config: SpectralConfig) -> ModelProducer:
    """Return the producer that passes over the whole model."""
    engine = GradientEngine(
        model,
        data.loss,
        include=config.include,
        exclude=config.exclude,
        dtype_compute=config.dtype_compute,
        deterministic=config.use_deterministic,
    )
    if config.project is not None:
        shapes = {name: info.shape for name, info in engine.parameters.items()}
        engine.projection = Projection(config.project, config.seed, shapes)

    skip = config.on_nonfinite == "skip"

    def first() -> dict[str, Tensor]:
        return to_model(probe_batch(data, model, engine.tensors.values(), skip_nonfinite=skip), model)

    return ModelProducer(engine, first)


def fixed_choice(path: Path, model: nn.Module, config: SpectralConfig, weights: Resident | None = None) -> bool | None:
    """Return whether a run streams its layers, or `None` where the planner is to find out.

    A run that was started with `stream='auto'` goes on as it began, and so does one that is resumed with it.
    """
    if config.stream != "auto":
        return config.stream == "layers"
    if (path / "manifest.json").is_file():
        return _stored_choice(path, weights is not None)
    if weights is not None:  # the model does not fit the memory
        return True
    if is_sharded(model) or any(parameter.is_meta for parameter in model.parameters()):  # spread, or offloaded
        return False
    return None


def runs_in_waves(path: str | Path, config: SpectralConfig) -> bool:
    """Return whether a run that is resumed with `stream='auto'` goes on in waves of the whole model."""
    return config.stream == "auto" and not _stored_choice(Path(path), True)


def _stored_choice(path: Path, otherwise: bool) -> bool:
    """Return whether a stored run streams its layers; `otherwise` where it does not say, being of an older version."""
    stored = RunStore(path).manifest
    return bool(stored.layout.get("streamed", stored.config.get("stream") == "layers" or otherwise))


def check_streamable(model: nn.Module, config: SpectralConfig) -> None:
    """Refuse settings that need the whole model at once.

    Raises:
        ConfigError: the message names the setting.
    """
    check_settings(config)
    if is_sharded(model):
        raise ConfigError("stream='layers' and --fsdp both split the model; use one of them.")


def planned_to_stream(model: nn.Module, data: RunData, config: SpectralConfig, path: Path) -> bool:
    """Return whether the planner would stream a model that is in memory.

    A model that cannot be planned from shapes alone is not: whether its waves fit shows when they are cut.

    Args:
        model: on its device.
        data: the samples of the run.
        config: of the run.
        path: of the run, for what is free on its disk.
    """
    names = captured_names(model, config.include, config.exclude)
    sample = collate([data.samples[0]])
    try:
        trace = trace_model(model, sample, causal=data.loss.name == "causal", parameters=dict.fromkeys(names))
    except ModelError:
        return False
    mean = sum(data.lengths) / len(data.lengths)
    if round(mean) != round(trace.tokens):
        trace = trace.scaled(mean)
    return streams_layers(trace, data.lengths, config, machine_of(model, config, path), data.apart)


def machine_of(model: nn.Module, config: SpectralConfig, path: Path) -> Machine:
    """Return what a run has to work with once its model is loaded."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    memory = min((torch.cuda.get_device_properties(d).total_memory for d in devices), default=None)
    return this_machine(config, path, devices=len(devices), device_memory=memory, loaded=True)
