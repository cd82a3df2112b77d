"""Intervals of metrics from subsets of the samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from streamfisher.results.notebook import result_html

#: Metrics without an interval: N and the noise floor decide them, and no resample of fewer samples says how surely.
WITHOUT_INTERVAL = ("numerical_rank", "condition_number")
#: Metrics that may be of either sign; all others are positive, and their logarithms vary alike at every size.
_SIGNED = ("power_law_exponent",)
_SHARE = "cumulative_variance_"
#: Standard deviation of the logarithm of norms from which intervals are said to hold less often; at 0.5 those of the
#: largest eigenvalue held in 70 % of data sets (docs/metrics.md).
HEAVY_TAILED = 0.4


@dataclass(frozen=True)
class Interval:
    """An interval of one metric at N samples; the metric of the data lies in it."""

    low: float
    high: float
    standard_error: float  # of the metric of N samples
    bias: float  # how far N samples are above very many, if that falls as 1 / N


@dataclass(frozen=True)
class BlockBootstrap:
    """The metrics of one block, or of all together, in random subsets of the samples."""

    name: str
    values: Mapping[str, np.ndarray]  # metric -> (R,) float64, NaN where it is not defined in a subset
    observed: Mapping[str, float | None]  # metric -> of the data
    eigenvalue_low: np.ndarray  # (r,) float64, of each eigenvalue by its rank; empty where nothing was solved
    eigenvalue_high: np.ndarray  # (r,)
    level: float
    inflation: float = 1.0  # standard error at N over the standard deviation over subsets
    n_samples: int = 0

    def interval(self, metric: str) -> Interval | None:
        """Return the interval of a metric.

        `None` for ranks, condition numbers and the share of more eigenvalues than half of the samples, and where the
        metric is not defined, in the data or in two subsets.
        """
        found, value = self.values[metric], self.observed[metric]
        found = found[np.isfinite(found)]
        if metric.startswith(_SHARE) and 2 * int(metric.removeprefix(_SHARE)) > self.n_samples:
            return None  # nearly all of the trace, at every N: a share of what N samples have, not of the source
        if metric in WITHOUT_INTERVAL or value is None or not np.isfinite(value) or len(found) < 2:
            return None
        bias = self.inflation**2 * (float(found.mean()) - value)
        width = quantile(self.level, len(found) - 1) * self.inflation
        if metric in _SIGNED:
            error = self.inflation * float(found.std(ddof=1))
            return Interval(value - width * error / self.inflation, value + width * error / self.inflation, error, bias)
        if value <= 0 or (found <= 0).any():
            return None
        spread = float(np.log(found).std(ddof=1))
        high = value * math.exp(min(width * spread, 700.0))
        high = min(high, 1.0) if metric.startswith(_SHARE) else high
        return Interval(value * math.exp(-width * spread), high, self.inflation * spread * value, bias)

    def to_dict(self) -> dict[str, Any]:
        """Return `{metric: {low, high, standard_error, bias}}`, `null` for a metric without an interval."""
        intervals = {name: self.interval(name) for name in self.values}
        return {name: None if found is None else dataclasses.asdict(found) for name, found in intervals.items()}


@dataclass(frozen=True)
class Bootstrap:
    """Random subsets of the samples of a whole spectrum; the same ones for all blocks."""

    blocks: Mapping[str, BlockBootstrap]
    global_: BlockBootstrap
    n_resamples: int
    seed: int
    level: float
    whole: BlockBootstrap | None = None  # of all parameters together, where the spectrum has that beside blocks
    n_left_out: int = 0  # samples that each subset lacks
    norm_spread: float | None = None  # standard deviation of the logarithm of the samples' gradient norms

    @property
    def heavy_tailed(self) -> str | None:
        """Return in words that norms spread so far that intervals hold less often than they say; `None`: no."""
        if self.norm_spread is None or self.norm_spread < HEAVY_TAILED:
            return None
        return (
            f"gradient norms have a heavy tail (standard deviation {self.norm_spread:.2g} of their logarithm), and the "
            f"largest eigenvalue may be that of one sample: its interval holds less often than {self.level:.0%}"
        )

    def of(self, name: str) -> BlockBootstrap | None:
        """Return what is known of a block, or of all together, by the name that its `BlockSpectrum` has."""
        of_all = {found.name: found for found in (self.global_, self.whole) if found is not None}
        return self.blocks.get(name, of_all.get(name))

    def _repr_html_(self) -> str:
        shown = ("trace", "largest_eigenvalue", "spectral_gap", "effective_rank", "stable_rank")
        of_all = [("union of blocks", self.global_), *([] if self.whole is None else [("whole model", self.whole)])]
        rows = []
        for name, found in (*self.blocks.items(), *of_all):
            intervals = [found.interval(metric) if metric in found.values else None for metric in shown]
            rows.append([name, *(None if i is None else f"{i.low:.4g} to {i.high:.4g}" for i in intervals)])
        return result_html(f"{self.level:.0%} intervals from {self.n_resamples} subsets", ("block", *shown), rows)

    def facts(self) -> dict[str, Any]:
        """Return how the intervals were made."""
        return {
            "method": "delete-d jackknife, of logarithms",
            "n_resamples": self.n_resamples,
            "n_left_out": self.n_left_out,
            "seed": self.seed,
            "level": self.level,
            "norm_spread": self.norm_spread,
        }


def quantile(level: float, freedom: int) -> float:
    """Return where Student's t of so many degrees of freedom has this level between -x and x.

    By the series of R. A. Fisher and E. A. Cornish (Technometrics 2, 1960): to 1 % from 5 degrees on.
    """
    z, n = NormalDist().inv_cdf((1 + level) / 2), freedom
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(z + sum(term / n ** (k + 1) for k, term in enumerate(terms)))
