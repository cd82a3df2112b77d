"""Where finished Grams go: checked against what was seen while collecting, and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from streamfisher.runtime import run_log as runlog
from streamfisher.errors import CorruptRunError
from streamfisher.reduction import gram as grams
from streamfisher.reduction.moment import moment_of
from streamfisher.store import RunStore


class GramSink:
    """Checks a finished Gram against the norms seen while collecting and writes it; picklable for Dask workers."""

    def __init__(
        self, store: RunStore, settings: Mapping[str, Any], *, subsampled: frozenset[str], compare: bool = False
    ):
        self.store, self.settings, self.subsampled, self.compare = store, dict(settings), subsampled, compare

    def __call__(self, finished: grams.ParameterGram) -> tuple[str, float | None]:
        """Write a Gram; return its key and how far one that was there is from it, relatively.

        Raises:
            CorruptRunError: its diagonal is not what was seen while collecting.
        """
        name = finished.name
        members = self.store.gram_members[name]
        if not self.subsampled.intersection(members):
            columns = [list(self.store.parameters).index(member) for member in members]
            expected = self.store.per_sample("squared_norm")[:, columns].sum(axis=1)
            found = finished.gram.diagonal()
            tolerance = self.store.norm_tolerance
            wrong = np.flatnonzero(np.abs(found - expected) > tolerance * expected)
            if len(wrong):
                raise CorruptRunError(
                    f"{self.store.path}: the stored rows of {name} do not have the norms they were collected with "
                    f"(samples {', '.join(map(str, wrong[:8]))}{' and more' if len(wrong) > 8 else ''}). "
                    "`streamfisher verify` tells which chunks are affected."
                )
        difference = self._difference(finished) if self.compare else None
        self.store.write_gram(name, finished.gram, finished.mean_products, self.settings)
        runlog.event("gram", stage="grams", gram=name, samples=len(finished.gram))
        keep_moment(self.store, name, self.subsampled)
        return name, difference

    def _difference(self, finished: grams.ParameterGram) -> float | None:
        """Return how far the Gram that is stored is from the new one, relatively."""
        try:
            old, _ = self.store.read_gram(finished.name)
        except CorruptRunError:
            return None
        if old.shape != finished.gram.shape:
            return None
        norm = float(np.linalg.norm(finished.gram))
        distance = float(np.linalg.norm(finished.gram - old))
        return distance / norm if norm else distance


def keep_moment(store: RunStore, key: str, subsampled: frozenset[str]) -> None:
    """Write the second moment of a parameter that has fewer elements than there are samples, and a Gram of its own."""
    if store.gram_members[key] == [key] and key not in subsampled and store.parameters[key] < store.n_samples:
        valid = store.per_sample("valid") == 1
        store.write_moment(key, moment_of(store, key, store.parameters[key], valid))
