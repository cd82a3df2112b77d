"""Where the gradients of a pass go: the seam between a pass over the data and what becomes of its gradients.

A sink is asked for buffers, given each batch's gradients where they were made, and told when a unit is through. The
disk (`disk.py`), memory (`memory.py`), a mean (`mean.py`) and rows without their mean (`centered.py`) are sinks; what
was taken in is read back through one `GradientSource`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.gradients.producer import Asked, BatchGradients
from streamfisher.store.factors import FactorSegment


@dataclass(frozen=True)
class UnitFacts:
    """What a pass knows of a unit of n samples beside the gradients."""

    losses: np.ndarray  # (n,) float64
    n_targets: np.ndarray  # (n,) int64, 0 for samples that were skipped
    squared_norms: Mapping[str, np.ndarray]  # parameter -> (n,) float64, of all parameters of the pass
    skipped: Mapping[int, str]  # sample number -> why its gradient counts as zero


class GradientSink(Protocol):
    """Takes in the gradients of a pass."""

    @property
    def parameters(self) -> Collection[str]:
        """Whose gradients it takes."""

    def todo(self) -> list[Unit]:
        """Return the units that it does not have yet."""

    def asks(self, batch: BatchRef) -> Asked:
        """Return how it wants the gradients of a batch."""

    def norms(self, gradients: BatchGradients, n_samples: int) -> Mapping[str, np.ndarray]:
        """Return (n,) float64 of each parameter: the squared norm of each sample's gradient, if the sink wants to know.

        Not finite where the gradient is not.
        """

    def batch(self, batch: BatchRef, gradients: BatchGradients, dropped: Collection[int] = ()) -> None:
        """Take a batch: its buffers are filled, and its factors are there.

        Args:
            batch: the one that was asked about last.
            gradients: where they were made.
            dropped: places in the batch of samples that are skipped.
        """

    def unit(self, unit: Unit, facts: UnitFacts) -> int:
        """Take note that all batches of a unit were taken; return how many bytes are held of it."""

    def settle(self) -> None:
        """Return when all that was taken is where it stays."""


@runtime_checkable
class OnFiles(Protocol):
    """A source whose gradients lie in files of this machine."""

    def files(self, name: str, start: int, stop: int) -> Iterable[Path]:
        """Return the files that these columns of a parameter are read from, as far as that is known."""


class GradientSource(Protocol):
    """Anything that holds per-sample gradients by columns: a run on disk, or arrays in memory."""

    @property
    def n_samples(self) -> int:
        """N."""

    @property
    def parameters(self) -> Mapping[str, int]:
        """Number of columns of each parameter."""

    @property
    def numpy_row_dtype(self) -> np.dtype:
        """In which rows were computed; of float64 ones, products are formed in no less."""

    @property
    def numpy_read_dtype(self) -> np.dtype:
        """Of what `columns` returns of rows."""

    @property
    def decoding_bytes(self) -> int:
        """Of an entry beside that, while it is read."""

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

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""

    def segments(self, name: str) -> Sequence[FactorSegment]:
        """Return the factors of a parameter, in the order of the samples."""
