"""What there is to work with: the limits of memory and disk that a plan and a run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from streamfisher.config import SpectralConfig
from streamfisher.runtime.disk import disk_limit
from streamfisher.runtime.memory import working_memory


@dataclass(frozen=True)
class Machine:
    """What there is to work with; `None` means that it sets no limit."""

    memory: int | None = None  # bytes of the host, beside the model where it is in host memory
    disk: int | None = None  # bytes for the run
    devices: int = 0  # accelerators; 0: the model runs on the CPU
    device_memory: int | None = None  # bytes of each
    loaded: bool = False  # the whole model is there already, beside `memory`


def or_any(limit: int | None) -> float:
    """Return a limit, or one that nothing reaches."""
    return float(limit) if limit is not None else 2.0**62


def this_machine(
    config: SpectralConfig,
    path: Path,
    *,
    devices: int = 0,
    device_memory: int | None = None,
    loaded: bool = False,
) -> Machine:
    """Return what one rank of a run has here: its budgets, at most what is free, or what is free with a margin.

    Args:
        config: the budgets of one rank, see `of_one_rank`: a run has shared its host's out before it looks here.
        path: of the run, for what is free on its disk.
        devices: accelerators.
        device_memory: bytes of each.
        loaded: the whole model is there already.
    """
    return Machine(
        memory=working_memory(config.memory_budget),
        disk=disk_limit(config, path),
        devices=devices,
        device_memory=device_memory,
        loaded=loaded,
    )
