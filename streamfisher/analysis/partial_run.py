"""An unfinished run, analysed: the finished rows only, never written back, and marked as partial everywhere."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from streamfisher.config import SpectralConfig
from streamfisher.errors import RunError
from streamfisher.reduction import gram as grams
from streamfisher.store import RunStore
from streamfisher.store.factors import FactorSegment

#: Grams of an unfinished run are kept in memory up to this size in all; further ones are computed again when needed.
_CACHE_BYTES = 1 << 30


class FinishedRows:
    """The rows of a run whose units are done, with the face that `gram.build_grams` reads."""

    def __init__(self, store: RunStore, samples: np.ndarray):
        self.store = store
        self.samples = samples  # (n,) int64, ascending
        self.parameters: Mapping[str, int] = store.parameters
        self.n_samples = len(samples)
        self.numpy_row_dtype, self.numpy_read_dtype = store.rows.numpy_row_dtype, store.rows.numpy_read_dtype
        self.decoding_bytes = store.rows.decoding_bytes + store.rows.numpy_row_dtype.itemsize

    def chunk_columns(self, name: str) -> int:
        """Return the columns that are read together."""
        return self.store.rows.chunk_columns(name)

    def columns(
        self, name: str, start: int, stop: int, rows: slice | None = None, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (n, stop - start), or a range of these rows: unwritten ones are dropped before anyone sees them."""
        chosen = self.samples if rows is None else self.samples[rows]
        if len(chosen) == 0:
            return self.store.rows.columns(name, start, stop, slice(0, 0))
        first, last = int(chosen[0]), int(chosen[-1]) + 1
        found = self.store.rows.columns(name, start, stop, slice(first, last), unfinished_as_nan=True)
        return found[chosen - first]

    def representation(self, name: str) -> str:
        """Return 'dense': rows of some of the samples are asked for by columns, however they are held."""
        return "dense"

    def mean(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return the mean gradient that was subtracted from the rows, or `None`."""
        return self.store.means.mean(name, start, stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self.store.rows.shape(name)

    def segments(self, name: str) -> list[FactorSegment]:
        """Return nothing: see `representation`."""
        return []


class PartialGrams:
    """The Grams of the rows that are there when it is made; rows that come later do not count.

    Args:
        store: of a run that another process may be writing.
        config: products, workers and memory budget.

    Raises:
        RunError: not even 2 samples are finished.
    """

    def __init__(self, store: RunStore, config: SpectralConfig):
        if len(store.waves) > 1:
            raise RunError(
                f"{store.path} is collected in {len(store.waves)} waves and not finished, so no samples have all their "
                "gradients yet. Run the command that made it again; it goes on where it stopped."
            )
        done = store.markers.done_units()
        finished = [np.arange(unit.start, unit.stop) for unit in store.units if unit.index in done]
        samples = np.concatenate(finished) if finished else np.zeros(0, dtype=np.int64)
        if len(samples) < 2:
            raise RunError(
                f"{store.path}: {len(samples)} of {store.n_samples} samples have gradients; a spectrum needs at least "
                "2. Run the command that made it again; it goes on where it stopped."
            )
        self.rows = FinishedRows(store, samples)
        self.config = config
        self._cache: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    @property
    def mask(self) -> np.ndarray:
        """Return (N,) bool, which samples have rows."""
        mask = np.zeros(self.rows.store.n_samples, dtype=bool)
        mask[self.rows.samples] = True
        return mask

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return what `GramStore.read` returns, NaN in the rows and columns of samples without gradients."""
        if name not in self._cache:
            keys = {name: self.rows.store.gram_members[name]}
            (finished,) = grams.build_grams(self.rows, self.config, _keep, keys=keys)
            size, n = 8 * self.rows.n_samples**2, len(self._cache)
            found = (finished.gram, finished.mean_products)
            if size * (n + 1) > _CACHE_BYTES:
                return self._spread(*found)
            self._cache[name] = found
        return self._spread(*self._cache[name])

    def _spread(self, gram: np.ndarray, products: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        n, where = self.rows.store.n_samples, self.rows.samples
        whole = np.full((n, n), np.nan)
        whole[np.ix_(where, where)] = gram
        if products is None:
            return whole, None
        whole_products = np.full(n + 1, np.nan)
        whole_products[where], whole_products[-1] = products[:-1], products[-1]
        return whole, whole_products


def _keep(parameter: grams.ParameterGram) -> grams.ParameterGram:
    return parameter
