"""The disk: rows and factors of a wave into a run, each unit with its marker."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.gradients.factors import on_host, pack
from streamfisher.gradients.norms import batch_norms
from streamfisher.gradients.producer import Asked, BatchGradients, GradientProducer
from streamfisher.sinks.interface import UnitFacts
from streamfisher.sinks.unit_rows import UnitRows
from streamfisher.store import RunStore, UnitRecord, stage_of


class DiskSink:
    """A `GradientSink` into a run: factors go as batches come, rows and the marker when a unit is through.

    Args:
        store: of the run.
        wave: whose parameters it takes.
        producer: makes the buffers, where it forms rows.
    """

    def __init__(self, store: RunStore, wave: int, producer: GradientProducer) -> None:
        self.store, self.wave = store, wave
        names = store.waves[wave]
        self.dense = [name for name in names if store.rows.representation(name) == "dense"]
        self.factored = [name for name in names if store.rows.representation(name) == "factors"]
        height = min(store.chunk_rows, store.n_samples)
        self.rows = UnitRows(lambda: producer.allocate(height, self.dense, store.parameters))
        self._entries: list[Mapping[str, Any]] = []  # what the unit's marker is to say of its factors

    @property
    def parameters(self) -> list[str]:
        """The wave's parameters: those held as rows, then those held as factors."""
        return [*self.dense, *self.factored]

    def todo(self) -> list[Unit]:
        """Return the units without a marker."""
        return self.store.markers.todo(stage_of(self.wave))

    def asks(self, batch: BatchRef) -> Asked:
        """Return the batch's part of the unit's buffers, and the parameters whose factors are stored."""
        return Asked(self.rows.of_batch(batch), self.factored)

    def norms(self, gradients: BatchGradients, n_samples: int) -> dict[str, np.ndarray]:
        """Return the squared norms of all, which what is read back is held against."""
        return batch_norms(gradients.rows, gradients.factors, n_samples)

    def batch(self, batch: BatchRef, gradients: BatchGradients, dropped: Collection[int] = ()) -> None:
        """Write the factors of a batch; its rows wait for the unit."""
        if batch.index == 0:
            self._entries = []
        if gradients.factors:
            packed = pack(on_host(gradients.factors), dropped=list(dropped))
            self._entries.append(self.store.factors.write(batch.unit, batch.index, batch.start, packed, self.wave))

    def unit(self, unit: Unit, facts: UnitFacts) -> int:
        """Write the rows of a unit, what is known of its samples, and last its marker."""
        return self.write(unit, facts, self.rows.of_unit(unit, facts.skipped))

    def write(self, unit: Unit, facts: UnitFacts, rows: Mapping[str, Tensor]) -> int:
        """Write a unit with these rows; return the bytes of its gradients."""
        on_cpu = {name: values.cpu() for name, values in rows.items()}
        entries, self._entries = self._entries, []
        record = UnitRecord(
            unit, on_cpu, facts.losses, facts.n_targets, facts.squared_norms, facts.skipped, entries, self.wave
        )
        self.store.write_unit(record)
        dense = sum(values.numel() for values in on_cpu.values()) * self.store.store_dtype.itemsize
        return dense + sum(int(entry["bytes"]) for entry in entries)
