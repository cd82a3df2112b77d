"""The smaller side of a parameter with fewer elements than there are samples: `S = G^T G` (P, P) instead of (N, N).

    F = S / N             C = (S - N m m^T) / N,   m = (1/N) sum_i g_i

S and the sum of the rows are added up in float64 over chunks of rows, in one stream, when the Gram is built, and kept:
they answer for all valid samples with equal weights also after the gradients are deleted. Subsets and weights need the
Gram. A block of several parameters has cross terms that are in none of their S; it needs Grams too.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np

from streamfisher.store import RunStore
from streamfisher.store.moments import Moment

#: Rows of one product.
_ROWS = 256


class RowRanges(Protocol):
    """Anything that holds gradient rows by columns and ranges of rows: a run on disk, or arrays in memory."""

    @property
    def n_samples(self) -> int:
        """N."""

    def columns(self, name: str, start: int, stop: int, rows: slice | None = None) -> np.ndarray:
        """Return (rows, stop - start) float32 or float64."""

    def mean(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return the mean gradient that was subtracted from the rows, or `None`."""


def moment_of(rows: RowRanges, name: str, n_columns: int, valid: np.ndarray | None = None) -> Moment:
    """Return the moment of one parameter's rows, read once.

    Args:
        rows: where the gradients are.
        name: of the parameter.
        n_columns: P.
        valid: (N,) bool, which rows count; `None` means all.
    """
    second, total = np.zeros((n_columns, n_columns)), np.zeros(n_columns)
    for start in range(0, rows.n_samples, _ROWS):
        where = slice(start, min(start + _ROWS, rows.n_samples))
        part = rows.columns(name, 0, n_columns, rows=where).astype(np.float64)
        part = part if valid is None else part[valid[where]]
        second += part.T @ part
        total += part.sum(axis=0)
    count = rows.n_samples if valid is None else int(valid.sum())
    return Moment(second, total, count, rows.mean(name, 0, n_columns))


def stored_moment(store: RunStore, key: str, subsampled: Collection[str]) -> Moment | None:
    """Return the moment that is kept beside a Gram of a run; `None` where none is: it is then not the smaller side.

    Args:
        store: of the run.
        key: of the Gram; a group of parameters has no moment.
        subsampled: parameters of whose columns some are drawn.
    """
    if key in subsampled or not has_moment(store, key):
        return None
    return moment_of(store.rows, key, store.parameters[key], store.samples.per_sample("valid") == 1)


def has_moment(store: RunStore, key: str) -> bool:
    """Return whether a Gram is kept beside a second moment: of a single parameter, with fewer elements than samples."""
    return store.gram_members[key] == [key] and store.parameters[key] < store.n_samples
