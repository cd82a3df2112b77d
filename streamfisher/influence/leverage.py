"""How much of a damped Fisher hangs on each sample.

With the rows `g'_i` that make up `F = (1/n) sum_i g'_i g'_i^T`, and K their Gram, the ridge leverage score

    h_i(lambda) = (1/n) g'_i^T (F + lambda I)^-1 g'_i = [K (K + lambda n I)^-1]_ii

lies between 0 and 1, and its sum is the effective dimension `sum_j lambda_j / (lambda_j + lambda)`.

Source: A. Alaoui and M. Mahoney, "Fast randomized kernel ridge regression with statistical guarantees", NeurIPS 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def _shares(values: np.ndarray, damping: float, floor: float) -> np.ndarray:
    """Return `lambda_j / (lambda_j + damping)`; without damping, 1 above the noise floor and 0 below."""
    if damping == 0.0:
        return (values > floor).astype(np.float64)
    return values / (values + damping)


def leverage_scores(
    vectors: np.ndarray, values: np.ndarray, dampings: Sequence[float] | np.ndarray, floor: float = 0.0
) -> np.ndarray:
    """Return the leverage scores of all samples: (len(dampings), n) float64.

    Args:
        vectors: (n, r) float64, eigenvectors of K as columns.
        values: (r,) float64, eigenvalues of F = those of K over n.
        dampings: lambda, in the units of `values`, not negative; 0 takes the pseudo-inverse.
        floor: eigenvalues that are not above it count as zero where the damping is 0.
    """
    shares = np.stack([_shares(values, damping, floor) for damping in dampings])
    found: np.ndarray = shares @ np.square(vectors).T
    return found


def effective_dimension(values: np.ndarray, dampings: Sequence[float] | np.ndarray, floor: float = 0.0) -> np.ndarray:
    """Return `d_lambda`, the sum of all leverage scores, for each damping: (len(dampings),) float64."""
    return np.array([_shares(values, damping, floor).sum() for damping in dampings])
