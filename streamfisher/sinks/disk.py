"""The disk: rows and factors of a wave into a run, written behind the back of the pass, each unit's marker last."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Callable, Collection, Mapping
from types import TracebackType

import numpy as np
from torch import Tensor

from streamfisher.config import DirectIo
from streamfisher.data.batches import BatchRef, Unit
from streamfisher.gradients.factors import BatchFactors, bytes_of, pack
from streamfisher.gradients.norms import batch_norms
from streamfisher.gradients.producer import Asked, BatchGradients, GradientProducer
from streamfisher.runtime.direct_io import CacheShare
from streamfisher.runtime.host_copies import HostCopies
from streamfisher.sinks.interface import UnitFacts
from streamfisher.sinks.unit_rows import UnitRows
from streamfisher.sinks.write_behind import UnitInFlight, WriteBehind
from streamfisher.store import RunStore, UnitRecord, stage_of
from streamfisher.store.factor_writing import FactorWriting


class DiskSink:
    """A `GradientSink` into a run: factors go as batches come, rows and the marker when a unit is through.

    Threads write, while the next batches are computed; units end in any order. A context manager, see `WriteBehind`.

    Args:
        store: of the run.
        wave: whose parameters it takes.
        producer: makes the buffers, where it forms rows.
        threads: that write.
        room: bytes of factors that may wait to be written beside the batch that is being written.
        direct_io: whether it is written past the page cache, see `CacheShare`.
    """

    def __init__(
        self,
        store: RunStore,
        wave: int,
        producer: GradientProducer,
        *,
        threads: int = 1,
        room: int = 0,
        direct_io: DirectIo = "never",
    ) -> None:
        self.store, self.wave = store, wave
        names = store.waves[wave]
        self.dense = [name for name in names if store.rows.representation(name) == "dense"]
        self.factored = [name for name in names if store.rows.representation(name) == "factors"]
        height = min(store.chunk_rows, store.n_samples)
        self._free: queue.SimpleQueue[UnitRows] = queue.SimpleQueue()
        for _ in range(store.unit_buffers):
            self._free.put(UnitRows(lambda: producer.allocate(height, self.dense, store.parameters)))
        self._rows: UnitRows | None = None  # of the unit at hand
        self._copies = HostCopies()
        self._writer = WriteBehind(threads, room)
        self._cache = CacheShare(direct_io)
        self._unit: UnitInFlight | None = None
        self._writings: list[FactorWriting] = []  # of the unit's batches

    def __enter__(self) -> DiskSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    @property
    def parameters(self) -> list[str]:
        """The wave's parameters: those held as rows, then those held as factors."""
        return [*self.dense, *self.factored]

    @property
    def rows(self) -> UnitRows:
        """Return the buffers of the unit at hand; they come free when an earlier unit is written."""
        if self._rows is None:
            self._rows = self._free.get()
        return self._rows

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
        """Have the factors of a batch written; its rows wait for the unit."""
        if gradients.factors:
            self._writer.make_room(bytes_of(gradients.factors))
            packed = pack(gradients.factors, dropped=list(dropped))
            copy = self._copies.of(packed.tensors)
            self._write_factors(batch, dataclasses.replace(packed, tensors=copy.tensors), copy.wait, counted=True)

    def unit(self, unit: Unit, facts: UnitFacts) -> int:
        """Have the rows of a unit written, what is known of its samples, and last its marker."""
        return self.write(unit, facts, self.rows.of_unit(unit, facts.skipped))

    def write(self, unit: Unit, facts: UnitFacts, rows: Mapping[str, Tensor]) -> int:
        """Have a unit written with these rows, which are the buffers' own; return the bytes of its gradients."""
        buffers, self._rows = self.rows, None
        return self._write(unit, facts, rows, lambda: self._free.put(buffers))

    def write_held(self, unit: Unit, facts: UnitFacts, rows: Mapping[str, Tensor]) -> int:
        """Have a unit written with rows that are held elsewhere and do not change; return the bytes of its gradients.

        From a device they are copied, so that they wait until there is room.
        """
        size = sum(values.nbytes for values in rows.values() if values.device.type != "cpu")
        self._writer.make_room(size)
        return self._write(unit, facts, rows, lambda: None, size)

    def write_packed(self, batch: BatchRef, packed: BatchFactors) -> None:
        """Have the factors of a batch written that are held elsewhere, on the host, and do not change."""
        self._write_factors(batch, packed, lambda: None, counted=False)

    def _write(
        self,
        unit: Unit,
        facts: UnitFacts,
        rows: Mapping[str, Tensor],
        release: Callable[[], None],
        size: int = 0,
    ) -> int:
        copy = self._copies.of(rows)
        dense = sum(values.numel() for values in rows.values()) * self.store.store_dtype.itemsize
        direct = self._cache.is_past(dense, behind=self._writer.is_behind)
        writing = self.store.rows.writing(unit, copy.tensors, ready=copy.wait, direct=direct)
        flight, writings = self._flight(unit), self._writings
        self._unit, self._writings = None, []
        for job, part in writing.jobs():
            flight.add(job, part if size else 0)

        def mark() -> None:
            entries = [part.entry() for part in writings]
            seen = (facts.losses, facts.n_targets, facts.squared_norms, facts.skipped)
            self.store.write_unit(UnitRecord(unit, {}, *seen, entries, self.wave, writing))

        flight.end(mark, release)
        return dense + sum(part.size for part in writings)

    def settle(self) -> None:
        """Return when every unit has its marker.

        Raises:
            OSError: the disk failed; what is marked is whole.
        """
        self._writer.settle()

    def _write_factors(
        self, batch: BatchRef, packed: BatchFactors, ready: Callable[[], None], *, counted: bool
    ) -> None:
        flight = self._flight(batch.unit)
        size = sum(tensor.nbytes for tensor in packed.tensors.values())
        direct = self._cache.is_past(size, behind=self._writer.is_behind)
        writing = self.store.factors.writing(
            batch.unit, batch.index, batch.start, packed, self.wave, ready, direct=direct
        )
        self._writings.append(writing)
        for job, part in writing.jobs():
            flight.add(job, part if counted else 0)

    def _flight(self, unit: Unit) -> UnitInFlight:
        if self._unit is None:
            self._unit = self._writer.begin(f"samples {unit.start} to {unit.stop - 1}")
        return self._unit
