"""Grams for one answer: made with other settings than the stored ones, and not written, for looking changes no data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamfisher.byte_sizes import format_bytes
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError
from streamfisher.reduction.moment import stored_moment
from streamfisher.reduction.stored_grams import build_unstored_grams
from streamfisher.reduction.tiles import whole_bytes
from streamfisher.runtime.memory import working_memory
from streamfisher.store import RunStore
from streamfisher.store.moments import Moment

#: All Grams together are kept up to this size; else they are built one at a time, again for each question.
_CACHE_BYTES = 1 << 30


class UnstoredGrams:
    """The Grams of all samples of a collected run, built in memory; with the face of `GramStore`.

    Args:
        store: of the run.
        config: products, workers and memory budget.
        progress: show a bar while they are built.

    Raises:
        CapacityError: a Gram does not fit the memory budget.
    """

    def __init__(self, store: RunStore, config: SpectralConfig, *, progress: bool = False) -> None:
        needed, budget = whole_bytes(store.n_samples, 1), working_memory(config.memory_budget)
        if needed > budget:
            raise CapacityError(
                f"{store.path} has no stored Grams that were made so, and those of {store.n_samples} samples need "
                f"{format_bytes(needed)} in memory, where the budget is {format_bytes(budget)}. `streamfisher gram` "
                "with the same options stores them, in the place of those that are there."
            )
        self.store, self.config, self.progress = store, config, progress
        self._held: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
        keys = list(store.gram_members)
        self._keep_all = 8 * store.n_samples**2 * len(keys) <= min(_CACHE_BYTES, budget // 4)

    def read(self, key: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return one Gram (N, N) float64 and, for centered rows, its products with the mean (N + 1,).

        Raises:
            CorruptRunError: stored gradients are missing or do not have the norms they were collected with.
            RunError: they were deleted.
        """
        if key not in self._held:
            self._held = self._built(list(self.store.gram_members) if self._keep_all else [key])
        return self._held[key]

    def _built(self, keys: Sequence[str]) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
        found = build_unstored_grams(self.store, self.config, keys, progress=self.progress)
        return {one.name: (one.gram, one.mean_products) for one in found}

    def tile(self, key: str, rows: slice, columns: slice) -> np.ndarray:
        """Return part of a Gram."""
        return self.read(key)[0][rows, columns]

    def mean_products(self, key: str) -> np.ndarray | None:
        """Return the products of the rows of a Gram with their mean, (N + 1,), where rows are stored centered."""
        return self.read(key)[1]

    def moment(self, key: str) -> Moment | None:
        """Return the second moment of a parameter that has fewer elements than there are samples, and its own Gram."""
        return stored_moment(self.store, key, ())
