"""Which way a run is done, waves or streamed layers: one rule, for the plan and for the run itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from streamfisher.config import SpectralConfig, Stream
from streamfisher.errors import ModelError
from streamfisher.runtime.memory import working_memory
from streamfisher.planning.rates import UNKNOWN
from streamfisher.planning.shortfalls import Machine
from streamfisher.planning.tracing import captured_names, trace_model
from streamfisher.planning.strategy import Way
from streamfisher.planning.strategies import WayPlanner
from streamfisher.planning.run_layout import disk_limit
from streamfisher.data.samples import collate
from streamfisher.collection.survey import Survey

#: With 'auto', waves that fit are taken as long as they cost no more than so many times the operations of streamed
#: layers, which trace the model first, have a wave for each layer, and read and write boundaries.
WORTH = 1.25


def streams(asked: Stream, waves: Way, layers: Way) -> bool:
    """Return whether layers are streamed: as asked, or with 'auto' where they fit and waves do not, or cost more."""
    if asked != "auto":
        return asked == "layers"
    return layers.fits and (not waves.fits or waves.passes > WORTH * layers.passes)


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
