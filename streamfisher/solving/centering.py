"""Centering is a congruence: the Gram of centered rows from that of uncentered ones, and back."""

from __future__ import annotations

import numpy as np


def center(K: np.ndarray) -> np.ndarray:
    """Return H K H, the Gram of centered rows: row and column means removed."""
    means = K.mean(axis=0)
    centered = K - means[None, :] - means[:, None] + means.mean()
    return (centered + centered.T) / 2


def uncenter(K: np.ndarray, mean_products: np.ndarray) -> np.ndarray:
    """Return the Gram of rows `c_i + m` from that of rows `c_i`.

    Args:
        K: (N, N), `<c_i, c_j>`.
        mean_products: (N + 1,), `<c_i, m>` and, last, `<m, m>`.
    """
    products = mean_products[:-1]
    return K + products[None, :] + products[:, None] + mean_products[-1]
