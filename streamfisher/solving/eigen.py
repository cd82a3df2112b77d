"""Eigenvalues of a symmetric positive semi-definite Gram matrix, with a failure chain that says what happened."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from streamfisher.errors import CorruptRunError
from streamfisher.solving import lanczos

#: Below this size a GPU gains nothing over LAPACK in float64.
_CUDA_SIZE = 4096


@dataclass(frozen=True)
class Eigenvalues:
    """Eigenvalues of one symmetric matrix, all or the largest, and how they were obtained."""

    values: np.ndarray  # (n,) float64, descending, not negative
    solver: str  # which driver gave them
    jitter: float  # what had to be added to the diagonal for it, relative to the mean eigenvalue; 0 normally
    most_negative: float  # the lowest eigenvalue before rounding below zero was cut, relative to the largest or `size`
    residuals: np.ndarray | None = None  # (n,) float64, |K v - lambda v|: bounds of the error; None: all were solved


def solve(
    K: np.ndarray,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "auto",
    regularization: float = 1e-8,
    size: float = 0.0,
) -> Eigenvalues:
    """Return all eigenvalues of `K`.

    Drivers are tried in turn: LAPACK `syevd` (through CUDA where asked for), then torch's own, then LAPACK again with a
    jitter of `max(regularization, 10 eps)` times the mean eigenvalue on the diagonal, which is subtracted from the
    result. `K` itself is never regularised otherwise.

    Args:
        K: (n, n) float64, symmetric.
        dtype: of the solve; float64 unless speed matters more than the tail.
        device: 'auto' solves float64 on the CPU, and float32 on a GPU where there is one and the matrix is large;
            'cuda', 'cuda:1' on that GPU, if there is one; all else on the CPU.
        regularization: relative size of the jitter.
        size: trace of what `K` was made from, where it is a difference: its rounding is relative to that, and may be
            all that is left of it.

    Raises:
        CorruptRunError: `K` is not finite, or has an eigenvalue so negative that it is no Gram matrix.
    """
    if K.shape[0] == 0:
        return Eigenvalues(np.zeros(0), "none", 0.0, 0.0)
    if not np.isfinite(K).all():
        raise CorruptRunError("the matrix to be solved holds NaN or infinite values.")
    # Products of extreme gradients leave the range of the solver's intermediate values; powers of two scale exactly.
    scale = float(np.max(np.abs(K.diagonal())))
    if scale == 0.0:
        return Eigenvalues(np.zeros(K.shape[0]), "zero", 0.0, 0.0)
    exponent = int(np.floor(np.log2(scale)))
    scaled = np.ldexp(K, -exponent)
    values, solver, jitter = _solve_chain(scaled, dtype, device, regularization)
    values = np.ldexp(np.asarray(values, dtype=np.float64)[::-1], exponent)
    return Eigenvalues(np.maximum(values, 0.0), solver, jitter, _most_negative(values, dtype, size))


def decompose(K: np.ndarray, *, size: float = 0.0) -> tuple[Eigenvalues, np.ndarray]:
    """Return all eigenvalues of `K` with their eigenvectors, in float64.

    Args:
        K: (n, n) float64, symmetric; n at least 1.
        size: see `solve`.

    Returns:
        The eigenvalues, and the eigenvectors as the columns of (n, n) float64, in the same order.

    Raises:
        CorruptRunError: `K` is not finite, or has an eigenvalue so negative that it is no Gram matrix.
    """
    if not np.isfinite(K).all():
        raise CorruptRunError("the matrix to be solved holds NaN or infinite values.")
    scale = float(np.max(np.abs(K.diagonal())))
    if scale == 0.0:
        return Eigenvalues(np.zeros(len(K)), "zero", 0.0, 0.0), np.eye(len(K))
    exponent = int(np.floor(np.log2(scale)))
    scaled, solver = np.ldexp(K, -exponent), "lapack-syevd"
    try:
        values, vectors = np.linalg.eigh(scaled)
    except np.linalg.LinAlgError:
        solver = "torch-cpu"
        values, vectors = (found.numpy() for found in torch.linalg.eigh(torch.from_numpy(scaled)))
    values = np.ldexp(values[::-1], exponent)
    most_negative = _most_negative(values, torch.float64, size)
    return Eigenvalues(np.maximum(values, 0.0), solver, 0.0, most_negative), np.ascontiguousarray(vectors[:, ::-1])


def _most_negative(values: np.ndarray, dtype: torch.dtype, size: float) -> float:
    """Return the lowest of descending eigenvalues, relative to the largest or `size`; 0 where none is negative.

    Raises:
        CorruptRunError: it is no rounding.
    """
    negative, of = min(float(values[-1]), 0.0), max(float(values[0]), size)
    if negative:
        negative = negative / of if of > 0 else -np.inf
    tolerance = 100 * torch.finfo(dtype).eps * len(values) + 1e-5
    if negative < -tolerance:
        largest = "the largest" if of == values[0] else "the trace of what it was made from"
        raise CorruptRunError(
            f"the matrix has an eigenvalue of {negative:.1e} times {largest}: it is not the Gram of any gradients. "
            "`streamfisher verify` checks the run."
        )
    return negative


def solve_leading(operator: lanczos.SymmetricOperator, k: int, *, seed: int = 42) -> Eigenvalues:
    """Return the `k` largest eigenvalues with their residuals, by products with the matrix only.

    Args:
        operator: the matrix.
        k: how many.
        seed: of the random start.

    Raises:
        ConvergenceError: the solver did not reach its tolerance.
    """
    found = lanczos.leading(operator, k, seed=seed)
    return Eigenvalues(found.values, "block-lanczos", 0.0, 0.0, found.residuals)


def _solve_chain(
    K: np.ndarray, dtype: torch.dtype, device: str, regularization: float
) -> tuple[np.ndarray, str, float]:
    working = K if dtype == torch.float64 else K.astype(np.float32)
    on_cuda = torch.cuda.is_available() and (
        device.startswith("cuda") or (device == "auto" and dtype == torch.float32 and len(K) >= _CUDA_SIZE)
    )
    failures = []
    drivers = (["torch-cuda"] if on_cuda else []) + ["lapack-syevd", "torch-cpu"]
    for driver in drivers:
        try:
            with torch.cuda.device(device) if on_cuda and ":" in device else contextlib.nullcontext():
                return _drive(driver, working), driver, 0.0
        except (np.linalg.LinAlgError, torch.linalg.LinAlgError, RuntimeError) as error:
            failures.append(f"{driver}: {error}")
    jitter = max(regularization, 10 * float(torch.finfo(dtype).eps))
    shift = jitter * float(np.trace(working)) / len(working)
    try:
        values = _drive("lapack-syevd", working + shift * np.eye(len(working), dtype=working.dtype))
    except np.linalg.LinAlgError as error:
        failures.append(f"lapack-syevd with jitter {jitter:.1e}: {error}")
        raise CorruptRunError("no eigensolver succeeded: " + "; ".join(failures)) from error
    return values - shift, "lapack-syevd+jitter", jitter


def _drive(driver: str, K: np.ndarray) -> np.ndarray:
    """Return the eigenvalues of `K` in ascending order."""
    if driver == "lapack-syevd":
        values = np.linalg.eigvalsh(K)
    else:
        matrix = torch.from_numpy(K)
        if driver == "torch-cuda":
            matrix = matrix.cuda()
        values = torch.linalg.eigvalsh(matrix).cpu().numpy()
    if not np.isfinite(values).all():
        raise np.linalg.LinAlgError("the solver returned values that are not finite")
    return values
