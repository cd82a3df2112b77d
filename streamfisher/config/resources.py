"""Devices, memory, disk and time that a run may take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from streamfisher.config.kinds import DEVICE, SIZE, one_of, optional, whole
from streamfisher.config.option import Section, documented, option

Stream = Literal["none", "layers", "auto"]


@documented
@dataclass(frozen=True, kw_only=True)
class ResourceOptions(Section):
    """Where a run computes and what it may use; never what it computes."""

    device: str = option("auto", DEVICE, "auto, cpu, cuda, cuda:1, mps", group="model and devices")
    stream: Stream = option(
        "none",
        one_of(*get_args(Stream)),
        "layers: one layer at a time, for models larger than the memory; none: one pass, or waves; "
        "auto: layers where the weights or the waves do not fit, or where waves cost clearly more",
        group="model and devices",
    )
    rank_timeout: int = option(
        1800,
        whole(1),
        "seconds after which a run in which no rank got on gives up",
        group="model and devices",
        metavar="SECONDS",
    )
    n_workers: int | None = option(
        None, optional(whole(1)), "Dask workers", name="workers", group="reduction", unset="one per core"
    )
    memory_budget: int | str | None = option(
        None,
        optional(SIZE),
        "of a host, beside the models of its ranks, for example 2GB",
        group="reduction",
        metavar="SIZE",
        unset="half of what is free",
        unit="bytes, or text with a unit",
    )
    device_memory_budget: int | str | None = option(
        None,
        optional(SIZE),
        "of a device, beside the model, for gradients that are held there and their reduction",
        group="reduction",
        metavar="SIZE",
        unset="nine tenths of what is free",
        unit="bytes, or text with a unit",
    )
    disk_budget: int | str | None = option(
        None,
        optional(SIZE),
        "of the run, for example 200GB",
        group="store",
        metavar="SIZE",
        unset="what is free, with a margin",
        unit="bytes, or text with a unit",
    )
