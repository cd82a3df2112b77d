"""Sums of Grams over a subset of the samples, read once: what many subsets of that are solved from."""

from __future__ import annotations

import numpy as np

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.runtime.memory import working_memory
from streamfisher.runtime.stage_progress import steps
from streamfisher.solving.solve import BlockSolutions, block_solutions


class SubsetSums:
    """The sums of each block's Grams over a subset of the samples, for who solves many subsets of that.

    Args:
        grams: of the subset.
    """

    def __init__(self, grams: BlockGrams) -> None:
        self.grams, self.samples = grams, grams.selection.samples
        self.blocks: dict[str, np.ndarray] = {}
        self.diagonals: dict[str, np.ndarray] = {}

    @staticmethod
    def fit(grams: BlockGrams) -> bool:
        """Return whether the sums of a subset fit a quarter of the memory, and each Gram as it is read."""
        needed = 8 * (len(grams.blocks) * len(grams.selection) ** 2 + grams.n_stored**2)
        return needed <= working_memory(grams.config.memory_budget) // 4

    @classmethod
    def of(cls, grams: BlockGrams) -> SubsetSums | None:
        """Return the sums of a subset, read; `None` where they do not fit."""
        if not cls.fit(grams):
            return None
        found = cls(grams)
        for name in steps(list(grams.assignment), "reading Grams", show=grams.progress, n_samples=grams.n_stored):
            found.take(name, grams.gram_of(name))
        return found

    def has(self, grams: BlockGrams) -> bool:
        """Return whether all Grams were taken, of the samples of a subset too."""
        taken = len(self.diagonals) == len(self.grams.assignment)
        return taken and bool(np.isin(grams.selection.samples, self.samples).all())

    def take(self, name: str, gram: np.ndarray) -> None:
        """Add one Gram, (N, N) over all samples of the run, unless it was taken before."""
        if name in self.diagonals:
            return
        part, key = self.grams.selection.restrict(gram), self.grams.assignment[name]
        self.diagonals[name] = np.array(part.diagonal())
        if key in self.blocks:
            self.blocks[key] += part
        else:
            self.blocks[key] = np.array(part)

    def solutions(self, grams: BlockGrams) -> BlockSolutions:
        """Solve every block and the whole, for some of the samples of the subset."""
        places = np.searchsorted(self.samples, grams.selection.samples)
        inner = np.ix_(places, places)
        return block_solutions(
            grams.gram_of,
            grams.problem(None, whole=True),
            sums={key: K[inner] for key, K in self.blocks.items()},
            diagonals={name: values[places] for name, values in self.diagonals.items()},
        )
