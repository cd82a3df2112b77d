"""Where the gradients of a pass go, and what the Gram stage reads them back from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from streamfisher.data.batches import Unit
from streamfisher.gradients.factors import BatchFactors

#: Takes the factors of a batch on the CPU: (unit, index of the batch in it, its first sample, factors) -> what is to be
#: remembered of them in the unit's marker.
FactorWriter = Callable[[Unit, int, int, BatchFactors], Mapping[str, Any]]


@dataclass(frozen=True)
class Captured:
    """What one pass captures, and where factors go."""

    dense: Collection[str]  # parameters whose rows are formed
    factored: Collection[str] = ()  # parameters whose factors are kept instead
    write_factors: FactorWriter | None = None
    columns: Mapping[str, int] | None = None  # numbers of a row; None: P

    @property
    def names(self) -> list[str]:
        """Return all parameters of the pass."""
        return [*self.dense, *self.factored]


class GradientRows(Protocol):
    """Anything that holds per-sample gradients by columns: a run on disk, or arrays in memory."""

    n_samples: int
    parameters: Mapping[str, int]  # name -> number of columns
    numpy_row_dtype: np.dtype  # in which rows were computed; of float64 ones, products are formed in no less
    numpy_read_dtype: np.dtype  # of what `columns` returns of rows
    decoding_bytes: int  # of an entry beside that, while it is read

    def chunk_columns(self, name: str) -> int:
        """Return the columns that are read together at no extra cost."""

    def columns(
        self, name: str, start: int, stop: int, rows: slice | None = None, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (N, stop - start) float32 or float64, or a range of those rows; in `out`, where that saves work."""

    def mean(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return the mean gradient that was subtracted from the rows, or `None`."""

    def representation(self, name: str) -> str:
        """Return 'factors' where there are `segments` and a `shape` to reduce instead of columns, else 'dense'."""
