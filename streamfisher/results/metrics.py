"""What a spectrum says in single numbers, each with definition and source; `docs/metrics.md` tells how to read them.

Notation: `lambda_1 >= lambda_2 >= ...` are the eigenvalues of one block (or of the union of all), `tr` their sum, `r`
the number of them above the noise floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Cumulative variance is reported for so many leading eigenvalues.
CUMULATIVE_AT = (1, 10, 100)

#: Metrics that are one number each, in the order of tables; intervals and growth curves are made for these.
SCALAR_METRICS = (
    "trace",
    "largest_eigenvalue",
    "second_eigenvalue",
    "spectral_gap",
    "condition_number",
    "effective_rank",
    "numerical_rank",
    "stable_rank",
    "participation_ratio",
    *(f"cumulative_variance_{k}" for k in CUMULATIVE_AT),
    "power_law_exponent",
)

#: The least number of points of a power-law fit.
_LEAST_POINTS = 5


@dataclass(frozen=True)
class PowerLaw:
    """A fit of `lambda_k = c k^(-exponent)` to part of a spectrum."""

    exponent: float  # positive where eigenvalues decay
    stderr: float  # of the least-squares slope; takes residuals as independent, which sorted values are not
    first: int  # 1-based index k of the first eigenvalue of the fit
    last: int  # of the last one, included
    r_squared: float  # share of the variance of log(lambda) that the line explains


def json_values(content: Any) -> Any:
    """Return plain values as strict JSON has them: what is infinite or not a number becomes `None`."""
    if isinstance(content, Mapping):
        return {key: json_values(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [json_values(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def effective_rank(values: np.ndarray) -> float:
    """Return exp of the Shannon entropy of `values / sum(values)`; 0 for none.

    Source: O. Roy and M. Vetterli, "The effective rank", EUSIPCO 2007.
    """
    total = values.sum()
    if len(values) == 0 or total <= 0:
        return 0.0
    p = values / total
    return float(np.exp(-np.sum(p * np.log(p, where=p > 0, out=np.zeros_like(p)))))


def stable_rank(trace: float, largest: float) -> float:
    """Return `tr / lambda_1`, between 1 and the rank; 0 for a zero matrix.

    It is `|G|_F^2 / |G|_2^2`, the stable (numerical) rank of the gradient matrix G whose Fisher this is.
    Source: M. Rudelson and R. Vershynin, "Sampling from large matrices", J. ACM 54(4), 2007.
    """
    return trace / largest if largest > 0 else 0.0


def participation_ratio(trace: float, frobenius: float) -> float:
    """Return `(sum lambda)^2 / sum lambda^2 = (tr / |F|_F)^2`; 0 for a zero matrix.

    Source: R. J. Bell and P. Dean, "Atomic vibrations in vitreous silica", Discuss. Faraday Soc. 50, 1970; as the
    dimension of a covariance: P. Gao et al., "A theory of multineuronal dimensionality", bioRxiv 214262, 2017.
    """
    return (trace / frobenius) ** 2 if frobenius > 0 else 0.0


def cumulative_variance(values: np.ndarray, trace: float, k: int, *, truncated: bool = False) -> float | None:
    """Return `(lambda_1 + ... + lambda_k) / tr`; `None` where fewer than k of more eigenvalues are listed.

    Source: the cumulative percentage of total variation of I. T. Jolliffe, "Principal Component Analysis", 2002, 6.1.1.
    """
    if trace <= 0 or (truncated and k > len(values)):
        return None
    return min(float(values[:k].sum()) / trace, 1.0)


def power_law(values: np.ndarray, first: int | None = None, last: int | None = None) -> PowerLaw | None:
    """Fit `log lambda_k = log c - alpha log k` by least squares over `k = first..last`; `None` for under 5 points.

    A sample spectrum bends at both ends: the leading eigenvalues are outliers, and those near rank r are pressed down
    because only N samples were drawn. So the range is, unless given, `k = max(2, ceil(r / 10)) .. floor(r / 2)`.

    With residuals `e`, `x = log k` and n points, the standard error is
    `sqrt(sum e^2 / (n - 2) / sum (x - mean x)^2)`. It measures how straight the curve is, not what other samples would
    give; intervals do that.

    Args:
        values: (r,) eigenvalues above the noise floor, descending.
        first: 1-based index of the first eigenvalue to be fitted.
        last: of the last one, included.

    Source: the fit of C. Stringer et al., "High-dimensional geometry of population responses", Nature 571, 2019
    (eigenspectra of sample covariances). A density of eigenvalues `rho(lambda) ~ lambda^(-1 - 1 / alpha)` is the same
    law; its maximum-likelihood fit (A. Clauset et al., SIAM Review 51, 2009) takes eigenvalues as independent draws.
    """
    r = len(values)
    first = max(2, math.ceil(r / 10)) if first is None else first
    last = r // 2 if last is None else min(last, r)
    if last - first + 1 < _LEAST_POINTS:
        return None
    x = np.log(np.arange(first, last + 1, dtype=np.float64))
    y = np.log(values[first - 1 : last])
    x_centered, y_centered = x - x.mean(), y - y.mean()
    spread = float(x_centered @ x_centered)
    slope = float(x_centered @ y_centered) / spread
    residuals = y_centered - slope * x_centered
    variance = float(residuals @ residuals)
    total = float(y_centered @ y_centered)
    return PowerLaw(
        exponent=-slope,
        stderr=math.sqrt(variance / (len(x) - 2) / spread),
        first=first,
        last=last,
        r_squared=1.0 - variance / total if total > 0 else 1.0,
    )


def frobenius(K: np.ndarray) -> float:
    """Return `|K|_F` of a positive semi-definite matrix, without under- or overflow of the squares."""
    peak = float(np.max(K.diagonal(), initial=0.0))
    return peak * float(np.linalg.norm(K / peak)) if peak > 0 else 0.0


def shape_metrics(
    values: np.ndarray, above_floor: np.ndarray, trace: float, norm: float, *, truncated: bool
) -> dict[str, float | int | None]:
    """Return the metrics that describe the shape of a spectrum, as plain JSON values.

    - `stable_rank`, `participation_ratio`: see the functions of that name; 0 where nothing is above the floor;
    - `cumulative_variance_1`, `_10`, `_100`: share of the trace in that many leading eigenvalues;
    - `power_law_exponent`, `power_law_stderr`, `power_law_first`, `power_law_last`, `power_law_r_squared`: of the tail
      above the floor; `null` where fewer than 5 eigenvalues lie in the range of the fit, or the list is cut.

    Args:
        values: (m,) eigenvalues, descending.
        above_floor: (m,) bool.
        trace: sum of all eigenvalues, also of those that are not listed.
        norm: root of the sum of the squares of all eigenvalues.
        truncated: only the largest are listed.
    """
    something = bool(above_floor.any())
    fit = power_law(values[above_floor]) if something and not truncated else None
    return {
        "stable_rank": stable_rank(trace, float(values[0])) if something else 0.0,
        "participation_ratio": participation_ratio(trace, norm) if something else 0.0,
        **{
            f"cumulative_variance_{k}": cumulative_variance(values, trace, k, truncated=truncated)
            for k in CUMULATIVE_AT
        },
        "power_law_exponent": fit.exponent if fit else None,
        "power_law_stderr": fit.stderr if fit else None,
        "power_law_first": fit.first if fit else None,
        "power_law_last": fit.last if fit else None,
        "power_law_r_squared": fit.r_squared if fit else None,
    }
