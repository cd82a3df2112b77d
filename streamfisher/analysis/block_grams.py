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
from streamfisher.analysis.unstored_grams import UnstoredGrams
from streamfisher.blocks.structures import group_blocks, unknown_block
from streamfisher.byte_sizes import format_bytes
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError
from streamfisher.results.analyses import SpectralDensity
from streamfisher.results.spectrum import Spectrum
from streamfisher.runtime.determinism import one_thread
from streamfisher.runtime.memory import working_memory
from streamfisher.solving.centering import uncenter
from streamfisher.solving.density import spectral_density
from streamfisher.solving.lanczos import DenseOperator
from streamfisher.solving.selection import Selection
from streamfisher.solving.solve import Eigenproblem, RowPrecision, add, solve_blocks
from streamfisher.solving.tiled_gram import ReadTile, TiledGram
from streamfisher.solving.tiled_solve import fits_dense, solve_tiled
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

    def spectrum(self, top_k: int | None = None) -> Spectrum:
        """Solve every block, see `Run.spectrum`: in memory where the Grams fit, else by tiles."""
        problem = Eigenproblem(
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
        )
        if not fits_dense(self.n_stored, len(self.selection), self.config):
            return solve_tiled(self.operator, problem)
        return solve_blocks(
            lambda name: self.selection.restrict(self.gram_of(name)), problem, small_side=self.small_side
        )


def stored_gram(source: GramStore | PartialGrams | UnstoredGrams, name: str, center: bool) -> np.ndarray:
    """Return the Gram of all rows, (N, N); where rows are stored centered, with the mean put back unless `center`."""
    gram, mean_products = source.read(name)
    if mean_products is not None and not center:
        return uncenter(gram, mean_products)
    return gram
