"""From Grams to a spectrum: add those of each block, solve, put the whole together, and say what it is of."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from streamfisher.blocks.structures import group_blocks
from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.results.noise import RawScale
from streamfisher.results.spectrum import NORMALIZATION, WHOLE_MODEL, BlockSpectrum, Spectrum
from streamfisher.runtime.determinism import one_thread
from streamfisher.runtime.stage_progress import steps
from streamfisher.solving import centering
from streamfisher.solving.blocksolver import block_spectrum
from streamfisher.solving.combine import MEAN_DOMINANCE_LIMIT, block_diagonal_error, combine
from streamfisher.solving.selection import Selection
from streamfisher.version import versions

_NONE = "no gradient reached its parameters"


@dataclass(frozen=True)
class RowPrecision:
    """How exact gradient rows are."""

    computed: torch.dtype  # they were computed in it
    roundoff: float  # and then held with this unit roundoff


@dataclass(frozen=True)
class BlockSolutions:
    """Solved blocks, before they are put together: all that a spectrum needs of the Grams."""

    blocks: dict[str, BlockSpectrum]
    traces: dict[str, float]  # of each parameter's part of F, before centering
    squared: float  # |K_b|_F^2, added over the blocks
    whole_squared: float  # |K|_F^2 of the sum of all Grams
    dominance: float  # the largest N |mean|^2 / trace of a block that was centered; 0 for none
    whole: BlockSpectrum | None = None  # all parameters together, where that was solved


@dataclass(frozen=True)
class Eigenproblem:
    """Which blocks are solved, and how, wherever their Grams are."""

    parameters: Mapping[str, int]  # elements of each parameter
    assignment: Mapping[str, str]  # block key of each parameter
    config: SpectralConfig
    center: bool  # take the covariance
    precision: RowPrecision
    metadata: Mapping[str, Any]  # goes into the result
    selection: Selection | None = None  # weights of the samples that Grams are given for; None: 1 each
    top_k: int | None = None  # list only the largest eigenvalues of each block
    single: Collection[str] | None = None  # parameters whose Grams are products in `dtype_gram`; None: all of them
    layers: Mapping[str, str] | None = None  # parameter -> layer: how far rounding reaches; None: everywhere
    whole: bool = False  # solve the matrix of all parameters together too, beside the blocks
    progress: bool = False  # show a bar while blocks are solved

    @property
    def product(self) -> torch.dtype:
        """The dtype of the products that Grams are made of, where they are not float64 anyway."""
        return torch.float64 if self.precision.computed == torch.float64 else self.config.dtype_gram

    def raw_trace(self, diagonal: np.ndarray) -> float:
        """Return what a Gram, of which the diagonal is given, adds to the trace of F; weighted, not centered."""
        weights = None if self.selection is None else self.selection.weights
        total = float(diagonal.sum() if weights is None else diagonal @ weights)
        return total * (1.0 if self.selection is None else self.selection.factor) / len(diagonal)

    def raw_scale(self, names: Sequence[str], traces: Mapping[str, float]) -> RawScale:
        """Return how large a block of some parameters is before centering, and the part of float32 products in it."""
        single = [name for name in names if self.single is None or name in self.single]
        parts = [sum(traces[name] for name in chosen) for chosen in (names, single)]
        return RawScale(parts[0], parts[1], len(single) == len(names), self.center)

    def _reach(self, traces: Mapping[str, float]) -> dict[str, float]:
        """Return block -> trace of the layers of its parameters: what rounding of a gradient there is relative to."""
        layer_of = dict.fromkeys(traces, "") if self.layers is None else self.layers
        of_layer: dict[str, float] = defaultdict(float)
        for name, trace in traces.items():
            of_layer[layer_of[name]] += trace
        return {
            key: sum(of_layer[layer] for layer in dict.fromkeys(layer_of[name] for name in names))
            for key, names in group_blocks(self.assignment).items()
        }

    def combined(self, solved: BlockSolutions) -> Spectrum:
        """Put solved blocks together, and say what they are of."""
        blocks, traces, dominance = dict(solved.blocks), solved.traces, solved.dominance
        if self.product == torch.float32 and dominance > MEAN_DOMINANCE_LIMIT:
            warnings.warn(
                f"the mean gradient dominates (N |mean|^2 / trace = {dominance:.1e}): centering the Gram loses digits. "
                "Collect with store_centered=True and float32 or float64 rows for an accurate tail.",
                stacklevel=3,
            )
        unreached = [name for name, trace in traces.items() if trace == 0.0 and self.parameters[name]]
        normalization = NORMALIZATION[self.center] if self.selection is None else self.selection.formula(self.center)
        facts = {
            **self.metadata,
            "centered": self.center,
            "normalization": normalization,
            "block_diagonal_error": block_diagonal_error(solved.squared, solved.whole_squared),
            **({"mean_dominance": dominance} if self.center else {}),
            "dtype_gram": dtype_name(self.product),
            "dtype_eigensolve": dtype_name(self.config.dtype_eigensolve),
            "solver": self.config.solver,
            "parameter_subsampling": self.config.max_params_per_block,
            **({"parameters_without_gradient": unreached} if unreached else {}),
            "analysed_with": versions(),
        }
        total, zero = sum(traces.values()), set(unreached)
        for key, names in group_blocks(self.assignment).items():
            if set(names) <= zero:
                blocks[key] = dataclasses.replace(blocks[key], no_gradient=True, reason=blocks[key].reason or _NONE)
        computed, top_k = self.precision.computed, self.config.top_k_eigenvalues
        return combine(blocks, self._reach(traces), total, computed, facts, top_k, solved.whole)


def with_same_bits(solve: Callable[..., BlockSolutions]) -> Callable[..., BlockSolutions]:
    """Let a deterministic analysis use one thread: LAPACK and dot products depend on their number."""

    @functools.wraps(solve)
    def in_one_thread(grams: Callable[..., Any], problem: Eigenproblem, **options: Any) -> BlockSolutions:
        with one_thread(problem.config.use_deterministic):
            return solve(grams, problem, **options)

    return in_one_thread


def solve_blocks(gram_of: Callable[[str], np.ndarray], problem: Eigenproblem) -> Spectrum:
    """Solve blocks and put the whole together, see `block_solutions`."""
    return problem.combined(block_solutions(gram_of, problem))


@with_same_bits
def block_solutions(
    gram_of: Callable[[str], np.ndarray],
    problem: Eigenproblem,
    *,
    small_side: Callable[[str], np.ndarray | None] | None = None,
    sums: Mapping[str, np.ndarray] | None = None,
    diagonals: Mapping[str, np.ndarray] | None = None,
) -> BlockSolutions:
    """Add the Grams of each block and solve it, and the sum of all where the problem asks for the whole.

    Only one block's Gram, one parameter's, and the running sum of all are alive at a time.

    Args:
        gram_of: parameter name -> (N, N) float64 Gram.
        problem: the blocks.
        small_side: parameter -> the (P, P) matrix with the non-zero eigenvalues of its Gram, where it is at hand and
            smaller; blocks of this parameter alone are solved from it.
        sums: block -> the sum of its Grams, where that is at hand; then Grams are not asked for, but `diagonals`.
        diagonals: parameter -> the diagonal of its Gram, (N,), with `sums`.
    """
    selection = problem.selection
    centered = centering.center if selection is None else selection.center
    blocks: dict[str, BlockSpectrum] = {}
    whole: np.ndarray | None = None
    traces: dict[str, float] = {}
    squared, dominance, whole_size = 0.0, 0.0, 0.0

    def read(name: str) -> np.ndarray:
        K = gram_of(name)
        traces[name] = problem.raw_trace(K.diagonal())
        return K

    groups = group_blocks(problem.assignment)
    n = 0 if selection is None else len(selection)
    for key, names in steps(groups.items(), "eigenvalues of blocks", show=problem.progress, n_samples=n):
        if sums is None or diagonals is None:
            K = add(read(name) for name in names)
        else:
            K = sums[key]
            traces.update({name: problem.raw_trace(diagonals[name]) for name in names})
        size = 0.0
        if problem.center:
            raw_trace = float(np.trace(K))
            size = raw_trace if selection is None else selection.scaled_trace(K)
            whole_size += size
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
            sum(problem.parameters[name] for name in names),
            problem.config,
            product=problem.product if smaller is None else torch.float64,  # second moments are made in float64
            roundoff=problem.precision.roundoff,
            raw=problem.raw_scale(names, traces),
            top_k=problem.top_k,
            n_samples=None if smaller is None else len(K),
            size=size,
        )
    assert whole is not None  # a run has at least one parameter
    whole_squared = float(np.vdot(whole, whole))
    together = None
    if problem.whole and len(groups) > 1:
        del K
        together = block_spectrum(
            WHOLE_MODEL,
            whole,
            sum(problem.parameters[name] for name in traces),
            problem.config,
            product=problem.product,
            roundoff=problem.precision.roundoff,
            raw=problem.raw_scale(list(traces), traces),
            top_k=problem.top_k,
            size=whole_size,
        )
    return BlockSolutions(blocks, traces, squared, whole_squared, dominance, together)


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
