"""What a run that is about to start will be: where its gradients come from, its routing, and its layout."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from streamfisher.byte_sizes import format_bytes, parse_bytes
from streamfisher.collection.behaviour import arithmetic_of
from streamfisher.collection.producers import REFUSALS, make_producer, planned_to_stream
from streamfisher.collection.survey import RunData
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.data.batches import make_units, padded_total
from streamfisher.errors import CapacityError
from streamfisher.gradients import ProbeReport
from streamfisher.gradients.producer import GradientProducer
from streamfisher.gradients.projection import projected
from streamfisher.gradients.shapes import GradientShape
from streamfisher.models.sharding import is_sharded
from streamfisher.planning import run_layout
from streamfisher.planning.run_layout import RunLayout, boundary_memory, boundary_room, plan_layout
from streamfisher.runtime.disk import disk_limit, free_disk
from streamfisher.runtime.memory import give_back, working_memory
from streamfisher.runtime.ranks import Ranks
from streamfisher.store import Manifest, model_manifest, versions
from streamfisher.store.layout import check_free, chunk_columns


@dataclass(frozen=True)
class PreparedRun:
    """What is decided before a run starts, and stored with it."""

    streamed: bool  # layers are streamed; else waves are passes over the whole model
    report: ProbeReport
    plan: RunLayout

    def layout(self) -> dict[str, Any]:
        """Return the part of the manifest's layout that says so, as plain JSON values."""
        return self.plan.layout() | {"streamed": self.streamed}


def within_devices(
    config: SpectralConfig, device: torch.device | None, ranks: Ranks, *, progress: bool
) -> SpectralConfig:
    """Return the config with what every rank may take on its device: the least, a share where several have the same.

    A layout is for all ranks alike. Without devices, or with a single rank, the config is as it was.
    """
    if ranks.count == 1 or device is None:
        return config
    own = run_layout.device_room(device, config.device_memory_budget)
    found = [(str(name), room) for name, room in ranks.gather("devices", [_name_of(device), own]) if room is not None]
    if not found:
        return config
    room, said = least_room(found)
    if said and progress and ranks.is_main:
        tqdm.write(said)
    return config.replace(device_memory_budget=room)


def least_room(rooms: Sequence[tuple[str, int]]) -> tuple[int, str | None]:
    """Return the bytes that each rank may take on its device, and what is to be said of it.

    Args:
        rooms: for each rank, the name of its device, and what it alone might take there.
    """
    ranks_on = Counter(name for name, _ in rooms)
    shares = [room // ranks_on[name] for name, room in rooms]
    least, most = min(shares), max(shares)
    crowded = [f"{count} ranks share {name}" for name, count in ranks_on.items() if count > 1]
    if crowded:
        return least, f"{', '.join(crowded)}: each rank takes at most {format_bytes(least)} there."
    if least < 0.9 * most:
        name = rooms[shares.index(least)][0]
        return least, f"The devices of the ranks differ: each rank takes at most {format_bytes(least)}, as {name} has."
    return least, None


def _name_of(device: torch.device) -> str:
    """Return a name that two ranks have for the same device only."""
    if device.type != "cuda":
        return f"{device} of {platform.node()}"
    return f"{device} of {platform.node()} ({getattr(torch.cuda.get_device_properties(device), 'uuid', 'no uuid')})"


def prepare_either(
    path: Path, model: nn.Module, data: RunData, config: SpectralConfig, *, progress: bool
) -> PreparedRun:
    """Prepare a new run with the producer that the planner takes, or with the other one where that cannot be done.

    Raises:
        CapacityError: waves do not fit the budgets, and layers cannot be streamed; the message says why.
    """
    first = planned_to_stream(model, data, config, path)
    reasons: dict[bool, str] = {}
    for streamed in (first, not first):
        try:
            with make_producer(streamed, model, data, config) as producer:
                return prepare(path, model, producer, data, config, streamed=streamed)
        except REFUSALS[streamed] as error:
            reasons[streamed] = str(error)
        if progress and streamed == first:
            what = "Layers cannot be streamed, so waves are tried" if streamed else "Waves do not fit, so layers are"
            tqdm.write(f"{what}: {reasons[streamed]}")
    raise CapacityError(f"{reasons[False]} Streaming layers is no way out: {reasons[True]}")


def prepare(
    path: Path,
    model: nn.Module,
    producer: GradientProducer,
    data: RunData,
    config: SpectralConfig,
    *,
    streamed: bool,
) -> PreparedRun:
    """Probe a model and lay out its new run within the budgets.

    Raises:
        CapacityError: something does not fit; the message says what, by how much, and what would make it fit.
        StreamError: the model is no stack of layers that can be streamed.
    """
    check_free(path)
    return PreparedRun(streamed, *lay_out(path, model, producer, data, config))


def lay_out(
    path: Path, model: nn.Module, producer: GradientProducer, data: RunData, config: SpectralConfig
) -> tuple[ProbeReport, RunLayout]:
    """Probe a model, and return what was found and how a run is laid out within the budgets; raises as `prepare`."""
    config = beside_weights(producer, config)
    report, shapes, activations = probe(model, producer, config.memory_budget)
    plan = plan_layout(
        projected(shapes, config.project),
        data.lengths,
        config,
        path,
        row_dtype=producer.row_dtype,
        activations=activations,
        segments=producer.segments(),
        device=producer.device,
        apart=data.apart,
    )
    units = make_units(len(data.samples), config.chunk_size)
    tokens = padded_total(data.lengths, units, plan.batch_tokens, data.apart)
    memory = boundary_memory(working_memory(config.memory_budget), plan.places)
    room = boundary_room(min(disk_limit(config, path), free_disk(path)))
    producer.keep_between_waves(room, tokens, memory=memory)
    return report, plan


def beside_weights(producer: GradientProducer, config: SpectralConfig) -> SpectralConfig:
    """Return the config with what its memory budget leaves beside weights that are read segment by segment.

    Raises:
        CapacityError: nothing is left.
    """
    if config.memory_budget is None:
        return config
    return config.replace(memory_budget=producer.beside_weights(int(config.memory_budget)))


def probe(
    model: nn.Module, producer: GradientProducer, memory: int | str | None
) -> tuple[ProbeReport, list[GradientShape], float]:
    """Probe a model and measure its gradients; with sharded weights all ranks do, on the same samples."""
    if memory is not None:
        memory = int(memory) // 2
    elif is_sharded(model):
        memory = sys.maxsize  # what is free differs between ranks, and all must take the same passes
    report = producer.probe(memory)
    shapes, activations = producer.shapes()
    give_back()
    return report, shapes, activations


def make_manifest(
    model: nn.Module,
    producer: GradientProducer,
    data: RunData,
    config: SpectralConfig,
    description: str | Mapping[str, Any] | None,
    report: ProbeReport | None = None,
) -> Manifest:
    """Return the facts of a run that is about to start; `report` is what the probe found, once it has run."""
    store_dtype = config.dtype_store or producer.row_dtype
    itemsize = torch.finfo(store_dtype).bits // 8
    n = len(data.samples)
    columns = producer.columns
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
                "chunk_columns": chunk_columns(
                    columns.get(info.name, info.numel),
                    n,
                    config.chunk_size,
                    itemsize,
                    parse_bytes(config.memory_budget) if config.memory_budget else None,
                ),
            }
            for info in producer.parameters.values()
        ],
        excluded=dict(producer.excluded),
        data=data.data_manifest(config, description),
        loss=data.loss.metadata(),
        layout={
            "chunk_rows": config.chunk_size,
            "dtype_row": dtype_name(producer.row_dtype),
            "dtype_store": dtype_name(store_dtype),
            "bitround": config.bitround,
            "codec": "raw" if config.codec == "auto" else config.codec,  # until it is chosen
            "centered": config.store_centered,
            "arithmetic": arithmetic_of(producer.device),
            "kept_apart": data.kept_apart,
        },
        probe=report.to_dict() if report else {},
        versions=versions(),
    )
