"""The spectral density of a block by stochastic Lanczos quadrature, with its error: no eigenvalue is solved for.

For a random unit vector v, m steps of Lanczos give a Gauss quadrature of the spectral measure of v: nodes theta_j (Ritz
values) and weights tau_j (squared first components of their eigenvectors), sum_j tau_j = 1, with

    E_v sum_j tau_j f(theta_j) ~ (1/n) sum_i f(lambda_i)

exact for polynomials f of degree 2m - 1. With f a Gaussian of width sigma around t, times n, this is the density of
eigenvalues around t. All vectors advance together, so that one pass over the matrix serves them all; each keeps its
whole basis and is orthogonalised against it twice.

References: L. Lin, Y. Saad and C. Yang, "Approximating spectral densities of large matrices", SIAM Review 58(1), 2016;
B. Ghorbani, S. Krishnan and Y. Xiao, "An investigation into neural net optimization via Hessian eigenvalue density",
ICML 2019 (arXiv 1901.10159).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from streamfisher.errors import ConfigError, CorruptRunError
from streamfisher.results.analyses import Scale, SpectralDensity
from streamfisher.solving.lanczos import SymmetricOperator

#: Points of the grid per width sigma of the Gaussians.
_RESOLUTION = 5
#: A log scale ends at this fraction of the largest Ritz value: what lies below is counted, not placed.
_LOG_FLOOR = 1e-12


def spectral_density(
    operator: SymmetricOperator,
    *,
    block: str,
    n_vectors: int = 10,
    n_steps: int = 80,
    sigma: float | None = None,
    scale: Scale = "log",
    zeros: int = 0,
    side: str = "samples",
    seed: int = 42,
) -> SpectralDensity:
    """Estimate the density of the eigenvalues of a Fisher: those of `operator` over its `n_samples`.

    Args:
        operator: K, (n, n), or the side of the parameters.
        block: its name, for the result.
        n_vectors: random vectors; the standard error falls with their root.
        n_steps: of Lanczos, at most n; features narrower than about the spectrum's width over them are smoothed.
        sigma: width of the Gaussians in units of the grid; `None` means 0.1 decades, or 1 % of a linear scale.
        scale: of the grid: 'log' (base 10) or 'linear'.
        zeros: so many of the n eigenvalues are exact zeros by the shape of the block (n - P where P < n); left out.
        side: which side the operator is of.
        seed: of the vectors.

    Raises:
        ConfigError: a number is out of range.
        CorruptRunError: a product is not finite.
    """
    _check(n_vectors, n_steps, sigma, scale)
    n = operator.n
    rules = quadrature(operator, n_vectors, min(n_steps, n), seed)
    full, half = ((np.maximum(nodes / operator.n_samples, 0.0), n * weights) for nodes, weights in rules)
    largest = float(full[0].max())
    floor = largest * _LOG_FLOOR if scale == "log" else -1.0
    used = full[0][(full[1] > 0) & (full[0] > floor)]
    used = used if len(used) else np.ones(1)  # a zero matrix on a log scale: nothing is to be placed
    used = np.log10(used) if scale == "log" else used
    width = sigma or (0.1 if scale == "log" else max(float(used.max()), np.finfo(float).tiny) / 100)
    low, high = float(used.min()) - 6 * width, float(used.max()) + 6 * width
    low = min(low, -6 * width) if scale == "linear" and zeros else low
    grid = np.linspace(low, high, max(int(np.ceil((high - low) / width * _RESOLUTION)), 2) + 1)
    if scale == "log":
        edges = 10.0 ** np.arange(np.floor(used.min()), np.floor(used.max()) + 2)
    else:
        edges = np.linspace(0.0, max(largest, np.finfo(float).tiny), 11)
    place = _Placing(scale, floor, grid, width, edges, zeros)
    density, counts, below = place(*full)
    half_density, half_counts, _ = place(*half)
    root = n_vectors**0.5
    return SpectralDensity(
        block=block,
        grid=grid,
        density=density.mean(axis=0),
        standard_error=density.std(axis=0, ddof=1) / root,
        quadrature_error=np.abs(half_density.mean(axis=0) - density.mean(axis=0)),
        edges=edges,
        counts=counts.mean(axis=0),
        count_errors=counts.std(axis=0, ddof=1) / root,
        count_quadrature_errors=np.abs(half_counts.mean(axis=0) - counts.mean(axis=0)),
        below=float(below.mean()),
        below_standard_error=float(below.std(ddof=1)) / root,
        n_eigenvalues=n - zeros,
        n_vectors=n_vectors,
        n_steps=min(n_steps, n),
        sigma=float(width),
        scale=scale,
        seed=seed,
        solved_side=side,
    )


@dataclass(frozen=True)
class _Placing:
    """Puts the nodes of each vector's quadrature where they belong on the scale."""

    scale: Scale
    floor: float
    grid: np.ndarray
    width: float
    edges: np.ndarray
    zeros: int

    def __call__(self, nodes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the density (R, g), the counts between edges (R, b) and what lies below (R,) of each vector."""
        inside = np.where(nodes > self.floor, weights, 0.0)
        counts = np.stack([np.histogram(v, self.edges, weights=w)[0] for v, w in zip(nodes, inside, strict=True)])
        if self.scale == "log":
            places = np.log10(np.where(nodes > self.floor, nodes, 1.0))
            density = np.stack([self._smooth(v, w) for v, w in zip(places, inside, strict=True)])
            return density, counts, (weights - inside).sum(axis=1) - self.zeros
        density = np.stack([self._smooth(v, w) for v, w in zip(nodes, inside, strict=True)])
        if self.zeros:
            density = density - self._smooth(np.zeros(1), np.full(1, float(self.zeros)))
            counts[:, 0] -= self.zeros
        return density, counts, np.zeros(len(nodes))

    def _smooth(self, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the sum of weighted Gaussians on the grid, each with a trapezoidal integral of exactly its weight."""
        bumps = np.exp(-0.5 * ((self.grid[None, :] - places[weights > 0, None]) / self.width) ** 2)
        total = np.trapezoid(bumps, self.grid, axis=1)
        return (weights[weights > 0] / total) @ bumps


def quadrature(
    operator: SymmetricOperator, n_vectors: int, n_steps: int, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return nodes and weights, (R, m) each, of the spectral measures of R random unit vectors; weights sum to 1.

    The second pair is of half as many steps, which are the first half of the same. A vector whose Krylov space ends
    early (fewer distinct eigenvalues than steps) has weights of 0 from there on.

    Raises:
        CorruptRunError: a product is not finite.
    """
    n = operator.n
    generator = np.random.Generator(np.random.PCG64(seed))
    V = generator.standard_normal((n, n_vectors))
    V /= np.linalg.norm(V, axis=0)
    basis = np.zeros((n_steps, n_vectors, n))  # one vector's basis is contiguous along its steps
    alpha, beta = np.zeros((n_vectors, n_steps)), np.zeros((n_vectors, n_steps))
    steps = np.full(n_vectors, n_steps)
    for step in range(n_steps):
        basis[step] = V.T
        W = operator.matvec(V)
        if not np.isfinite(W).all():
            raise CorruptRunError("a product with the matrix is not finite: something stored is damaged.")
        alpha[:, step] = np.einsum("nr,nr->r", V, W)
        V = np.zeros_like(W)
        for r in np.flatnonzero(steps == n_steps):
            known, w = basis[: step + 1, r], W[:, r]
            size = np.linalg.norm(w)
            for _ in range(2):
                w = w - known.T @ (known @ w)
            norm = np.linalg.norm(w)
            if norm <= 1e-13 * max(size, abs(alpha[r]).max()):  # the space is invariant: the quadrature is exact
                steps[r] = step + 1
                continue
            beta[r, step], V[:, r] = norm, w / norm
        if not (steps == n_steps).any():
            break
    return _rule(alpha, beta, steps), _rule(alpha, beta, np.minimum(steps, max(n_steps // 2, 1)))


def _rule(alpha: np.ndarray, beta: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of the Gauss quadratures of tridiagonal matrices, cut to so many `steps` each."""
    nodes, weights = np.zeros_like(alpha), np.zeros_like(alpha)
    for r, m in enumerate(steps):
        off = beta[r, : m - 1]
        values, vectors = np.linalg.eigh(np.diag(alpha[r, :m]) + np.diag(off, 1) + np.diag(off, -1))
        nodes[r, :m], weights[r, :m] = values, vectors[0] ** 2 / np.sum(vectors[0] ** 2)
    return nodes, weights


def _check(n_vectors: int, n_steps: int, sigma: float | None, scale: str) -> None:
    if n_vectors < 2:
        raise ConfigError(f"{n_vectors} vectors leave no error to estimate; 10 are usual, 2 the least.")
    if n_steps < 2:
        raise ConfigError(f"{n_steps} Lanczos steps are too few; 80 are usual, 2 the least.")
    if sigma is not None and not 0 < sigma < float("inf"):
        raise ConfigError(f"sigma={sigma} is the width of a Gaussian and must be positive.")
    if scale not in get_args(Scale):
        raise ConfigError(f"scale={scale!r} is unknown; choose log or linear.")
