"""Centering is a congruence: the Gram of centered rows from that of uncentered ones, and back."""

from __future__ import annotations

import numpy as np

#: Of the largest squared norm of a row: what rounding can put on an entry of a float64 Gram that is centered. Rows that
#: differ by less than 1e-7 of themselves do not stand out from it.
CENTERING_ROUNDING = 64 * float(np.finfo(np.float64).eps)


def center(K: np.ndarray) -> np.ndarray:
    """Return H K H, the Gram of centered rows: row and column means removed."""
    means = K.mean(axis=0)
    centered = K - means[None, :] - means[:, None] + means.mean()
    return without_rounding((centered + centered.T) / 2, K)


def without_rounding(centered: np.ndarray, K: np.ndarray) -> np.ndarray:
    """Return a centered matrix, or zeros where nothing but the rounding of the subtraction is left of it.

    Rows that are all the same have a covariance of zero; what is left instead has no shape, is not positive
    semi-definite, and would be taken for eigenvalues.

    Args:
        centered: (n, n).
        K: what it was made of.
    """
    largest = float(K.diagonal().max(initial=0.0))
    rounding = float(np.abs(centered).max(initial=0.0)) <= CENTERING_ROUNDING * largest
    return np.zeros_like(centered) if rounding else centered


def uncenter(K: np.ndarray, mean_products: np.ndarray) -> np.ndarray:
    """Return the Gram of rows `c_i + m` from that of rows `c_i`.

    Args:
        K: (N, N), `<c_i, c_j>`.
        mean_products: (N + 1,), `<c_i, m>` and, last, `<m, m>`.
    """
    products = mean_products[:-1]
    return K + products[None, :] + products[:, None] + mean_products[-1]
