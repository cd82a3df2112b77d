"""What a run that is about to start will be: taken in waves or streamed, its routing, and its layout."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from streamfisher.collection.survey import Survey, probe_batch
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.data.batches import collate, make_units, padded_total
from streamfisher.errors import CapacityError, ConfigError, ModelError, StreamError
from streamfisher.gradients import GradientEngine, ProbeReport
from streamfisher.gradients.probe_batch import PROBE_SAMPLES
from streamfisher.gradients.projection import Projection, projected
from streamfisher.gradients.shapes import GradientShape
from streamfisher.models.offload import to_model
from streamfisher.models.sharding import is_sharded
from streamfisher.models.weights import Resident
from streamfisher.planning.plan import streams
from streamfisher.planning.rates import UNKNOWN
from streamfisher.planning.run_layout import Provisions, boundary_room, provide
from streamfisher.planning.shortfalls import Machine
from streamfisher.planning.strategies import WayPlanner
from streamfisher.planning.tracing import captured_names, trace_model
from streamfisher.runtime.disk import disk_limit
from streamfisher.runtime.memory import give_back, working_memory
from streamfisher.store import Manifest, RunStore, model_manifest, versions
from streamfisher.store.layout import check_free, chunk_columns
from streamfisher.stream.engine import StreamEngine

#: What says that a way cannot be taken, so that with `stream='auto'` the other one is.
_REFUSALS = {False: (CapacityError,), True: (CapacityError, StreamError, ConfigError)}


@dataclass(frozen=True)
class NewRun:
    """What is decided before a run starts, and stored with it."""

    streamed: bool  # layers are streamed; else waves are passes over the whole model
    report: ProbeReport
    provided: Provisions

    def layout(self) -> dict[str, Any]:
        """Return the part of the manifest's layout that says so, as plain JSON values."""
        return self.provided.layout() | {"streamed": self.streamed}


def _captured(config: SpectralConfig) -> dict[str, Any]:
    """Return what any engine needs to know of a config."""
    return {
        "include": config.include,
        "exclude": config.exclude,
        "dtype_compute": config.dtype_compute,
        "deterministic": config.use_deterministic,
    }


def make_engine(model: nn.Module, found: Survey, config: SpectralConfig) -> GradientEngine:
    """Return the gradient engine that `config` asks for; a context manager."""
    engine = GradientEngine(model, found.loss, **_captured(config))
    if config.project is not None:
        shapes = {name: info.shape for name, info in engine.parameters.items()}
        engine.projection = Projection(config.project, config.seed, shapes)
    return engine


def stream_engine(
    model: nn.Module, found: Survey, config: SpectralConfig, weights: Resident | None = None
) -> StreamEngine:
    """Return the engine that takes a model one segment at a time; a context manager.

    Raises:
        ConfigError: a setting needs the whole model at once.
        StreamError: the loss cannot be streamed.
    """
    check_streamable(model, config)
    return StreamEngine(model, found.loss, **_captured(config), weights=weights)


def fixed_way(path: Path, model: nn.Module, config: SpectralConfig, weights: Resident | None = None) -> bool | None:
    """Return whether a run streams its layers, or `None` where `choose_way` is to find out.

    A run that was started with `stream='auto'` goes on as it began, and so does one that is resumed with it.
    """
    if config.stream != "auto":
        return config.stream == "layers"
    if (path / "manifest.json").is_file():
        return _stored_way(path, weights is not None)
    if weights is not None:  # the model does not fit the memory
        return True
    if is_sharded(model) or any(parameter.is_meta for parameter in model.parameters()):  # spread, or offloaded
        return False
    return None


def runs_in_waves(path: str | Path, config: SpectralConfig) -> bool:
    """Return whether a run that is resumed with `stream='auto'` goes on in waves of the whole model."""
    return config.stream == "auto" and not _stored_way(Path(path), True)


def _stored_way(path: Path, otherwise: bool) -> bool:
    """Return whether a stored run streams its layers; `otherwise` where it does not say, being of an older version."""
    stored = RunStore(path).manifest
    return bool(stored.layout.get("streamed", stored.config.get("stream") == "layers" or otherwise))


def choose_way(path: Path, model: nn.Module, found: Survey, config: SpectralConfig, *, progress: bool) -> NewRun:
    """Lay out a new run in the way that the planner takes, or in the other one where that cannot be done.

    Raises:
        CapacityError: waves do not fit the budgets, and layers cannot be streamed; the message says why.
    """
    first = planned_to_stream(model, found, config, path)
    reasons: dict[bool, str] = {}
    for streamed in (first, not first):
        make = stream_engine if streamed else make_engine
        try:
            with make(model, found, config) as engine:
                return lay_out(path, model, engine, found, config)
        except _REFUSALS[streamed] as error:
            reasons[streamed] = str(error)
        if progress and streamed == first:
            what = "Layers cannot be streamed, so waves are tried" if streamed else "Waves do not fit, so layers are"
            tqdm.write(f"{what}: {reasons[streamed]}")
    raise CapacityError(f"{reasons[False]} Streaming layers is no way out: {reasons[True]}")


def lay_out(
    path: Path, model: nn.Module, engine: GradientEngine | StreamEngine, found: Survey, config: SpectralConfig
) -> NewRun:
    """Probe a model and lay out its new run within the budgets.

    Raises:
        CapacityError: something does not fit; the message says what, by how much, and what would make it fit.
        StreamError: the model is no stack of layers that can be streamed.
    """
    check_free(path)
    streamed = isinstance(engine, StreamEngine)
    config = beside_weights(engine, config)
    report, shapes, activations = probe_engine(model, engine, found, config.memory_budget)
    provided = provide(
        projected(shapes, config.project),
        found.lengths,
        config,
        path,
        row_dtype=engine.row_dtype,
        activations=activations,
        segments=engine.waves() if streamed else None,
    )
    if streamed:
        units = make_units(len(found.samples), config.chunk_size)
        tokens = padded_total(found.lengths, units, provided.batch_tokens)
        engine.thin_boundaries(boundary_room(config, path), tokens)
    return NewRun(streamed, report, provided)


def beside_weights(engine: GradientEngine | StreamEngine, config: SpectralConfig) -> SpectralConfig:
    """Return the config with what its memory budget leaves beside weights that are read segment by segment.

    Raises:
        CapacityError: the weights alone need all of it.
    """
    if config.memory_budget is None or not isinstance(engine, StreamEngine):
        return config
    return config.replace(memory_budget=engine.beside_weights(config.memory_budget))


def probe_engine(
    model: nn.Module, engine: GradientEngine | StreamEngine, found: Survey, memory: int | None
) -> tuple[ProbeReport, list[GradientShape], float]:
    """Probe the engine and measure its gradients; with sharded weights all ranks do, on the same samples."""
    if isinstance(engine, StreamEngine):
        batch = first_samples(found, model)
    else:
        batch = to_model(probe_batch(found, model, engine.tensors.values()), model)
    if memory is not None:
        memory //= 2
    elif is_sharded(model):
        memory = sys.maxsize  # what is free differs between ranks, and all must take the same passes
    report = engine.probe(batch, memory)
    shapes, activations = engine.shapes(batch)
    give_back()
    return report, shapes, activations


def check_streamable(model: nn.Module, config: SpectralConfig) -> None:
    """Refuse settings that need the whole model at once.

    Raises:
        ConfigError: the message names the setting.
    """
    if config.store_centered:
        raise ConfigError(
            "store_centered=True takes a pass over all parameters at once, and stream='layers' has none. Leave it out: "
            "--center gives the covariance of uncentered gradients too."
        )
    if config.project is not None:
        raise ConfigError(
            f"project={config.project} and stream='layers' do not go together. Use --stream none, where waves keep "
            "within the budgets, or leave out --project: a stream deletes its exact gradients layer by layer."
        )
    if config.labels == "model":
        raise ConfigError(
            "labels='model' draws labels from the whole model's output before each batch, which stream='layers' does "
            "not have. Use --stream none, or labels of the data."
        )
    if is_sharded(model):
        raise ConfigError("stream='layers' and --fsdp both split the model; use one of them.")


def first_samples(found: Survey, model: nn.Module) -> dict[str, Tensor]:
    """Return the batch that the model is traced on: the first samples, the second of another length if there is one."""
    numbers = list(range(min(PROBE_SAMPLES, len(found.samples))))
    length = found.lengths[0]
    if len(numbers) > 1 and all(found.lengths[number] == length for number in numbers):
        numbers[1] = next((n for n, other in enumerate(found.lengths) if other != length), numbers[1])
    return to_model(collate([found.samples[number] for number in numbers]), model)


def planned_to_stream(model: nn.Module, found: Survey, config: SpectralConfig, path: Path) -> bool:
    """Return whether the planner would stream a model that is in memory.

    A model that cannot be planned from shapes alone is not: whether its waves fit shows when they are cut.

    Args:
        model: on its device.
        found: the samples.
        config: of the run.
        path: of the run, for what is free on its disk.
    """
    names = captured_names(model, config.include, config.exclude)
    sample = collate([found.samples[0]])
    try:
        trace = trace_model(model, sample, causal=found.loss.name == "causal", parameters=dict.fromkeys(names))
    except ModelError:
        return False
    mean = sum(found.lengths) / len(found.lengths)
    if round(mean) != round(trace.tokens):
        trace = trace.scaled(mean)
    planner = WayPlanner(trace, found.lengths, config, machine_of(model, config, path), UNKNOWN)
    return streams(config.stream, planner.stored("waves", config.representation, budgets=True), planner.streamed())


def machine_of(model: nn.Module, config: SpectralConfig, path: Path) -> Machine:
    """Return what a run has to work with once its model is loaded."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    return Machine(
        memory=working_memory(config.memory_budget),
        disk=disk_limit(config, path),
        devices=len(devices),
        device_memory=min((torch.cuda.get_device_properties(d).total_memory for d in devices), default=None),
        loaded=True,
    )


def make_manifest(
    model: nn.Module,
    engine: GradientEngine | StreamEngine,
    found: Survey,
    config: SpectralConfig,
    description: str | Mapping[str, Any] | None,
    report: ProbeReport | None = None,
) -> Manifest:
    """Return the facts of a run that is about to start; `report` is what the probe found, once it has run."""
    store_dtype = config.dtype_store or engine.row_dtype
    itemsize = torch.finfo(store_dtype).bits // 8
    n = len(found.samples)
    projection = engine.projection if isinstance(engine, GradientEngine) else None
    columns = {} if projection is None else projection.columns
    return Manifest(
        config=config.to_dict(),
        identity=config.identity(),
        model=model_manifest(model),
        parameters=[
            {
                "name": info.name,
                "shape": list(info.shape),
                "dtype": dtype_name(info.dtype),
                **({"columns": columns[info.name]} if info.name in columns else {}),
                "chunk_columns": chunk_columns(columns.get(info.name, info.numel), n, config.chunk_size, itemsize),
            }
            for info in engine.parameters.values()
        ],
        excluded=dict(engine.excluded),
        data=found.data_manifest(config, description),
        loss=found.loss.metadata(),
        layout={
            "chunk_rows": config.chunk_size,
            "dtype_row": dtype_name(engine.row_dtype),
            "dtype_store": dtype_name(store_dtype),
            "bitround": config.bitround,
            "codec": config.codec,
            "centered": config.store_centered,
        },
        probe=report.to_dict() if report else {},
        versions=versions(),
    )
