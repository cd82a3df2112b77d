"""Intervals of metrics from resampled samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A percentile interval of one metric."""

    low: float
    high: float
    standard_error: float  # standard deviation over resamples
    bias: float  # mean over resamples less the value of the data


@dataclass(frozen=True)
class BlockBootstrap:
    """The resamples of one block, or of the union of all."""

    name: str
    values: Mapping[str, np.ndarray]  # metric -> (R,) float64, NaN where it is not defined in a resample
    observed: Mapping[str, float | None]  # metric -> of the data
    eigenvalue_low: np.ndarray  # (r,) float64, of each eigenvalue by its rank; empty where nothing was solved
    eigenvalue_high: np.ndarray  # (r,)
    level: float

    def interval(self, metric: str) -> Interval | None:
        """Return the interval of a metric; `None` where it is not defined in the data or in any resample."""
        found, value = self.values[metric], self.observed[metric]
        found = found[np.isfinite(found)]
        if value is None or not np.isfinite(value) or len(found) < 2:
            return None
        low, high = np.quantile(found, tails(self.level))
        return Interval(float(low), float(high), float(found.std(ddof=1)), float(found.mean()) - value)

    def to_dict(self) -> dict[str, Any]:
        """Return `{metric: {low, high, standard_error, bias}}`, `null` for a metric without an interval."""
        intervals = {name: self.interval(name) for name in self.values}
        return {name: None if found is None else dataclasses.asdict(found) for name, found in intervals.items()}


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of a whole spectrum; the same samples are drawn for all blocks."""

    blocks: Mapping[str, BlockBootstrap]
    global_: BlockBootstrap
    n_resamples: int
    seed: int
    level: float
    whole: BlockBootstrap | None = None  # of all parameters together, where the spectrum has that beside blocks

    def of(self, name: str) -> BlockBootstrap | None:
        """Return the resamples of a block, or of the whole, by the name that its `BlockSpectrum` has."""
        of_all = {found.name: found for found in (self.global_, self.whole) if found is not None}
        return self.blocks.get(name, of_all.get(name))

    def facts(self) -> dict[str, Any]:
        """Return how the intervals were made."""
        return {
            "method": "percentile",
            "n_resamples": self.n_resamples,
            "seed": self.seed,
            "level": self.level,
        }


def tails(level: float) -> tuple[float, float]:
    """Return the two probabilities between which an interval of this level lies."""
    return (1 - level) / 2, (1 + level) / 2
