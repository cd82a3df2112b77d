"""The Grams of the blocks of a run under one choice of blocks, samples, weights and centering.

Every analysis without the model starts here: a spectrum, the alignment of blocks, the bootstrap, eigenvectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamfisher.analysis.partial_run import PartialGrams
from streamfisher.analysis.solved_spectra import SolvedSpectra, question
from streamfisher.analysis.unstored_grams import UnstoredGrams
from streamfisher.blocks.structures import group_blocks, unknown_block
from streamfisher.byte_sizes import format_bytes
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError
from streamfisher.results.analyses import SpectralDensity
from streamfisher.results.metrics import frobenius
from streamfisher.results.spectrum import WHOLE_MODEL, BlockSpectrum, Spectrum
from streamfisher.runtime.determinism import one_thread
from streamfisher.runtime.memory import working_memory
from streamfisher.solving.blocksolver import empty_block, solved_block
from streamfisher.solving.centering import uncenter
from streamfisher.solving.density import spectral_density
from streamfisher.solving.eigen import Eigenvalues, decompose, solve_leading
from streamfisher.solving.lanczos import DenseOperator, leading
from streamfisher.solving.selection import Selection
from streamfisher.solving.solve import BlockSolutions, Eigenproblem, RowPrecision, add, block_solutions
from streamfisher.solving.tiled_gram import ReadTile, TiledGram
from streamfisher.solving.tiled_solve import fits_dense, tiled_solutions
from streamfisher.store.grams import GramStore
from streamfisher.store.moments import Moment


@dataclass(frozen=True)
class BlockGrams:
    """What is needed to solve the blocks of a run; Grams are read when they are asked for, one at a time."""

    gram_of: Callable[[str], np.ndarray]  # parameter name -> (N, N) float64, over all samples of the run
    parameters: Mapping[str, int]  # elements of each parameter
    assignment: Mapping[str, str]  # block key of each parameter
    selection: Selection  # which samples count, and how much
    center: bool
    config: SpectralConfig
    precision: RowPrecision
    metadata: Mapping[str, Any]
    tile_of: ReadTile | None = None  # reads a part of a Gram; None: Grams are only at hand whole
    mean_products_of: Callable[[str], np.ndarray | None] = lambda name: None  # of Grams whose mean is to be put back
    moment_of: Callable[[str], Moment | None] = lambda name: None  # of parameters with P < N, over all valid samples
    single: Collection[str] | None = None  # Grams that hold products in `dtype_gram`; None: all do
    layers: Mapping[str, str] | None = None  # Gram -> layer; None: rounding may come from anywhere
    progress: bool = False  # show bars while something is solved
    solved: SolvedSpectra | None = None  # spectra that the run keeps; None: of Grams that are not stored

    @property
    def blocks(self) -> dict[str, list[str]]:
        """Return `{block key: [parameter names]}`."""
        return group_blocks(self.assignment)

    def rows_gram(self, key: str) -> np.ndarray:
        """Return the Gram of a block's rows over the selected samples, neither centered nor weighted: (n, n).

        Raises:
            ConfigError: there is no such block.
            CapacityError: it does not fit the memory.
        """
        if key not in self.blocks:
            raise unknown_block(key, self.blocks)
        needed = 8 * (self.n_stored**2 + 2 * len(self.selection) ** 2)
        budget = working_memory(self.config.memory_budget)
        if needed > budget:
            raise CapacityError(
                f"the Gram of {self.n_stored} samples needs {format_bytes(needed)} in memory and the budget is "
                f"{format_bytes(budget)}; only spectra (`top_k`) and densities are made from tiles."
            )
        return add(self.selection.restrict(self.gram_of(name)) for name in self.blocks[key])

    def operator(self, names: Sequence[str]) -> TiledGram:
        """Return the matrix of the block of some parameters as an operator that reads it tile by tile.

        Raises:
            CapacityError: Grams are only at hand whole, as of an unfinished run.
        """
        if self.tile_of is None:
            raise CapacityError(
                f"the Grams of the {self.n_stored} samples of an unfinished run do not fit the memory budget; finish "
                "it first."
            )
        products = {name: self.mean_products_of(name) for name in names}
        return TiledGram(
            self.tile_of,
            names,
            self.n_stored,
            self.selection,
            center=self.center,
            mean_products={name: found for name, found in products.items() if found is not None},
        )

    def small_side(self, name: str) -> np.ndarray | None:
        """Return the (P, P) matrix with the non-zero eigenvalues of a parameter's Gram, where there is one."""
        if self.selection.weights is not None or self.parameters[name] >= len(self.selection):
            return None
        moment = self.moment_of(name)
        if moment is None or moment.count != len(self.selection):
            return None  # of other samples: moments are kept for all valid ones together
        return moment.matrix(center=self.center) * self.selection.factor

    def gram(self, key: str) -> np.ndarray:
        """Return the (n, n) matrix whose eigenvalues, over n, are those of the block's Fisher (or covariance)."""
        K = self.rows_gram(key)
        return self.selection.scale(self.selection.center(K) if self.center else K)

    @property
    def n_stored(self) -> int:
        """Return N, the samples of the run, selected or not."""
        return int(self.metadata.get("n_samples_stored", len(self.selection)))

    def only(self, key: str) -> BlockGrams:
        """Return the same for one block."""
        return dataclasses.replace(self, assignment=dict.fromkeys(self.blocks[key], key))

    def together(self) -> BlockGrams:
        """Return the same with all parameters in one block, `whole_model`."""
        return dataclasses.replace(self, assignment=dict.fromkeys(self.assignment, WHOLE_MODEL))

    def subset(self, places: np.ndarray) -> BlockGrams:
        """Return the same for some of the samples; `places` are indices into the selected ones, ascending."""
        chosen = self.selection.subset(places)
        return dataclasses.replace(self, selection=chosen, metadata={**self.metadata, **chosen.facts()})

    def density(self, key: str, **options: Any) -> SpectralDensity:
        """Return the spectral density of one block, see `density.spectral_density`; in memory where its Gram fits.

        Raises:
            ConfigError: there is no such block, or an option is out of range.
        """
        if key not in self.blocks:
            raise unknown_block(key, self.blocks)
        names, n = self.blocks[key], len(self.selection)
        chosen: dict[str, Any] = {"block": key, "seed": self.config.seed} | options
        with one_thread(self.config.use_deterministic):
            smaller = self.small_side(names[0]) if len(names) == 1 else None
            if smaller is not None:
                return spectral_density(DenseOperator(smaller, n), side="parameters", **chosen)
            zeros = max(n - sum(self.parameters[name] for name in names), 0)
            fits = fits_dense(self.n_stored, n, self.config)
            return spectral_density(
                DenseOperator(self.gram(key)) if fits else self.operator(names), zeros=zeros, **chosen
            )

    def spectrum(self, top_k: int | None = None, *, whole: bool = False, keep: bool | None = None) -> Spectrum:
        """Solve every block, see `Run.spectrum`: in memory where the Grams fit, else by tiles.

        Args:
            top_k: list the largest only.
            whole: solve all parameters together too, which is one block more; not where Grams are read by tiles.
            keep: leave what was solved in the run, see `analysis.solved_spectra`; `None`: what took two seconds.
        """
        problem = self.problem(top_k, whole=whole)
        if self.solved is None:
            return problem.combined(self.solutions(top_k, whole=whole))
        asked = question(problem)
        return problem.combined(self.solved.found_or(asked, lambda: self.solutions(top_k, whole=whole), keep=keep))

    def solutions(self, top_k: int | None = None, *, whole: bool = False) -> BlockSolutions:
        """Solve every block, whatever the run keeps; arguments as `spectrum`."""
        problem = self.problem(top_k, whole=whole)
        if not fits_dense(self.n_stored, len(self.selection), self.config):
            return tiled_solutions(self.operator, problem)
        return block_solutions(
            lambda name: self.selection.restrict(self.gram_of(name)), problem, small_side=self.small_side
        )

    def kept(self, *, whole: bool, by: str) -> BlockSolutions | None:
        """Return what the run keeps of these blocks, solved `by` a way of its own; `None` where there is nothing."""
        return None if self.solved is None else self.solved.find(question(self.problem(None, whole=whole), by=by))

    def keep(self, solutions: BlockSolutions, seconds: float, *, whole: bool, by: str) -> None:
        """Leave solutions of these blocks in the run that took so many seconds, if that is worth it."""
        if self.solved is not None:
            self.solved.keep(question(self.problem(None, whole=whole), by=by), solutions, seconds)

    def combined(self, solutions: BlockSolutions, *, whole: bool = False) -> Spectrum:
        """Return the spectrum that solutions of these blocks make."""
        return self.problem(None, whole=whole).combined(solutions)

    def sample_space(self, key: str) -> SampleSpace:
        """Return the matrix of a block with its eigenvectors, one entry of each for every selected sample.

        Raises:
            ConfigError: there is no such block.
            CapacityError: it does not fit the memory.
        """
        matrix = self.matrix(key, needs=8)
        n_params = sum(self.parameters[name] for name in self.blocks[key])
        with one_thread(self.config.use_deterministic):
            solved, vectors = decompose(matrix.K, size=matrix.size)
        trace, norm = float(np.trace(matrix.K)), frobenius(matrix.K)
        spectrum = self._solved(key, solved, min(len(matrix.K), n_params), matrix.traces, trace, norm)
        return SampleSpace(spectrum, vectors[:, : len(spectrum.eigenvalues)], matrix.K, matrix.raw)

    def fits(self, needs: int) -> bool:
        """Return whether so many (n, n) matrices fit the memory beside a stored Gram; where there are no tiles, yes."""
        needed = 8 * (self.n_stored**2 + needs * len(self.selection) ** 2)
        return self.tile_of is None or needed <= working_memory(self.config.memory_budget)

    def leading_space(self, key: str, top: int) -> tuple[BlockSpectrum, np.ndarray, TiledGram]:
        """Return the leading eigenvalues of a block with their eigenvectors (n, top), and its matrix, by tiles.

        Raises:
            ConfigError: there is no such block.
            ConvergenceError: the solver did not reach its tolerance.
            CorruptRunError: a tile is missing or damaged.
        """
        if key not in self.blocks:
            raise unknown_block(key, self.blocks)
        n, names, problem = len(self.selection), self.blocks[key], self.problem(None)
        K = self.operator(names)
        top = min(top, n, sum(self.parameters[name] for name in names))
        found = leading(K, top, seed=self.config.seed)
        solved = Eigenvalues(found.values, "block-lanczos", 0.0, 0.0, found.residuals)
        traces = {name: problem.raw_trace(diagonal) for name, diagonal in K.diagonals()}
        return self._solved(key, solved, top, traces, K.trace, K.squared_norm**0.5), found.vectors, K

    def matrix(self, key: str, *, needs: int) -> BlockMatrix:
        """Return the matrix of a block over the selected samples, centered and weighted as was asked.

        Args:
            key: of the block.
            needs: how many (n, n) matrices what is done with it holds, itself included.

        Raises:
            ConfigError: there is no such block.
            CapacityError: they do not fit the memory.
        """
        if key not in self.blocks:
            raise unknown_block(key, self.blocks)
        n = len(self.selection)
        require_memory(8 * (self.n_stored**2 + needs * n**2), f"the eigenvectors of {n} samples", self.config)
        problem, traces, raw = self.problem(None), dict[str, float](), np.zeros((n, n))
        for name in self.blocks[key]:
            part = self.selection.restrict(self.gram_of(name))
            traces[name] = problem.raw_trace(part.diagonal())
            raw += part
        size = self.selection.scaled_trace(raw) if self.center else 0.0
        K = self.selection.scale(self.selection.center(raw) if self.center else raw)
        return BlockMatrix(key, K, raw, size, traces)

    def largest(self, matrix: BlockMatrix) -> BlockSpectrum:
        """Return the largest eigenvalue, the trace and the noise floor of a block."""
        with one_thread(self.config.use_deterministic):
            solved = solve_leading(DenseOperator(matrix.K), 1, seed=self.config.seed)
        return self._solved(matrix.key, solved, 1, matrix.traces, float(np.trace(matrix.K)), frobenius(matrix.K))

    def _solved(
        self, key: str, solved: Eigenvalues, top: int, traces: Mapping[str, float], trace: float, norm: float
    ) -> BlockSpectrum:
        """Say of eigenvalues of a block's matrix, of this trace and norm, what they are as those of its Fisher."""
        n, problem = len(self.selection), self.problem(None)
        n_params = sum(self.parameters[name] for name in self.blocks[key])
        if n_params < 1:
            return empty_block(key, n, n_params)
        return solved_block(
            key,
            solved,
            n_samples=n,
            n_params=n_params,
            top=top,
            trace=trace / n,
            norm=norm / n,
            config=self.config,
            product=problem.product,
            roundoff=problem.precision.roundoff,
            raw=problem.raw_scale(self.blocks[key], traces),
        )

    def problem(self, top_k: int | None, *, whole: bool = False) -> Eigenproblem:
        """Return what is to be solved, and how; arguments as `spectrum`."""
        return Eigenproblem(
            self.parameters,
            self.assignment,
            self.config,
            self.center,
            self.precision,
            self.metadata,
            self.selection,
            top_k,
            self.single,
            self.layers,
            whole,
            self.progress,
        )


@dataclass(frozen=True)
class BlockMatrix:
    """A block over the selected samples, not solved."""

    key: str
    K: np.ndarray  # (n, n) float64: of rows that are restricted, centered and weighted as was asked
    raw: np.ndarray  # (n, n) float64: of rows that are only restricted
    size: float  # trace of K before centering; 0 where it is not centered
    traces: Mapping[str, float]  # of the parameters' parts of F, before centering


@dataclass(frozen=True)
class SampleSpace:
    """A block's Fisher seen from the samples: `K / n = U diag(lambda) U^T`."""

    spectrum: BlockSpectrum  # lambda, (r,), with its noise floor
    vectors: np.ndarray  # U, (n, r) float64, orthonormal columns
    K: np.ndarray  # (n, n) float64: of rows that are restricted, centered and weighted as was asked
    raw: np.ndarray  # (n, n) float64: of rows that are only restricted


def require_memory(needed: int, what: str, config: SpectralConfig) -> None:
    """Refuse what does not fit the memory budget.

    Raises:
        CapacityError: it says by how much, and what to do.
    """
    budget = working_memory(config.memory_budget)
    if needed > budget:
        raise CapacityError(
            f"{what} need {format_bytes(needed)} in memory and the budget is {format_bytes(budget)}. Raise "
            "--memory-budget, or take fewer samples (--samples)."
        )


def stored_gram(source: GramStore | PartialGrams | UnstoredGrams, name: str, center: bool) -> np.ndarray:
    """Return the Gram of all rows, (N, N); where rows are stored centered, with the mean put back unless `center`."""
    gram, mean_products = source.read(name)
    if mean_products is not None and not center:
        return uncenter(gram, mean_products)
    return gram
