"""What does not fit a machine, in sentences that say by how much and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass

from streamfisher.byte_sizes import format_bytes
from streamfisher.config import SpectralConfig
from streamfisher.planning.machine import Machine


@dataclass(frozen=True)
class Shortfalls:
    """Compares what a run needs with what there is."""

    machine: Machine
    config: SpectralConfig
    gram_bytes: float
    weight_bytes: int

    def of_disk(self, needed: float, itemsize: int) -> list[str]:
        """Return what the disk lacks; a stored number of a row has so many bytes."""
        if self.machine.disk is None or needed <= self.machine.disk:
            return []
        halves = "" if itemsize <= 2 else ", store rows in half the bytes (--store-dtype bfloat16)"
        grams = ", or keep fewer Grams (--gram-per layer)" if self.gram_bytes > 0.5 * self.machine.disk else ""
        return [
            f"up to {format_bytes(needed)} on disk and the budget is {format_bytes(self.machine.disk)}: give "
            f"--disk-budget {round_up(needed)}{halves}, take fewer samples{grams}."
        ]

    def of_memory(self, needed: float) -> list[str]:
        """Return what the host's memory lacks for collecting."""
        if self.machine.memory is None or needed <= self.machine.memory:
            return []
        return [
            f"collecting needs {format_bytes(needed)} of memory beside the model and the budget is "
            f"{format_bytes(self.machine.memory)}: give --memory-budget {round_up(needed)}, lower --chunk-size "
            f"{self.config.chunk_size} or --batch-tokens {self.config.batch_tokens}."
        ]

    def of_weights(self) -> list[str]:
        """Return what the model's weights lack where all of them are resident."""
        machine, weights = self.machine, self.weight_bytes
        room = (machine.device_memory or 0) * machine.devices if machine.devices else machine.memory
        if not room or weights <= room or machine.loaded:
            return []
        where = f"{machine.devices} devices of {format_bytes(machine.device_memory or 0)}" if machine.devices else ""
        where = where or f"a memory of {format_bytes(room)}"
        return [
            f"the model's weights are {format_bytes(weights)} and do not fit {where}: stream them by layers "
            "(--stream layers), or offload them (--device-map auto)."
        ]

    def of_segments(self, weights: float, activations: float) -> list[str]:
        """Return what a device lacks for the weights at work and the activations of a batch in one layer."""
        limit = self.machine.device_memory if self.machine.devices else None
        if limit is None or weights + activations <= limit:
            return []
        return [
            f"two layers and the code around them, {format_bytes(weights)}, and the activations of one batch need "
            f"{format_bytes(weights + activations)} and a device has {format_bytes(limit)}: lower --batch-tokens "
            f"{self.config.batch_tokens}, or take devices with more memory."
        ]


def round_up(size: float) -> str:
    """Return a size as it is written on a command line, rounded up."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{-(-size * 10 // scale) / 10:g}{unit}"
    return f"{-(-size // 1e3):g}kB"
