r"""How much of a direction in parameter space lies in the leading eigenspace of a Fisher, from products with rows.

With `K = G' G'^T = U diag(d) U^T`, the leading eigenvectors are `v_j = G'^T u_j / sqrt(d_j)`, so of any direction t the
share of eigenvector j is

    (v_j^T t)^2 / |t|^2 = (u_j^T G' t)^2 / (d_j |t|^2)

and only `G' t` and `|t|` are needed. For the mean gradient both are in the Gram.

Source: the share of the gradient in the top eigenspace: G. Gur-Ari, D. Roberts and E. Dyer, "Gradient descent happens
in a tiny subspace", 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streamfisher.solving.lanczos import DenseOperator, leading


@dataclass(frozen=True)
class Directions:
    """Directions, by their products with the gradients g_i of the selected samples, neither centered nor weighted."""

    products: np.ndarray  # (n, m) float64
    squared_norms: np.ndarray  # (m,) float64


def mean_direction(raw: np.ndarray, weights: np.ndarray) -> Directions:
    """Return the (weighted) mean gradient as a direction.

    Args:
        raw: (n, n) float64, the Gram of the gradients.
        weights: (n,) float64, positive.
    """
    p = weights / weights.sum()
    products = raw @ p
    return Directions(products[:, None], np.array([max(float(p @ products), 0.0)]))


def joined(parts: list[Directions]) -> Directions:
    """Return all directions of several."""
    return Directions(
        np.concatenate([part.products for part in parts], axis=1),
        np.concatenate([part.squared_norms for part in parts]),
    )


def shares_of(
    vectors: np.ndarray, values: np.ndarray, directions: Directions, scale: np.ndarray, weights: np.ndarray | None
) -> np.ndarray:
    """Return the share of each eigenvector in each direction: (m, k) float64; 0 of a direction that is zero.

    Args:
        vectors: (n, k) float64, eigenvectors of K.
        values: (k,) float64, positive: their eigenvalues d.
        directions: m of them.
        scale: (n,) float64: `g'_i = scale_i g_i`, before centering.
        weights: (n,) of the mean that is taken from rows; `None` where they are not centered.
    """
    products = directions.products
    if weights is not None:
        products = products - (weights @ products) / weights.sum()
    squares = np.square(vectors.T @ (scale[:, None] * products)) / values[:, None]
    sizes = directions.squared_norms
    return np.divide(squares, sizes, out=np.zeros_like(squares), where=sizes > 0).T


def resampled_shares(
    raw: np.ndarray,
    directions: Directions,
    weights: np.ndarray,
    top: int,
    *,
    center: bool,
    of_mean: bool,
    n_resamples: int,
    seed: int,
) -> np.ndarray:
    """Return the share in the `top` leading eigenvectors in resamples of the samples: (R, m) float64.

    Resample r draws n samples with replacement by a generator seeded with (seed, r).

    Args:
        raw: (n, n) float64, the Gram of the gradients.
        directions: that stay as they are.
        weights: (n,) float64, positive.
        top: k.
        center: of the covariance.
        of_mean: put the resample's own mean gradient before `directions`.
        n_resamples: R.
        seed: of the draws.
    """
    n = len(raw)
    found = []
    for resample in range(n_resamples):
        generator = np.random.Generator(np.random.PCG64([seed, resample]))
        counts = np.bincount(generator.integers(0, n, n), minlength=n)
        there = np.flatnonzero(counts)
        w, K = weights[there] * counts[there], raw[np.ix_(there, there)]
        scale = np.sqrt(w)
        rows = K
        if center:
            p = w / w.sum()
            means = K @ p
            rows = K - means[None, :] - means[:, None] + p @ means
        solved = leading(DenseOperator(rows * scale[:, None] * scale), min(top, len(there)), seed=seed)
        keep = solved.values > 0
        of_these = Directions(directions.products[there], directions.squared_norms)
        every = joined([mean_direction(K, w), of_these]) if of_mean else of_these
        shares = shares_of(solved.vectors[:, keep], solved.values[keep], every, scale, w if center else None)
        found.append(shares.sum(axis=1))
    return np.stack(found)
