"""Leading eigenpairs of a symmetric positive semi-definite operator that is only ever multiplied with: block Lanczos.

The basis Q (n, m) grows by one block of b columns per product: the residuals of the leading Ritz pairs that have not
converged, orthogonalised against all of Q (twice, and once more after they are normalised: one pass of Gram-Schmidt
gives ghost eigenvalues). As long as Q is a Krylov space these residuals span just the next Lanczos block, so this is
block Lanczos with full reorthogonalisation; unlike a three-term recurrence it stays so after a thick restart
(K. Wu and H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal. Appl.
22(2), 2000) and after a random block was put in. A q is kept for every q, so Ritz values are Rayleigh quotients.

What the residual says: there is an eigenvalue of A within `|A v - theta v|` of theta (Weyl). That none was *missed* in
between cannot be read off a residual; after convergence fresh random blocks are put in, which find a repeated
eigenvalue or a direction that the start did not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from streamfisher.errors import ConvergenceError

#: Residuals, relative to lambda_1, at which an eigenpair counts as converged; its eigenvalue is far closer
#: (`residual^2 / gap`).
TOLERANCE = 1e-11
#: Products with a block after which the search is given up.
MAX_STEPS = 500
#: Products spent, after convergence, on blocks that start at random.
_CONFIRMING = 3


class SymmetricOperator(Protocol):
    """A symmetric positive semi-definite matrix A, by its products."""

    n: int
    n_samples: int  # N: the eigenvalues of a Fisher are those of A over it

    def matvec(self, X: np.ndarray) -> np.ndarray:
        """Return A X, (n, b) float64."""


class DenseOperator:
    """A matrix in memory.

    Args:
        K: (n, n) float64.
        n_samples: N, where it is the side of the parameters; `None` means n.
    """

    def __init__(self, K: np.ndarray, n_samples: int | None = None):
        self.K, self.n = K, len(K)
        self.n_samples = self.n if n_samples is None else n_samples

    def matvec(self, X: np.ndarray) -> np.ndarray:
        """Return K X."""
        return self.K @ X


@dataclass(frozen=True)
class Leading:
    """The k largest eigenvalues of an operator, with what is known of their error."""

    values: np.ndarray  # (k,) float64, descending, not negative
    vectors: np.ndarray  # (n, k) float64, orthonormal columns
    residuals: np.ndarray  # (k,) float64, |A v - lambda v| by a product of their own: an eigenvalue lies within it
    products: int  # columns that A was multiplied with
    steps: int  # products with a block, that is, passes over A


def leading(
    operator: SymmetricOperator,
    k: int,
    *,
    tolerance: float = TOLERANCE,
    block: int | None = None,
    max_steps: int = MAX_STEPS,
    seed: int = 42,
) -> Leading:
    """Return the `k` largest eigenvalues of `operator`, their eigenvectors and residuals.

    Args:
        operator: A, (n, n).
        k: how many; at most n.
        tolerance: largest residual, relative to the largest eigenvalue.
        block: columns per product, b; `None` means k / 4, between 8 and 64.
        max_steps: products with a block after which to give up.
        seed: of the random start.

    Raises:
        ConvergenceError: `max_steps` were not enough, or a product is not finite; the message says how far it came.
    """
    n = operator.n
    k = min(k, n)
    if k < 1:
        return Leading(np.zeros(0), np.zeros((n, 0)), np.zeros(0), 0, 0)
    search = _Search(operator, k, block, seed)
    converging, confirming = False, _CONFIRMING
    for _ in range(max_steps):
        search.extend()
        residuals = search.residual_norms()
        converged = search.m >= k and residuals[:k].max() <= tolerance * max(search.theta[0], np.finfo(float).tiny)
        if search.m == n or (converged and confirming == 0):
            return search.result(tolerance)
        if converged:
            # Confirming blocks follow one another, so that each is a Krylov step from the random one before it.
            search.confirm(first=not converging)
            converging, confirming = True, confirming - 1
        else:
            if converging:  # they found something: begin again
                converging, confirming = False, _CONFIRMING
            search.follow(residuals > tolerance * search.theta[0])
    raise ConvergenceError(
        f"{k} leading eigenvalues of a {n} x {n} matrix did not converge in {max_steps} block Lanczos steps: largest "
        f"residual {residuals[:k].max() / max(search.theta[0], np.finfo(float).tiny):.1e} of the largest eigenvalue, "
        f"{tolerance:.0e} was asked for. Ask for fewer (--top-k), or for all with --solver dense where they fit."
    )


class _Search:
    """A basis Q with A Q and the Ritz pairs in it."""

    def __init__(self, operator: SymmetricOperator, k: int, block: int | None, seed: int):
        self.operator, self.k, self.n = operator, k, operator.n
        self.b = min(block or min(max(k // 4, 8), 64), self.n)
        self.limit = min(self.n, 2 * k + 8 * self.b)
        self.Q = np.empty((self.n, self.limit), order="F")
        self.AQ = np.empty((self.n, self.limit), order="F")
        self.T = np.zeros((self.limit, self.limit))
        self.generator = np.random.Generator(np.random.PCG64(seed))
        self.m = self.products = self.steps = 0
        self.exponent: int | None = None  # A is divided by this power of two, which is exact
        self.theta, self.Y = np.zeros(0), np.zeros((0, 0))
        self.next = self._orthonormal(self.generator.standard_normal((self.n, self.b)))

    def extend(self) -> None:
        """Take the next block into the basis, multiply it, and solve the projected problem."""
        X = self.next
        if self.m + X.shape[1] > self.limit:
            self._restart()
            X = X[:, : self.limit - self.m]
        new = slice(self.m, self.m + X.shape[1])
        self.Q[:, new], self.AQ[:, new] = X, self._apply(X)
        self.m = new.stop
        part = self.Q[:, : self.m].T @ self.AQ[:, new]
        self.T[: self.m, new], self.T[new, : self.m] = part, part.T
        T = self.T[: self.m, : self.m]
        theta, Y = np.linalg.eigh((T + T.T) / 2)
        self.theta, self.Y = theta[::-1], Y[:, ::-1]

    def residual_norms(self) -> np.ndarray:
        """Form the residuals of the leading Ritz pairs, k and one block more, and return their norms."""
        lead = self.Y[:, : min(self.m, self.k + self.b)]
        self.residuals = self.AQ[:, : self.m] @ lead - (self.Q[:, : self.m] @ lead) * self.theta[: lead.shape[1]]
        return np.linalg.norm(self.residuals, axis=0)

    def follow(self, open_pairs: np.ndarray) -> None:
        """Let the next block be the residuals of the first pairs that have not converged."""
        chosen = np.flatnonzero(open_pairs)[: self.b]
        self.next = self._orthonormal(self.residuals[:, chosen])

    def confirm(self, *, first: bool) -> None:
        """Let the next block be random, or, after one, the step that follows from it."""
        if first:
            self.next = self._orthonormal(np.zeros((self.n, 0)))
        else:
            self.next = self._orthonormal(self.AQ[:, self.m - self.next.shape[1] : self.m])

    def result(self, tolerance: float) -> Leading:
        """Return the Ritz pairs with residuals by a product of their own."""
        V = self.Q[:, : self.m] @ self.Y[:, : self.k]
        V, _ = np.linalg.qr(V)
        AV = self._apply(V)
        values = np.einsum("ij,ij->j", V, AV)
        order = np.argsort(values, kind="stable")[::-1]
        values, V, AV = values[order], V[:, order], AV[:, order]
        residuals = np.linalg.norm(AV - V * values, axis=0)
        drift = max(residuals.max(), np.abs(values - self.theta[: len(values)]).max())
        if drift > 100 * max(tolerance, 1e-14 * self.n**0.5) * max(values[0], np.finfo(float).tiny):
            raise ConvergenceError(
                f"the operator does not repeat its products: {len(values)} eigenpairs had converged and are off by "
                f"up to {drift / max(self.theta[0], np.finfo(float).tiny):.1e} of the largest eigenvalue when they are "
                "multiplied again."
            )
        exponent = self.exponent or 0
        values, residuals = np.ldexp(np.maximum(values, 0.0), exponent), np.ldexp(residuals, exponent)
        return Leading(values, V, residuals, self.products, self.steps)

    def _apply(self, X: np.ndarray) -> np.ndarray:
        W = np.asarray(self.operator.matvec(X), dtype=np.float64)
        self.products, self.steps = self.products + X.shape[1], self.steps + 1
        if not np.isfinite(W).all():
            raise ConvergenceError("a product with the matrix is not finite: something stored is damaged.")
        if self.exponent is None:
            peak = float(np.abs(W).max())
            self.exponent = int(np.floor(np.log2(peak))) if peak > 0 else 0
        return np.ldexp(W, -self.exponent) if self.exponent else W

    def _restart(self) -> None:
        """Keep the leading Ritz vectors only, as many as leave room for four blocks."""
        keep = max(self.limit - 4 * self.b, min(self.k, self.limit - self.b))
        Y = self.Y[:, :keep]
        self.Q[:, :keep], self.AQ[:, :keep] = self.Q[:, : self.m] @ Y, self.AQ[:, : self.m] @ Y
        self.T[:] = 0.0
        self.T[np.arange(keep), np.arange(keep)] = self.theta[:keep]
        self.m = keep

    def _orthonormal(self, W: np.ndarray) -> np.ndarray:
        """Return b orthonormal columns that are orthogonal to the basis: those of `W`, and random ones for the rest."""
        width = min(self.b, self.n - self.m)
        Q = self.Q[:, : self.m]
        norms = np.linalg.norm(W, axis=0)
        W = W[:, norms > 0] / norms[norms > 0]
        U = np.empty((self.n, 0))
        for _ in range(3):
            for _ in range(2):
                W = W - Q @ (Q.T @ W) - U @ (U.T @ W)
            left, sizes, _ = np.linalg.svd(W, full_matrices=False)
            U = np.concatenate([U, left[:, sizes > 1e-10]], axis=1)[:, :width]
            if U.shape[1] == width:
                break
            W = self.generator.standard_normal((self.n, width - U.shape[1])) / self.n**0.5
        U = U - Q @ (Q.T @ U)
        return np.linalg.qr(U)[0]
