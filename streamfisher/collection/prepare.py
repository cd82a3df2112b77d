"""What a run that is about to start will be: taken in waves or streamed, its routing, and its layout."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from streamfisher.planning import run_layout as provisions
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError, ConfigError, StreamError
from streamfisher.gradients import GradientEngine, ProbeReport
from streamfisher.runtime.memory import give_back
from streamfisher.gradients.projection import Projection, projected
from streamfisher.planning.run_layout import Provisions
from streamfisher.data.samples import make_units, padded_total
from streamfisher.gradients.shapes import GradientShape
from streamfisher.models.sharding import is_sharded
from streamfisher.store import RunStore
from streamfisher.store.layout import check_free
from streamfisher.collection.streamed import check_streamable, first_samples
from streamfisher.stream.engine import StreamEngine
from streamfisher.models.weights import Resident
from streamfisher.collection.survey import Survey, probe_batch, to_model

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
    from streamfisher.planning.choice import planned_to_stream

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
    provided = provisions.provide(
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
        engine.thin_boundaries(provisions.boundary_room(config, path), tokens)
    return NewRun(streamed, report, provided)


def beside_weights(engine: GradientEngine | StreamEngine, config: SpectralConfig) -> SpectralConfig:
    """Return the config with what its memory budget leaves beside weights that are read segment by segment.

    Raises:
        CapacityError: nothing.
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
