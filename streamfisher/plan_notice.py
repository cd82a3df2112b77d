"""The plan of a run that is about to start, in a few words."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import psutil
from torch import nn

from streamfisher.config import format_bytes
from streamfisher.errors import ModelError
from streamfisher.options import RunOptions
from streamfisher.plan import Machine, RunPlan, plan_run
from streamfisher.plan_report import format_count, format_seconds, taken
from streamfisher.provisions import free_disk
from streamfisher.rates import Rates, measure
from streamfisher.samples import Samples, collate, sequence_length
from streamfisher.skeletons import predicts_next_token
from streamfisher.tracing import captured_names, trace_model

#: Runs of fewer operations take less time than measuring how much time they would take.
_WORTH_MEASURING = 2e12
_UNKNOWN = Rates(*(math.inf,) * 6, source="not measured")


def plan_notice(model: nn.Module, source: Any, options: RunOptions) -> str:
    """Return what a run will take, as far as it can be told: with a time only for a run on the CPU that is not short.

    Args:
        model: the run's own.
        source: the run's samples.
        options: of the run.
    """
    config = options.config
    samples = Samples(source, options.samples, config.max_length)
    if config.sample_unit == "token":
        return "No plan: samples are tokens, and how many shows only when the run begins."
    lengths = [sequence_length(samples[index]) or 1 for index in range(len(samples))]
    names = captured_names(model, config.include, config.exclude)
    try:
        trace = trace_model(
            model,
            collate([samples[0]]),
            causal=predicts_next_token(model, config.loss),
            parameters=dict.fromkeys(names),
        )
    except ModelError as error:
        return f"No plan: {error}"
    mean = sum(lengths) / len(lengths)
    trace = trace.scaled(mean) if mean != trace.tokens else trace
    machine = Machine(
        memory=int(config.memory_budget or psutil.virtual_memory().available // 2),
        disk=int(config.disk_budget or free_disk(Path(options.out))),
    )
    structures = len(options.structures) * len(options.centers)
    plan = plan_run(trace, lengths, config, machine=machine, rates=_UNKNOWN, structures=structures)
    on_host = all(tensor.device.type in ("cpu", "meta") for tensor in model.parameters())
    if on_host and trace.layer is not None and _operations(plan) > _WORTH_MEASURING:
        batch = max(1, min(config.batch_tokens // max(round(mean), 1), config.chunk_size, len(lengths)))
        rates = measure(
            len(lengths),
            dtype_gram=config.dtype_gram,
            codec=config.codec,
            layer=dataclasses.replace(trace.layer, batch=batch),
        )
        plan = plan_run(trace, lengths, config, machine=machine, rates=rates, structures=structures)
    return _line(plan)


def _operations(plan: RunPlan) -> float:
    return sum(stage.flops for stage in plan.chosen.stages)


def _line(plan: RunPlan) -> str:
    way = plan.chosen
    time = f", about {format_seconds(way.seconds)} on one process" if plan.rates is not _UNKNOWN else ""
    return (
        f"Plan: {taken(way)}; {format_bytes(way.gradients)} of gradients in all, at most {format_bytes(way.disk)} on "
        f"disk (uncompressed), {format_bytes(way.memory)} of memory beside the model, "
        f"{format_count(_operations(plan))} operations{time}"
    )
