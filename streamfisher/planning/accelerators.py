"""Accelerators whose rates were measured, so that a run on one can be planned without it."""

from __future__ import annotations

from dataclasses import dataclass

from streamfisher.errors import ConfigError


@dataclass(frozen=True)
class Accelerator:
    """What one device does in a second, in bfloat16 models, and how much it holds."""

    memory: int  # bytes
    passes: float  # forward and backward passes, operations/s
    products: float  # Grams in float64, half of them saved by symmetry, operations/s of N^2 P
    forming: float  # rows formed of factors, operations/s
    transfer: float  # bytes/s to and from pinned memory of the host
    source: str


#: Of a model of the shape of Llama-2-7B on 512 x 512 tokens, see docs/planning.md.
_H100 = {"passes": 440e12, "products": 38e12, "forming": 220e12, "transfer": 55e9}
ACCELERATORS = {
    "h100": Accelerator(memory=80 * 10**9, **_H100, source="measured on an H100"),
    "h200": Accelerator(memory=141 * 10**9, **_H100, source="as measured on an H100, which has the same chip"),
}


def accelerator(name: str) -> Accelerator:
    """Return what is known of an accelerator.

    Raises:
        ConfigError: nothing was measured; the message names those that were, and how to give rates.
    """
    if name.lower() not in ACCELERATORS:
        raise ConfigError(
            f"--accelerator {name}: its rates were not measured; {' and '.join(ACCELERATORS)} were. Give them: "
            "--devices 1 --device-memory 40GB --flops 150e12."
        )
    return ACCELERATORS[name.lower()]
