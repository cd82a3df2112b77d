r"""The spectrum without each of the samples in turn, for all of them at once, from one eigendecomposition.

Without sample i the matrix `S = n F` loses `rho_i g'_i g'_i^T`, where `g'_i` are the (centered, weighted) rows:
`rho_i = 1`, and for the covariance `rho_i = W / (W - w_i)`, as the mean moves too. With `K = U diag(d) U^T` the Gram of
those rows, everything follows from

    phi_i(s) = det(S_without_i + s) / det(S + s) = rho_i (z_i + sum_j u_ij^2 s / (d_j + s))

over the eigenvalues above the noise floor, with `z_i = 1 / rho_i - sum_j u_ij^2` for the others, which count as zero:

- the trace loses `rho_i K_ii`;
- the largest eigenvalue mu is the one root of `phi_i(-mu) = 0` between d_2 and d_1;
- a sum `sum_k f(mu_k)` needs no roots: `log phi_i` along the negative axis gives it. For the entropy,

      sum_k mu_k log mu_k - sum_j d_j log d_j = integral_0^inf [ -rho_i K_ii / (1 + s) + s phi_i'(s) / phi_i(s) ] ds

  and after `s = e^t` the integrand is analytic in the strip `|Im t| < pi`, so the trapezoidal rule with a step of 1/2
  is exact to rounding (its error falls as `exp(-2 pi^2 / step)`). All nodes of all samples are two matrix products.

Source: the secular equation of G. Golub, "Some modified matrix eigenvalue problems", SIAM Review 15, 1973; the rule:
L. N. Trefethen and J. A. C. Weideman, "The exponentially convergent trapezoidal rule", SIAM Review 56, 2014.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Samples whose roots are looked for together.
_TILE = 256
#: Nodes of the integral: `log s` of the scaled matrix, whose largest eigenvalue is 1.
_STEP, _REACH = 0.5, 42.0
_MOST_STEPS = 200


@dataclass(frozen=True)
class Deletion:
    """What is left of S = n F without each sample."""

    largest: np.ndarray  # (n,) float64, the largest eigenvalue of S without sample i
    lost: np.ndarray  # (n,) float64, by how much it is smaller than that of S: exact also where it is tiny
    trace: np.ndarray  # (n,) float64, of S without sample i
    effective_rank: np.ndarray  # (n,) float64, exp of the entropy of its eigenvalues; at least 1


def leave_one_out(vectors: np.ndarray, values: np.ndarray, rho: np.ndarray, diagonal: np.ndarray) -> Deletion:
    """Return largest eigenvalue, trace and effective rank of S without each sample.

    Args:
        vectors: (n, r) float64, orthonormal eigenvectors of K as columns: those above the noise floor.
        values: (r,) float64, descending, positive: their eigenvalues.
        rho: (n,) float64, how often a sample's row is taken out.
        diagonal: (n,) float64, of K, whose trace is that of S.
    """
    n = len(diagonal)
    trace = np.maximum(diagonal.sum() - rho * diagonal, 0.0)
    if not len(values):
        return Deletion(np.zeros(n), np.zeros(n), trace, np.ones(n))
    squares = np.square(vectors)
    null = np.maximum(1.0 / rho - squares.sum(axis=1), 0.0)
    lost = values[0] * _lost(squares, values / values[0], null)
    rank = _effective_ranks(squares, values / values[0], null, rho)
    return Deletion(np.maximum(values[0] - lost, 0.0), lost, trace, rank)


def _lost(squares: np.ndarray, d: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Return d_1 - mu_1 of each sample, (n,): the root in [0, d_1 - d_2] of `q_1 / x = sum_j q_j / (d_1 - d_j - x)`.

    The left side falls and the right one rises. A step keeps the term of the next eigenvalue, which has its pole at the
    end, and takes the others for a constant and a term of that pole, with value and slope of their sum at the last
    guess: a quadratic equation. A bracket and bisection stand behind it.
    """
    gaps = np.append(d[0] - d[1:], d[0])  # the last: the null space
    if gaps[0] == 0.0:
        return np.zeros(len(null))
    found = np.empty(len(null))
    for start in range(0, len(null), _TILE):
        stop = start + _TILE
        weights = np.concatenate([squares[start:stop, 1:], null[start:stop, None]], axis=1)
        found[start:stop] = _roots(squares[start:stop, 0], weights, gaps)
    return found


def _roots(first: np.ndarray, weights: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Return the root of each row of a tile.

    Args:
        first: (m,) q_1.
        weights: (m, r) q_j of the others.
        gaps: (r,) ascending, positive: where their poles are.
    """
    low, high = np.zeros(len(first)), np.full(len(first), gaps[0])
    x = high * first / np.maximum(first + weights[:, 0], np.finfo(float).tiny)
    todo = np.flatnonzero(first > 0.0)
    x[first <= 0.0] = 0.0
    for step in range(_MOST_STEPS):
        if not len(todo):
            break
        at, q, away = x[todo], weights[todo], gaps[0] - x[todo]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            inverse = 1.0 / (gaps[1:] - at[:, None])
            parts = q[:, 1:] * inverse
            rest, slope = parts.sum(axis=1), np.einsum("ij,ij->i", parts, inverse)
            difference = first[todo] / at - q[:, 0] / away - rest
            like_next = slope * away**2  # of the weight of the next eigenvalue that would rise as steeply
            guess = _quadratic(first[todo], q[:, 0] + like_next, gaps[0], rest - slope * away)
        difference = np.where(np.isnan(difference), -np.inf, difference)
        low[todo] = np.where(difference >= 0, at, low[todo])
        high[todo] = np.where(difference <= 0, at, high[todo])
        good = (guess > low[todo]) & (guess < high[todo]) & (step % 8 != 7)
        x[todo] = np.where(good, guess, (low[todo] + high[todo]) / 2)
        settled = np.abs(x[todo] - at) <= 2e-16 * at
        todo = todo[~settled & (high[todo] > low[todo])]
    return x


def _quadratic(a: np.ndarray, b: np.ndarray, gap: float, c: np.ndarray) -> np.ndarray:
    """Return the root in (0, gap) of `a / x = b / (gap - x) + c`, without cancellation; NaN where c is infinite.

    There is one whatever the sign of c, as `c x^2 - p x + a gap` is positive at 0 and negative at the gap.
    """
    p = a + b + c * gap
    with np.errstate(invalid="ignore", divide="ignore"):
        root: np.ndarray = 2 * a * gap / (p + np.sqrt(np.maximum(p * p - 4 * c * a * gap, 0.0)))
    return root


def _effective_ranks(squares: np.ndarray, d: np.ndarray, null: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Return exp(H(mu / sum mu)) without each sample, (n,)."""
    rows = squares @ d
    total = d.sum() - rho * rows
    nodes = np.exp(np.arange(-_REACH, _REACH + _STEP, _STEP))
    inverse = 1.0 / (d[:, None] + nodes)
    # s phi' / phi, with numerator and denominator both without cancellation
    numerator = squares @ (d[:, None] * inverse * (nodes * inverse))
    denominator = null[:, None] + squares @ (nodes * inverse)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(denominator > 0, numerator / denominator, 1.0)
    integrand = share - (rho * rows)[:, None] / (1.0 + nodes)
    change = _STEP * (integrand @ nodes)
    entropy_sum = float(np.sum(d * np.log(d))) + change
    rounding = 16 * np.finfo(float).eps * len(d) * d.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        rank = np.exp(np.log(total) - entropy_sum / total)
    return np.where(total > rounding, np.maximum(rank, 1.0), 1.0)
