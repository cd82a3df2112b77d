r"""The damped inverse of a Fisher between gradients, from sample space: exact, and never larger than N x N.

With `F = (1/n) G'^T G'`, `K = G' G'^T` and the push-through identity,

    G' (F + lambda I)^-1 = n (K + lambda n I)^-1 G'

so for a training gradient `g_i = g'_i / s_i` and any gradient q, of which only the products `G' q` are needed,

    g_i^T (F + lambda I)^-1 q = (n / s_i) [(K + lambda n I)^-1 G' q]_i

For a covariance the rows are `g'_i = s_i (g_i - m)`, and the mean's own part, with `G' m` and `m^T q`, is added by
Woodbury's identity: `m^T (F + lambda I)^-1 q = (m^T q - (G' m)^T (K + lambda n I)^-1 G' q) / lambda`.

Without damping the pseudo-inverse is taken over the eigenvalues above the noise floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from streamfisher.errors import ConvergenceError
from streamfisher.solving.eigen import decompose
from streamfisher.solving.lanczos import SymmetricOperator

#: So many dampings are solved one by one; more, by one eigendecomposition.
_FEW = 16
#: Residual of a solution that is found by products with K only, relative; and products after which it is given up.
_RESIDUAL, _MOST_STEPS = 1e-11, 2000


@dataclass(frozen=True)
class MeanProducts:
    """What is needed of the mean m that was taken from the rows."""

    rows: np.ndarray  # G' m, (n,) float64
    queries: np.ndarray  # m^T q, (Q,) float64


def damped_products(
    K: np.ndarray | SymmetricOperator,
    products: np.ndarray,
    scale: np.ndarray,
    dampings: Sequence[float] | np.ndarray,
    *,
    floor: float = 0.0,
    mean: MeanProducts | None = None,
) -> np.ndarray:
    """Return `q^T (F + lambda I)^-1 g_i` for all queries, training samples and dampings: (m, Q, n) float64.

    Args:
        K: (n, n) float64, the Gram of the rows g'_i; or by its products only, and then no damping may be 0.
        products: (n, Q) float64, `G' q`.
        scale: (n,) float64, positive: s_i.
        dampings: not negative; 0 takes the pseudo-inverse.
        floor: eigenvalues of F that are not above it are left out of a pseudo-inverse.
        mean: where rows are centered.
    """
    n = len(products)
    right = products if mean is None else np.concatenate([products, mean.rows[:, None]], axis=1)
    solve = _solver(K, right, dampings, floor) if isinstance(K, np.ndarray) else _iterative_solver(K, right)
    found = np.empty((len(dampings), products.shape[1], n))
    for place, damping in enumerate(dampings):
        once, twice = solve(float(damping))
        found[place] = (n * once[:, : products.shape[1]] / scale[:, None]).T
        if mean is not None:
            if damping:
                part = (mean.queries - once[:, -1] @ products) / damping
            else:  # m^T F^+ q = n (G' m)^T K^+ K^+ G' q
                part = n * twice[:, -1] @ products
            found[place] += part[:, None]
    return found


def _iterative_solver(K: SymmetricOperator, right: np.ndarray) -> Callable[[float], tuple[np.ndarray, np.ndarray]]:
    """Return damping -> `(K + damping n I)^-1 right`, twice, by conjugate gradients of all columns together.

    Each step is one product with K. The last solution is where the next damping starts.
    """
    last: list[np.ndarray] = []

    def solve(damping: float) -> tuple[np.ndarray, np.ndarray]:
        shift = K.n * damping
        X = last[0].copy() if last else np.zeros_like(right)
        R = right - (K.matvec(X) + shift * X) if last else right.copy()
        P, squares = R.copy(), np.square(R).sum(axis=0)
        enough = np.square(_RESIDUAL) * np.square(right).sum(axis=0)
        for _ in range(_MOST_STEPS):
            going = squares > enough
            if not going.any():
                last[:] = [X]
                return X, X
            A = K.matvec(P) + shift * P
            curvature = np.einsum("ij,ij->j", P, A)
            alpha = np.where(going, squares / np.where(curvature > 0, curvature, np.inf), 0.0)
            X += alpha * P
            R -= alpha * A
            before, squares = squares, np.square(R).sum(axis=0)
            P = R + np.where(going, squares / np.where(before > 0, before, 1.0), 0.0) * P
        worst = float(np.sqrt((squares / np.maximum(enough, np.finfo(float).tiny)).max())) * _RESIDUAL
        raise ConvergenceError(
            f"the damped inverse at {damping:.3g} did not converge in {_MOST_STEPS} products with the Gram: residual "
            f"{worst:.1e}, and {_RESIDUAL:.0e} was asked for. Take a larger damping, fewer samples, or more memory."
        )

    return solve


def _solver(
    K: np.ndarray, right: np.ndarray, dampings: Sequence[float] | np.ndarray, floor: float
) -> Callable[[float], tuple[np.ndarray, np.ndarray]]:
    """Return damping -> `(K + damping n I)^-1 right`, and for none `K^+ right` and `K^+ K^+ right`."""
    n = len(K)
    if len(dampings) <= _FEW and all(dampings):
        whole, rhs = torch.from_numpy(K), torch.from_numpy(np.ascontiguousarray(right))
        factors = []
        for damping in dampings:
            damped = whole.clone()
            damped.diagonal().add_(n * damping)
            factor, failed = torch.linalg.cholesky_ex(damped)
            if int(failed):  # rounding has made negative eigenvalues that are larger than the damping
                break
            factors.append(torch.cholesky_solve(rhs, factor).numpy())
        else:
            solved = dict(zip(map(float, dampings), factors, strict=True))
            return lambda damping: (solved[damping], solved[damping])
    eigenvalues, U = decompose(K)
    d, projected = eigenvalues.values, U.T @ right

    def solve(damping: float) -> tuple[np.ndarray, np.ndarray]:
        if damping:
            once = U @ (projected / (d + n * damping)[:, None])
            return once, once
        inverse = np.where(d > n * floor, 1.0 / np.where(d > 0, d, 1.0), 0.0)[:, None]
        return U @ (projected * inverse), U @ (projected * inverse**2)

    return solve
