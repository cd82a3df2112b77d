"""Which samples count, and how much: subsets and weights of a stored run, as operations on its Grams.

With weights `w_i >= 0` and gradient rows `g_i`:

    F = (1/Z) sum_i w_i g_i g_i^T            Z = sum_i w_i        (normalization 'samples')
                                             Z = sum_i w_i T_i    ('tokens', T_i target tokens of sample i)

where the k rows of an input, of labels='expected', count as one sample in Z. The covariance takes `g_i - m` for `g_i`,
with `m = sum_i w_i g_i / sum_i w_i`. Its non-zero eigenvalues are those of `D^(1/2) K D^(1/2) / Z`, with `D = diag(w)`
and K the Gram of (centered) rows: a congruence of a stored matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from streamfisher.errors import ConfigError, DataError
from streamfisher.solving.centering import center, without_rounding

Normalization = Literal["samples", "tokens"]
SampleChoice = slice | Sequence[int] | np.ndarray | None


@dataclass(frozen=True)
class Selection:
    """The samples of one analysis."""

    samples: np.ndarray  # (n,) int64, ascending: numbers of the samples that count
    weights: np.ndarray | None  # (n,) float64, positive; None: 1 each
    denominator: float  # Z
    normalization: Normalization = "samples"
    shares: np.ndarray | None = None  # (n,) float64: what each sample adds to Z; None: its weight
    parts: int = 1  # k: so many samples in a row are one input's, and count as one in Z

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, places: np.ndarray) -> Selection:
        """Return the selection of some of these samples; `places` are indices into `samples`, ascending."""
        shares = self.added()[places]
        weights = None if self.weights is None else self.weights[places]
        return Selection(self.samples[places], weights, float(shares.sum()), self.normalization, shares, self.parts)

    @property
    def inputs(self) -> np.ndarray:
        """Return which input each sample is of: (n,) int64; another one each, but for labels='expected'."""
        return self.samples // self.parts

    def added(self) -> np.ndarray:
        """Return what each sample adds to Z: (n,) float64."""
        if self.shares is not None:
            return self.shares
        return (np.ones(len(self)) if self.weights is None else self.weights) / self.parts

    @property
    def factor(self) -> float:
        """Return n/Z: 1 for equal weights, normalised by samples."""
        return len(self) / self.denominator

    def restrict(self, K: np.ndarray) -> np.ndarray:
        """Return the rows and columns of a (N, N) matrix that belong to the selected samples: (n, n).

        The matrix itself, where that is all of them: a copy would take as long as reading it.
        """
        if len(self.samples) == len(K):  # ascending, and no number twice
            return K
        return K[np.ix_(self.samples, self.samples)]

    def scale(self, K: np.ndarray) -> np.ndarray:
        """Return `(n/Z) D^(1/2) K D^(1/2)` of a restricted Gram: the eigenvalues of F are those of it over n."""
        if self.weights is not None:
            root = np.sqrt(self.weights * self.factor)
            return K * root[:, None] * root[None, :]
        return K if self.factor == 1.0 else K * self.factor

    def scaled_trace(self, K: np.ndarray) -> float:
        """Return the trace of what `scale` gives."""
        if self.weights is not None:
            return float(K.diagonal() @ self.weights) * self.factor
        return float(np.trace(K)) * self.factor

    def center(self, K: np.ndarray) -> np.ndarray:
        """Return the Gram of rows less their (weighted) mean, from the restricted Gram of the rows.

        With `p = w / sum w` it is `(I - 1 p^T) K (I - p 1^T)`.
        """
        if self.weights is None:
            return center(K)
        p = self.weights / self.weights.sum()
        means = K @ p
        centered = K - means[None, :] - means[:, None] + p @ means
        return without_rounding((centered + centered.T) / 2, K)

    def formula(self, center: bool) -> str:
        """Return what the spectrum is of, in the words of the result."""
        weight = "" if self.weights is None else "W "
        rows = ("(G - mean)^T ", "(G - mean)") if center else ("G^T ", "G")
        over = "N" if self.weights is None else "sum(w)"
        if self.normalization == "tokens":
            over = "tokens" if self.weights is None else "sum(w * tokens)"
        return f"({self.parts}/{over}) * {rows[0]}{weight}{rows[1]}"

    def facts(self) -> dict[str, Any]:
        """Return what the metadata of a result says about samples and weights."""
        facts: dict[str, Any] = {"n_samples": len(self), "normalized_by": self.normalization}
        if self.weights is not None:
            total = float(self.weights.sum())
            facts["weights"] = {
                "sum": total,
                "smallest": float(self.weights.min()),
                "largest": float(self.weights.max()),
                "effective_samples": total**2 / float(self.weights @ self.weights),  # Kish
            }
        return facts


def select(
    n_samples: int,
    valid: np.ndarray,
    samples: SampleChoice = None,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    normalization: Normalization = "samples",
    n_targets: np.ndarray | None = None,
    parts: int = 1,
    least: int = 2,
) -> Selection:
    """Return the valid samples that are selected, with their weights.

    Args:
        n_samples: N, the samples of the run.
        valid: (N,) bool, which have a gradient.
        samples: a slice, sample numbers (in any order, repeats count once) or a boolean mask; `None` means all.
        weights: (N,), one for each sample of the run, not only of those selected; samples of weight 0 drop out.
        normalization: divide by samples or by target tokens.
        n_targets: (N,) target tokens of each sample; needed for 'tokens'.
        parts: samples in a row that are one input's, and together count as one.
        least: how many samples must be left.

    Raises:
        ConfigError: `normalization` is unknown.
        DataError: fewer than `least` samples are left, or the weights do not match, are negative or not finite.
    """
    if normalization not in get_args(Normalization):
        raise ConfigError(f"normalization={normalization!r} is unknown; choose samples or tokens.")
    selected = _numbers(n_samples, samples)
    selected = selected[np.asarray(valid, dtype=bool)[selected]]
    chosen: np.ndarray | None = None
    if weights is not None:
        everything = _check_weights(weights, n_samples)
        selected = selected[everything[selected] > 0]
        chosen = everything[selected]
    if len(selected) < least:
        weighed = "" if weights is None else " with a positive weight"
        needed = "a spectrum needs at least 2" if least == 2 else f"at least {least} is needed"
        raise DataError(f"{len(selected)} valid samples{weighed} are selected; {needed}.")
    each = np.ones(len(selected)) if chosen is None else chosen
    if normalization == "tokens":
        if n_targets is None:
            raise DataError("normalization='tokens' needs the number of target tokens of each sample.")
        shares = each * n_targets[selected].astype(np.float64)
        if shares.sum() <= 0:
            raise DataError("normalization='tokens': the selected samples have no target tokens; use 'samples'.")
    else:
        shares = each
    shares = shares / parts
    return Selection(selected, chosen, float(shares.sum()), normalization, shares, parts)


def _numbers(n_samples: int, samples: SampleChoice) -> np.ndarray:
    everything = np.arange(n_samples)
    if samples is None:
        return everything
    if isinstance(samples, slice):
        return np.sort(everything[samples])
    chosen = np.asarray(samples)
    if chosen.size == 0:
        return everything[:0]
    if chosen.dtype.kind not in "iub" or chosen.ndim != 1:
        raise DataError(f"samples must be whole numbers or a mask along one axis, not {chosen.dtype} {chosen.shape}.")
    if chosen.dtype == bool and chosen.shape != (n_samples,):
        raise DataError(f"a mask over samples must have {n_samples} entries, not {chosen.shape}.")
    if chosen.dtype != bool:
        outside = chosen[(chosen < -n_samples) | (chosen >= n_samples)]
        if outside.size:
            raise DataError(f"sample {outside[0]} was selected and the run has samples 0 to {n_samples - 1}.")
    return np.unique(everything[chosen])


def _check_weights(weights: Sequence[float] | np.ndarray, n_samples: int) -> np.ndarray:
    values = np.asarray(weights, dtype=np.float64)
    if values.shape != (n_samples,):
        raise DataError(
            f"weights have the shape {values.shape} and the run has {n_samples} samples; give one weight for each "
            "sample of the run, 0 for those that shall not count."
        )
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if bad.size:
        raise DataError(f"the weight of sample {bad[0]} is {values[bad[0]]}; weights must be finite and not negative.")
    return values
