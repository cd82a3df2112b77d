"""Gradients of all samples in host memory, as the reduction reads them: rows, or factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamfisher.gradients.factors import matrix_shape
from streamfisher.store.factors import FactorSegment, columns_of_segments
from streamfisher.store.layout import PANEL


class MemoryRows:
    """Gradient rows held in memory, `{name: (N, P_k)}`, with the same face as a stored run."""

    decoding_bytes = 0

    def __init__(self, rows: Mapping[str, np.ndarray]):
        self.rows = dict(rows)
        self.parameters: Mapping[str, int] = {name: values.shape[1] for name, values in rows.items()}
        self.n_samples = next(iter(rows.values())).shape[0] if rows else 0
        double = any(values.dtype == np.float64 for values in rows.values())
        self.numpy_row_dtype = self.numpy_read_dtype = np.dtype("float64" if double else "float32")

    def chunk_columns(self, name: str) -> int:
        """Return `PANEL`: any column is as near as any other."""
        return PANEL

    def columns(
        self, name: str, start: int, stop: int, rows: slice | None = None, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return a view of (N, stop - start), or of a range of those rows."""
        return self.rows[name][rows or slice(None), start:stop]

    def mean(self, name: str, start: int, stop: int) -> None:
        """Return `None`: rows in memory are never centered."""

    def representation(self, name: str) -> str:
        """Return 'dense'."""
        return "dense"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the number of columns: of rows in memory nothing else is known."""
        return (self.parameters[name],)

    def segments(self, name: str) -> Sequence[FactorSegment]:
        """Return nothing: all are held as rows."""
        return []


@dataclass(frozen=True)
class HeldSide:
    """One factor of a batch, in memory."""

    values: Tensor  # (sum_i T_i, width) in the model's dtype, or (sum_i T_i,) ids
    first: int = 0  # number of the first column that is held

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the values; `None`: ids."""
        return None if self.values.dim() == 1 else self.values.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return columns `start` to `stop` of all positions, float32 or float64, a view where it can be; or all ids."""
        if self.values.dim() == 1:
            return self.values.numpy()
        if start < self.first:
            raise IndexError(f"columns {start} to {stop} of a factor of which those from {self.first} on are here")
        part = self.values[:, start - self.first : None if stop is None else stop - self.first]
        return (part if part.dtype in (torch.float32, torch.float64) else part.float()).numpy()


class MemoryGradients(MemoryRows):
    """Rows of some parameters and factors of the others, with the same face as a stored run.

    Args:
        rows: of some parameters, (N, columns) each.
        factors: of the others.
        shapes: of all.
        n_samples: N.
        row_dtype: in which rows are computed.
        columns: numbers of a whole row of each.
        first: the first column that is held of a parameter's rows, where that is not 0.
    """

    def __init__(
        self,
        rows: Mapping[str, np.ndarray],
        factors: Mapping[str, Sequence[FactorSegment]],
        shapes: Mapping[str, tuple[int, ...]],
        n_samples: int,
        row_dtype: torch.dtype,
        *,
        columns: Mapping[str, int],
        first: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(rows)
        self.factors, self.shapes, self.n_samples = dict(factors), dict(shapes), n_samples
        self.parameters, self._first = dict(columns), dict(first or {})
        self.numpy_row_dtype = self.numpy_read_dtype = np.dtype("float64" if row_dtype == torch.float64 else "float32")

    def columns(
        self, name: str, start: int, stop: int, rows: slice | None = None, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (N, stop - start), or a range of those rows; a view where they are held as rows."""
        if name not in self.factors:
            before = self._first.get(name, 0)
            return super().columns(name, start - before, stop - before, rows, out=out)
        first, last, _ = (rows or slice(None)).indices(self.n_samples)
        shape = matrix_shape(self.shapes[name])
        return columns_of_segments(self.factors[name], shape, start, stop, first, last, self.numpy_row_dtype)

    def representation(self, name: str) -> str:
        """Return how a parameter's gradients are held: 'dense' or 'factors'."""
        return "factors" if name in self.factors else "dense"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self.shapes[name]

    def segments(self, name: str) -> Sequence[FactorSegment]:
        """Return the factors of a parameter, in the order of the samples."""
        return self.factors[name]
