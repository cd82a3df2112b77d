"""What a plan says: a way of doing a run, its stages, and the bytes of each block's gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str  # 'collect', 'reduce' or 'solve'
    flops: float
    read: float  # bytes
    written: float  # bytes
    memory: float  # host bytes at its peak, beside the model's weights
    seconds: float


@dataclass(frozen=True)
class Strategy:
    """One way to do a run."""

    name: str
    waves: int
    passes: float  # over the data, in units of one plain forward and backward with weight gradients
    gradients: float  # bytes of all gradients that are written in all, uncompressed
    disk: float  # bytes on disk at its fullest, Grams included
    weights: float  # bytes of weights that are resident at a time
    stages: tuple[Stage, ...]
    problems: tuple[str, ...]  # what does not fit, and what would make it fit
    representation: Mapping[str, str] = field(default_factory=dict)
    boundaries: float = 0.0  # bytes of hidden states between layers, where they are streamed
    hold: str = "disk"  # where gradients are until they are reduced: 'device', 'host' or 'disk'
    away: float = 0.0  # bytes of gradients that are in host memory where the others are on the device
    at_risk: float = 0.0  # seconds of work that a kill costs where gradients are in memory: of a wave on average
    every: int = 1  # only every so-maniest boundary is kept

    @property
    def seconds(self) -> float:
        """Return the time of all stages, one after the other."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def until_grams(self) -> float:
        """Return the time until all Grams are there; solving them takes the same however they were made."""
        return sum(stage.seconds for stage in self.stages if stage.name != "solve")

    @property
    def memory(self) -> float:
        """Return the highest peak of all stages, beside the model's weights."""
        return max(stage.memory for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Return whether nothing stands in its way."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "name": self.name,
            "fits": self.fits,
            "problems": list(self.problems),
            "waves": self.waves,
            "hold": self.hold,
            "bytes_held_away": self.away,
            "passes": self.passes,
            "bytes_gradients": self.gradients,
            "bytes_disk": self.disk,
            "bytes_weights_resident": self.weights,
            "bytes_boundaries": self.boundaries,
            "boundary_every": self.every,
            "seconds": self.seconds,
            "seconds_at_risk": self.at_risk,
            "stages": [vars(stage) for stage in self.stages],
        }


@dataclass(frozen=True)
class BlockBytes:
    """One block of parameters and the bytes of its gradients over all samples."""

    name: str
    n_params: int
    dense: float
    factors: float  # of the parameters that have any; the others as rows
    stored: float  # as the run holds them
