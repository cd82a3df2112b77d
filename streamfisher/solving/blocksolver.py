"""From the Gram of a block to its `BlockSpectrum`: all eigenvalues, or the largest with residuals where that pays."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import torch

from streamfisher.config import SpectralConfig
from streamfisher.errors import ConvergenceError, CorruptRunError
from streamfisher.results.metrics import frobenius
from streamfisher.results.noise import RawScale, noise_floor
from streamfisher.results.spectrum import BlockSpectrum
from streamfisher.solving import eigen
from streamfisher.solving.lanczos import DenseOperator

#: `solver='auto'` looks for the largest eigenvalues only from so many samples on, and where they are so few of them.
_ITERATIVE_SIZE, _ITERATIVE_SHARE = 3000, 40


def block_spectrum(
    name: str,
    K: np.ndarray,
    n_params: int,
    config: SpectralConfig,
    *,
    product: torch.dtype,
    roundoff: float,
    raw: RawScale | None = None,
    top_k: int | None = None,
    n_samples: int | None = None,
    size: float = 0.0,
) -> BlockSpectrum:
    """Solve one block.

    Args:
        name: the block's key.
        K: (N, N) float64, the Gram of the block's rows, centered where the covariance is asked for; or the other side,
            (P_b, P_b), which has the same non-zero eigenvalues.
        n_params: P_b, the number of columns the Gram is made of.
        config: solver options.
        product: dtype of the products that made `K`, where they are not float64.
        roundoff: unit roundoff of the rows as they are held.
        raw: the block before centering, and how much of it was multiplied in `product`; `None`: as it is, all of it.
        top_k: list the largest `top_k` only; the trace stays that of all.
        n_samples: N, where `K` is the side of the parameters; `None`: it is the Gram.
        size: trace before centering, where `K` is centered; see `eigen.solve`.
    """
    n = K.shape[0] if n_samples is None else n_samples
    count = min(n, n_params)
    if count < 1:
        return empty_block(name, n, n_params)
    top = listed(count, top_k, config)
    found = solved_block(
        name,
        _solve(name, K, top, count, top_k, config, size),
        n_samples=n,
        n_params=n_params,
        top=top,
        trace=float(np.trace(K)) / n,
        norm=frobenius(K) / n,
        config=config,
        product=product,
        roundoff=roundoff,
        raw=raw,
    )
    return found if n_samples is None else dataclasses.replace(found, solved_side="parameters")


def empty_block(name: str, n: int, n_params: int) -> BlockSpectrum:
    """Return the spectrum of a block without parameters or samples, with the reason."""
    reason = "no parameters in this block" if n_params < 1 else "no samples"
    return BlockSpectrum(name, np.zeros(0), 0.0, 0.0, np.zeros(0, dtype=bool), n, n_params, reason=reason)


def listed(count: int, top_k: int | None, config: SpectralConfig) -> int:
    """Return how many of `count` eigenvalues are listed: all, or fewer where that is asked for."""
    if top_k is None:
        return min(count, config.top_k_eigenvalues) if config.solver == "iterative" else count
    return min(count, top_k)


def _solve(
    name: str, K: np.ndarray, top: int, count: int, top_k: int | None, config: SpectralConfig, size: float
) -> eigen.Eigenvalues:
    """Solve for all eigenvalues, or for the `top` largest where that is asked for or pays."""
    few = top_k is not None and len(K) >= _ITERATIVE_SIZE and top * _ITERATIVE_SHARE <= len(K)
    failure = ""
    if top < count and (config.solver == "iterative" or (config.solver == "auto" and few)):
        if not np.isfinite(K).all():
            raise CorruptRunError("the matrix to be solved holds NaN or infinite values.")
        try:
            return eigen.solve_leading(DenseOperator(K), top, seed=config.seed)
        except ConvergenceError as error:
            warnings.warn(f"block {name}: {error} All eigenvalues are solved for instead.", stacklevel=4)
            failure = " (block-lanczos did not converge)"
    solved = eigen.solve(
        K,
        dtype=config.dtype_eigensolve,
        device=config.eigensolve_device,
        regularization=config.regularization,
        size=size,
    )
    return dataclasses.replace(solved, solver=solved.solver + failure)


def solved_block(
    name: str,
    solved: eigen.Eigenvalues,
    *,
    n_samples: int,
    n_params: int,
    top: int,
    trace: float,
    norm: float,
    config: SpectralConfig,
    product: torch.dtype,
    roundoff: float,
    raw: RawScale | None = None,
) -> BlockSpectrum:
    """Say of the eigenvalues of a Gram what they are as those of a Fisher.

    Args:
        name: the block's key.
        solved: eigenvalues of K (or of the other side), at least the `top` largest.
        n_samples: N; the eigenvalues of F are those of K over N.
        n_params: P_b.
        top: how many to list; `min(N, P_b)` is all.
        trace: of F.
        norm: `|F|_F`.
        config: noise floor and how many eigenvalues the metrics list.
        product: dtype of the products that made the Gram, where they are not float64.
        roundoff: unit roundoff of the rows as they are held.
        raw: see `block_spectrum`.
    """
    n = n_samples
    values = solved.values[:top] / n
    floor = noise_floor(
        float(values[0]),
        trace,
        n,
        product=product,
        roundoff=roundoff,
        eps=config.eps,
        raw=raw,
        solve=config.dtype_eigensolve if solved.residuals is None else torch.float64,
    )
    return BlockSpectrum(
        name,
        values,
        trace,
        floor.value,
        values > floor.value,
        n,
        n_params,
        truncated=top < min(n, n_params),
        solver=solved.solver,
        jitter=solved.jitter,
        roundoff=roundoff,
        top_k=config.top_k_eigenvalues,
        norm=norm,
        residuals=None if solved.residuals is None else solved.residuals[:top] / n,
        floor_source=floor.source,
        error=floor.error,
        row_scale=0.0 if raw is None else max(raw.trace - trace, 0.0),
    )
