"""Gradients that are held until they are reduced and written beside that, so that no product waits for the disk."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.gradients.producer import Asked, BatchGradients
from streamfisher.sinks.disk import DiskSink
from streamfisher.sinks.interface import UnitFacts
from streamfisher.sinks.memory import MemorySink


class KeepingSink:
    """A `GradientSink` around two: one holds the gradients, the other writes what that one holds.

    Args:
        disk: of a wave nothing of which is there yet.
        held: of the same wave.
    """

    def __init__(self, disk: DiskSink, held: MemorySink) -> None:
        self.disk, self.held = disk, held
        held.copy_at_once()

    @property
    def parameters(self) -> list[str]:
        """Those of both."""
        return self.held.parameters

    def todo(self) -> list[Unit]:
        """Return all units."""
        return self.held.todo()

    def asks(self, batch: BatchRef) -> Asked:
        """Return the places where rows stay, and the parameters that are held as factors."""
        return self.held.asks(batch)

    def norms(self, gradients: BatchGradients, n_samples: int) -> dict[str, np.ndarray]:
        """Return the squared norms of all, which what is read back is held against."""
        return self.disk.norms(gradients, n_samples)

    def batch(self, batch: BatchRef, gradients: BatchGradients, dropped: Collection[int] = ()) -> None:
        """Hold the factors of a batch, and have them written."""
        self.held.batch(batch, gradients, dropped)
        packed = self.held.packed_of(batch)
        if packed is None:
            self.disk.batch(batch, gradients, dropped)
        else:
            self.disk.write_packed(batch, packed)

    def unit(self, unit: Unit, facts: UnitFacts) -> int:
        """Hold the rows of a unit, and have them written, with what is known of its samples and last its marker."""
        self.held.unit(unit, facts)
        return self.disk.write_held(unit, facts, self.held.rows_of(unit))

    def settle(self) -> None:
        """Do nothing: `disk` is still writing, and what was taken can be reduced."""
