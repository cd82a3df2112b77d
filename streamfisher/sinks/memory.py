"""Gradients held in memory until they are reduced."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from streamfisher.store.layout import PANEL


class MemoryRows:
    """Gradient rows held in memory, `{name: (N, P_k)}`, with the same face as a stored run."""

    decoding_bytes = 0

    def __init__(self, rows: Mapping[str, np.ndarray]):
        self.rows = dict(rows)
        self.parameters = {name: values.shape[1] for name, values in rows.items()}
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
