"""The Grams of the blocks of a run under one choice of blocks, samples, weights and centering.

Every analysis without the model starts here: a spectrum, the alignment of blocks, the bootstrap, eigenvectors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from streamfisher.blocks import group_blocks
from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError
from streamfisher.partial import PartialGrams
from streamfisher.selection import Selection
from streamfisher.solve import RowPrecision, add, solve_blocks
from streamfisher.spectrum import Spectrum, uncenter
from streamfisher.store import RunStore


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

    @property
    def blocks(self) -> dict[str, list[str]]:
        """Return `{block key: [parameter names]}`."""
        return group_blocks(self.assignment)

    def rows_gram(self, key: str) -> np.ndarray:
        """Return the Gram of a block's rows over the selected samples, neither centered nor weighted: (n, n).

        Raises:
            ConfigError: there is no such block.
        """
        if key not in self.blocks:
            raise ConfigError(f"there is no block {key!r}; the blocks are {', '.join(self.blocks)}.")
        return add(self.selection.restrict(self.gram_of(name)) for name in self.blocks[key])

    def gram(self, key: str) -> np.ndarray:
        """Return the (n, n) matrix whose eigenvalues, over n, are those of the block's Fisher (or covariance)."""
        K = self.rows_gram(key)
        return self.selection.scale(self.selection.center(K) if self.center else K)

    @property
    def n_stored(self) -> int:
        """Return N, the samples of the run, selected or not."""
        return int(self.metadata["n_samples_stored"])

    def only(self, key: str) -> BlockGrams:
        """Return the same for one block."""
        return dataclasses.replace(self, assignment=dict.fromkeys(self.blocks[key], key))

    def subset(self, places: np.ndarray) -> BlockGrams:
        """Return the same for some of the samples; `places` are indices into the selected ones, ascending."""
        chosen = self.selection.subset(places)
        return dataclasses.replace(self, selection=chosen, metadata={**self.metadata, **chosen.facts()})

    def spectrum(self, top_k: int | None = None) -> Spectrum:
        """Solve every block, see `Run.spectrum`."""
        return solve_blocks(
            lambda name: self.selection.restrict(self.gram_of(name)),
            self.parameters,
            self.assignment,
            self.config,
            center=self.center,
            precision=self.precision,
            metadata=self.metadata,
            top_k=top_k,
            selection=self.selection,
        )


def stored_gram(source: RunStore | PartialGrams, name: str, center: bool) -> np.ndarray:
    """Return the Gram of all rows, (N, N); where rows are stored centered, with the mean put back unless `center`."""
    gram, mean_products = source.read_gram(name)
    if mean_products is not None and not center:
        return uncenter(gram, mean_products)
    return gram
