"""Memory of the host: rows of all samples, until they are multiplied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.gradients.producer import Asked, BatchGradients, GradientProducer
from streamfisher.sinks.interface import UnitFacts
from streamfisher.sinks.unit_rows import UnitRows
from streamfisher.store.factors import FactorSegment
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

    def segments(self, name: str) -> list[FactorSegment]:
        """Return nothing: all are held as rows."""
        return []


class MemorySink:
    """A `GradientSink` that holds the rows of all samples in host memory.

    Where gradients are formed on the CPU, batches are written into their place at once; from a device they come a unit
    at a time.

    Args:
        producer: makes the buffers, where it forms rows.
        units: of all samples.
    """

    def __init__(self, producer: GradientProducer, units: Sequence[Unit]) -> None:
        self.units = list(units)
        self.n_samples = self.units[-1].stop
        self.skipped: dict[int, str] = {}
        self.n_targets = 0  # of the valid samples
        self._producer = producer
        self._held: dict[str, Tensor] = {}  # (N, P_k) each
        self._arriving: UnitRows | None = None
        if producer.device.type != "cpu":
            self.through_units()

    def through_units(self) -> None:
        """Let rows be formed in buffers of one unit and copied from there, as they must be from a device."""
        height = max(len(unit) for unit in self.units)
        self._arriving = UnitRows(lambda: self._producer.allocate(height))

    @property
    def parameters(self) -> list[str]:
        """All that the producer captures."""
        return list(self._producer.parameters)

    def todo(self) -> list[Unit]:
        """Return all units."""
        return self.units

    def asks(self, batch: BatchRef) -> Asked:
        """Return the batch's rows where they stay, or where the unit's are formed."""
        if self._arriving is not None:
            return Asked(self._arriving.of_batch(batch))
        self._held = self._held or self._producer.allocate(self.n_samples)
        return Asked({name: values[batch.start : batch.stop] for name, values in self._held.items()})

    def batch(self, batch: BatchRef, gradients: BatchGradients, dropped: Collection[int] = ()) -> None:
        """Do nothing: its rows are in their buffers."""

    def unit(self, unit: Unit, facts: UnitFacts) -> int:
        """Take the rows of a unit to the host, where they are not there."""
        self.skipped |= facts.skipped
        self.n_targets += int(facts.n_targets.sum())
        size = 0
        if self._arriving is not None:
            for name, values in self._arriving.of_unit(unit, facts.skipped).items():
                if name not in self._held:
                    self._held[name] = torch.empty(self.n_samples, values.shape[1], dtype=values.dtype)
                self._held[name][unit.start : unit.stop] = values
        for values in self._held.values():
            size += len(unit) * values.shape[1] * values.itemsize
        return size

    def source(self) -> MemoryRows:
        """Return the rows of the valid samples."""
        if not self.skipped:
            return MemoryRows({name: values.numpy() for name, values in self._held.items()})
        valid = [number for number in range(self.n_samples) if number not in self.skipped]
        return MemoryRows({name: values[valid].numpy() for name, values in self._held.items()})
