"""The mean gradient: sums of each unit's rows in float64, with a marker each."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.gradients.norms import batch_norms
from streamfisher.gradients.producer import Asked, BatchGradients, GradientProducer
from streamfisher.sinks.interface import UnitFacts
from streamfisher.sinks.unit_rows import UnitRows
from streamfisher.store import RunStore


class MeanSink:
    """A `GradientSink` that keeps of a unit's rows only their sum.

    Args:
        store: of the run.
        producer: makes the buffers, where it forms rows.
    """

    def __init__(self, store: RunStore, producer: GradientProducer) -> None:
        self.store = store
        height = min(store.chunk_rows, store.n_samples)
        self.rows = UnitRows(lambda: producer.allocate(height, store.parameters, store.parameters))

    @property
    def parameters(self) -> list[str]:
        """All of the run."""
        return list(self.store.parameters)

    def todo(self) -> list[Unit]:
        """Return the units that are not added up yet."""
        return self.store.markers.todo("mean")

    def asks(self, batch: BatchRef) -> Asked:
        """Return the batch's part of the unit's buffers."""
        return Asked(self.rows.of_batch(batch))

    def norms(self, gradients: BatchGradients, n_samples: int) -> dict[str, np.ndarray]:
        """Return the squared norms of the rows as they are."""
        return batch_norms(gradients.rows, gradients.factors, n_samples)

    def batch(self, batch: BatchRef, gradients: BatchGradients, dropped: Collection[int] = ()) -> None:
        """Do nothing: its rows are in the unit's buffers."""

    def unit(self, unit: Unit, facts: UnitFacts) -> int:
        """Write the sums over the valid samples of a unit, and their marker."""
        rows = self.rows.of_unit(unit, facts.skipped)
        sums = {name: values.sum(dim=0, dtype=torch.float64).cpu().numpy() for name, values in rows.items()}
        self.store.means.write_part(unit, sums, len(unit) - len(facts.skipped))
        return 8 * sum(self.store.parameters.values())

    def settle(self) -> None:
        """Do nothing: what was taken is written."""
