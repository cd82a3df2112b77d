"""From Grams to a spectrum: add those of each block, solve, put the whole together, and say what it is of."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamfisher.blocks.structures import group_blocks
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.results import spectrum as spectra
from streamfisher.results.spectrum import Spectrum
from streamfisher.runtime.determinism import one_thread
from streamfisher.solving import centering
from streamfisher.solving.blocksolver import block_spectrum
from streamfisher.solving.combine import MEAN_DOMINANCE_LIMIT, block_diagonal_error, combine
from streamfisher.solving.selection import Selection
from streamfisher.version import versions


@dataclass(frozen=True)
class RowPrecision:
    """How exact gradient rows are."""

    computed: torch.dtype  # they were computed in it
    roundoff: float  # and then held with this unit roundoff


def with_same_bits(solve: Callable[..., Spectrum]) -> Callable[..., Spectrum]:
    """Let a deterministic analysis use one thread: LAPACK and dot products depend on their number."""

    @functools.wraps(solve)
    def in_one_thread(*args: Any, **options: Any) -> Spectrum:
        config = next(value for value in (*args, *options.values()) if isinstance(value, SpectralConfig))
        with one_thread(config.use_deterministic):
            return solve(*args, **options)

    return in_one_thread


@with_same_bits
def solve_blocks(
    gram_of: Callable[[str], np.ndarray],
    parameters: Mapping[str, int],
    assignment: Mapping[str, str],
    config: SpectralConfig,
    *,
    center: bool,
    precision: RowPrecision,
    metadata: Mapping[str, Any],
    top_k: int | None = None,
    selection: Selection | None = None,
    small_side: Callable[[str], np.ndarray | None] | None = None,
) -> Spectrum:
    """Add the Grams of each block, solve it, and put the whole together.

    Only one block's Gram, one parameter's, and the running sum of all are alive at a time.

    Args:
        gram_of: parameter name -> (N, N) float64 Gram.
        parameters: number of elements of each parameter.
        assignment: block key of each parameter.
        config: solver options.
        center: take the covariance.
        precision: of the rows.
        metadata: goes into the result.
        top_k: list only the largest eigenvalues of each block.
        selection: weights of the samples that `gram_of` gives; `None` means 1 each.
        small_side: parameter -> the (P, P) matrix with the non-zero eigenvalues of its Gram, where it is at hand and
            smaller; blocks of this parameter alone are solved from it.
    """
    centered = centering.center if selection is None else selection.center
    product = torch.float64 if precision.computed == torch.float64 else config.dtype_gram
    blocks: dict[str, spectra.BlockSpectrum] = {}
    whole: np.ndarray | None = None
    squared, dominance = 0.0, 0.0
    for key, names in group_blocks(assignment).items():
        K = add(gram_of(name) for name in names)
        if center:
            raw_trace = float(np.trace(K))
            K = centered(K)
            centered_trace = float(np.trace(K))
            if centered_trace > 0:
                dominance = max(dominance, len(K) * (raw_trace - centered_trace) / centered_trace)
        K = K if selection is None else selection.scale(K)
        squared += float(np.vdot(K, K))
        whole = K.copy() if whole is None else whole + K
        smaller = small_side(names[0]) if len(names) == 1 and small_side is not None else None
        blocks[key] = block_spectrum(
            key,
            K if smaller is None else smaller,
            sum(parameters[name] for name in names),
            config,
            product=product,
            roundoff=precision.roundoff,
            top_k=top_k,
            n_samples=None if smaller is None else len(K),
        )
    assert whole is not None  # a run has at least one parameter
    warn_of_dominance(product, dominance)
    facts = result_facts(metadata, config, center=center, product=product, selection=selection, dominance=dominance)
    facts["block_diagonal_error"] = block_diagonal_error(squared, float(np.vdot(whole, whole)))
    return combine(blocks, float(np.trace(whole)) / len(whole), precision.computed, facts, config.top_k_eigenvalues)


def warn_of_dominance(product: torch.dtype, dominance: float) -> None:
    """Warn where centering the Gram loses digits because the mean gradient dominates."""
    if product == torch.float32 and dominance > MEAN_DOMINANCE_LIMIT:
        warnings.warn(
            f"the mean gradient dominates (N |mean|^2 / trace = {dominance:.1e}): centering the Gram loses digits. "
            "Collect with store_centered=True and float32 or float64 rows for an accurate tail.",
            stacklevel=4,
        )


def result_facts(
    metadata: Mapping[str, Any],
    config: SpectralConfig,
    *,
    center: bool,
    product: torch.dtype,
    selection: Selection | None,
    dominance: float,
) -> dict[str, Any]:
    """Return the metadata of a spectrum: of the run, and how it was solved."""
    return {
        **metadata,
        "centered": center,
        "normalization": spectra.NORMALIZATION[center] if selection is None else selection.formula(center),
        "block_diagonal_error": None,
        **({"mean_dominance": dominance} if center else {}),
        "dtype_gram": dtype_name(product),
        "dtype_eigensolve": dtype_name(config.dtype_eigensolve),
        "solver": config.solver,
        "parameter_subsampling": config.max_params_per_block,
        "analysed_with": versions(),
    }


def add(matrices: Iterable[np.ndarray]) -> np.ndarray:
    """Add matrices in the order given, holding two at a time."""
    total: np.ndarray | None = None
    for matrix in matrices:
        if total is None:
            total = np.array(matrix)
        else:
            total += matrix
    assert total is not None  # a block has at least one parameter
    return total
