"""Eigenvectors of a block's Fisher in parameter space, streamed: directions that can be added to the model.

With `G'` the rows that count (restricted, centered, weighted: `G' = sqrt(n/Z) D^(1/2) (G - 1 m^T)`), `F = G'^T G' / n`
and `K' = G' G'^T = U diag(n lambda) U^T`, the eigenvectors are the rows of

    V = diag(n lambda)^(-1/2) U^T G' = C^T G        (k, P), V V^T = I

where the coefficients C (N, k) absorb weights and centering. Two passes over the stored rows of the block, a slab of
columns at a time: float32 products leave an error of 2e-8 lambda_1 in K', which is more than 1e-6 of a small
eigenvalue, so the first pass only measures `V V^T` and `G V^T` in float64 and corrects C by Rayleigh-Ritz; the second
writes V.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.analysis.eigenvector_job import EigenvectorJob, finish, keep_solution, write_vectors
from streamfisher.errors import ConfigError
from streamfisher.runtime.bars import Bar
from streamfisher.store import RunStore
from streamfisher.store.eigenvectors import Eigenvectors, open_eigenvectors

_SLAB_BYTES = 64 << 20


def compute_eigenvectors(
    store: RunStore, grams: BlockGrams, block: str, top: int, *, overwrite: bool = False, progress: bool = False
) -> Eigenvectors:
    """Write the leading eigenvectors of a block into the run; what is there already is not computed again.

    Args:
        store: of the run.
        grams: blocks, samples, weights and centering.
        block: its key.
        top: k, how many.
        overwrite: replace eigenvectors of this block that were made with other samples, weights, or another k.
        progress: show a bar.

    Raises:
        ConfigError: there is no such block, or it has fewer than `top` eigenvalues above its noise floor.
        RunError: other eigenvectors are there, gradients were not kept, another process writes the run, or Grams are
            subsampled.
    """
    with EigenvectorJob.locked(store, grams, block, top, overwrite=overwrite) as job:
        if not job.is_done("finished"):
            for name in job.names:
                store.kept.require(name)
        if not job.is_done("solved"):
            _refine(job, leading_coefficients(grams, block, top), progress)
        if not job.is_done("finished"):
            coefficients = job.checked_coefficients()
            bar = Bar(job.names, desc="eigenvectors, pass 2 of 2", unit="parameter", disable=not progress)
            write_vectors(job, bar, lambda name: _stored_vectors(job, name, coefficients))
            finish(job)
    return open_eigenvectors(store.path, block, center=grams.center)


def slabs(store: RunStore, name: str, width: int | None = None) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (start, stop, rows (N, stop - start) float64) of a parameter, with a mean that was subtracted put back.

    Args:
        store: of the run.
        name: of the parameter.
        width: columns that are read together at no extra cost; `None` means those of a chunk.
    """
    columns, chunk = store.parameters[name], max(width or store.rows.chunk_columns(name), 1)
    if width is None:
        chunk = max(_SLAB_BYTES // (8 * store.n_samples) // chunk, 1) * chunk
    for start in range(0, columns, chunk):
        stop = min(start + chunk, columns)
        rows = store.rows.columns(name, start, stop).astype(np.float64)
        mean = store.means.mean(name, start, stop)
        yield start, stop, rows if mean is None else rows + mean


def leading_coefficients(grams: BlockGrams, block: str, top: int) -> np.ndarray:
    """Return C (N, k) with `V = C^T G` the leading eigenvectors, as exact as the stored Grams.

    Raises:
        ConfigError: fewer than `top` eigenvalues lie above the noise floor.
    """
    spectrum = grams.only(block).spectrum().blocks[block]
    rank = int(spectrum.above_floor.sum())
    if not 1 <= top <= rank:
        raise ConfigError(
            f"{top} eigenvectors of block {block} were asked for and {rank} of its {len(spectrum.eigenvalues)} "
            f"eigenvalues lie above the noise floor; ask for 1 to {rank}."
        )
    values, vectors = np.linalg.eigh(grams.gram(block))
    values, vectors = values[::-1][:top], vectors[:, ::-1][:, :top]
    return _coefficients(grams, vectors / np.sqrt(values))


def _coefficients(grams: BlockGrams, scaled: np.ndarray) -> np.ndarray:
    """Return C (N, k) with `C^T G = scaled^T G'`."""
    selection = grams.selection
    n = len(selection)
    weights = np.ones(n) if selection.weights is None else selection.weights
    inner = np.sqrt(weights * (n / selection.denominator))[:, None] * scaled
    if grams.center:
        inner = inner - np.outer(weights / weights.sum(), inner.sum(axis=0))
    whole = np.zeros((grams.n_stored, scaled.shape[1]))
    whole[selection.samples] = inner
    return whole


def _refine(job: EigenvectorJob, coefficients: np.ndarray, progress: bool) -> None:
    """First pass: measure V V^T and G V^T exactly, correct C by Rayleigh-Ritz, and store C and the eigenvalues."""
    k = coefficients.shape[1]
    overlap, products = np.zeros((k, k)), np.zeros_like(coefficients)
    for name in Bar(job.names, desc="eigenvectors, pass 1 of 2", unit="parameter", disable=not progress):
        for _, _, rows in slabs(job.store, name):
            V = coefficients.T @ rows
            overlap += V @ V.T
            products += rows @ V.T
    keep_solution(job, coefficients, overlap, job.restricted(products), products)


def _stored_vectors(job: EigenvectorJob, name: str, coefficients: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    for start, stop, rows in slabs(job.store, name):
        yield start, stop, coefficients.T @ rows
