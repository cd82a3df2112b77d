"""Spectra of Grams that do not fit the memory: the largest eigenvalues by products with tiles, all else exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streamfisher.blocks.structures import group_blocks
from streamfisher.byte_sizes import format_bytes
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError
from streamfisher.results.spectrum import BlockSpectrum, Spectrum
from streamfisher.runtime.memory import working_memory
from streamfisher.runtime.stage_progress import steps
from streamfisher.solving import eigen
from streamfisher.solving.blocksolver import empty_block, listed, solved_block
from streamfisher.solving.solve import BlockSolutions, Eigenproblem, with_same_bits
from streamfisher.solving.tiled_gram import TiledGram


def dense_bytes(n_stored: int, n: int) -> int:
    """Return the peak of a dense solve: the block's Gram, that of all, a stored one or the solver's two copies."""
    return 8 * (2 * n**2 + max(n_stored**2 + n**2, 2 * n**2))


def fits_dense(n_stored: int, n: int, config: SpectralConfig) -> bool:
    """Return whether the Grams of a block can be held and solved in memory.

    Raises:
        CapacityError: they cannot, and `solver='dense'` was asked for.
    """
    return solves_dense(n_stored, n, config, working_memory(config.memory_budget))


def solves_dense(n_stored: int, n: int, config: SpectralConfig, budget: int) -> bool:
    """Return whether the Grams of a block are solved in so many bytes: what plans and runs both ask.

    Raises:
        CapacityError: they cannot be, and `solver='dense'` was asked for.
    """
    needed = dense_bytes(n_stored, n)
    if needed > budget and config.solver == "dense":
        raise CapacityError(
            f"a dense solve of {n} samples needs {format_bytes(needed)} and the memory budget is "
            f"{format_bytes(budget)}. Raise --memory-budget, or take --solver iterative with --top-k."
        )
    return needed <= budget


def solve_tiled(operator_of: Callable[[Sequence[str]], TiledGram], problem: Eigenproblem) -> Spectrum:
    """Solve blocks by tiles and put the whole together, see `tiled_solutions`."""
    return problem.combined(tiled_solutions(operator_of, problem))


@with_same_bits
def tiled_solutions(operator_of: Callable[[Sequence[str]], TiledGram], problem: Eigenproblem) -> BlockSolutions:
    """Solve all blocks, of each the `top_k` largest eigenvalues with residuals.

    Traces, norms and the block-diagonal error are exact.

    Args:
        operator_of: parameters -> the matrix of the block that they make, centered and weighted.
        problem: the blocks of selected samples; without a `top_k`, `top_k_eigenvalues` are listed.

    Raises:
        ConvergenceError: the solver did not reach its tolerance.
        CorruptRunError: a stored tile is missing or damaged.
    """
    assert problem.selection is not None  # tiles are always read for a selection
    parameters, config, n = problem.parameters, problem.config, len(problem.selection)
    top_k = problem.top_k or config.top_k_eigenvalues
    blocks: dict[str, BlockSpectrum] = {}
    traces = dict.fromkeys(problem.assignment, 0.0)
    squared, dominance = 0.0, 0.0
    groups = group_blocks(problem.assignment)
    for key, names in steps(groups.items(), "eigenvalues of blocks", show=problem.progress, n_samples=n):
        n_params = sum(parameters[name] for name in names)
        top = listed(min(n, n_params), top_k, config)
        if top < 1:
            blocks[key] = empty_block(key, n, n_params)
            continue
        K = operator_of(names)
        traces.update({name: problem.raw_trace(diagonal) for name, diagonal in K.diagonals()})
        squared, dominance = squared + K.squared_norm, max(dominance, K.dominance)
        blocks[key] = solved_block(
            key,
            eigen.solve_leading(K, top, seed=config.seed),
            n_samples=n,
            n_params=n_params,
            top=top,
            trace=K.trace / n,
            norm=K.squared_norm**0.5 / n,
            config=config,
            product=problem.product,
            roundoff=problem.precision.roundoff,
            raw=problem.raw_scale(names, traces),
        )
    whole = K if len(groups) == 1 and any(problem.parameters.values()) else operator_of(list(problem.assignment))
    return BlockSolutions(blocks, traces, squared, whole.squared_norm, dominance)
