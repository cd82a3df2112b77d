"""Memory of the host: gradients of all samples, as rows or as factors, until they are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.errors import CaptureError
from streamfisher.gradients.factors import BatchFactors, FactorPair, is_as_made, on_host, pack
from streamfisher.gradients.norms import batch_norms, squared_norms_of
from streamfisher.gradients.producer import Asked, BatchGradients, GradientProducer
from streamfisher.runtime.exchange import Parcel
from streamfisher.sinks.interface import UnitFacts
from streamfisher.sinks.memory_source import HeldSide, MemoryGradients
from streamfisher.sinks.parcels import Columns, FactorUses, PartOfSide, sent_segments
from streamfisher.sinks.unit_rows import UnitRows
from streamfisher.store.factors import FactorSegment


class MemorySink:
    """A `GradientSink` that holds the gradients of all samples in host memory.

    Where they are formed on the CPU, rows are written into their place at once; from a device they come a unit at a
    time. Factors stay in the model's own dtype, an input that several layers share once.

    Args:
        producer: makes the buffers, where it forms rows.
        units: of all samples.
        factored: parameters that are held as factors.
        parameters: whose gradients are taken; `None`: all that the producer captures.
        columns: numbers of a row, where rows are projected.
        every_norm: find the norms of factors too, which take about as long as their products.
        own: units that this rank takes, whose gradients it holds; `None`: all.
    """

    _through_host = True  # what is made on a device is copied from there, a unit at a time

    def __init__(
        self,
        producer: GradientProducer,
        units: Sequence[Unit],
        factored: Collection[str] = (),
        *,
        parameters: Sequence[str] | None = None,
        columns: Mapping[str, int] | None = None,
        every_norm: bool = False,
        own: Sequence[Unit] | None = None,
    ) -> None:
        self.units = list(units)
        self.own = self.units if own is None else list(own)
        self.n_samples = self.units[-1].stop
        self._first: dict[int, int] = {}  # unit -> the place of its first row in what is held
        self._n_held = 0
        for unit in self.own:
            self._first[unit.index] = self._n_held
            self._n_held += len(unit)
        names = list(producer.parameters if parameters is None else parameters)
        self.dense = [name for name in names if name not in factored]
        self.factored = [name for name in names if name in factored]
        self.columns, self.every_norm = dict(columns or {}), every_norm
        self.facts: dict[int, UnitFacts] = {}  # of each unit, by its index
        self.skipped: dict[int, str] = {}
        self.n_targets = 0  # of the valid samples
        self._producer = producer
        self._rows: dict[str, Tensor] = {}  # (n, P_k) each, of the n samples of its units
        self._factors: list[tuple[BatchRef, BatchFactors]] = []
        self._arriving: UnitRows | None = None
        self._views = True  # factors that nothing need be left out of are taken as they are
        if self._through_host and producer.device.type != "cpu":
            self.through_units()

    def through_units(self) -> None:
        """Let rows be formed in buffers of one unit and copied from there, as they must be from a device."""
        height = max(len(unit) for unit in self.units)
        self._arriving = UnitRows(lambda: self._producer.allocate(height, self.dense, self._widths))

    def copy_at_once(self) -> None:
        """Let factors be copied with their batch, where others read them later too: a model may write into its own."""
        self._views = False

    @property
    def parameters(self) -> list[str]:
        """Those held as rows, then those held as factors."""
        return [*self.dense, *self.factored]

    @property
    def row_dtype(self) -> torch.dtype:
        """In which rows are computed."""
        return self._producer.row_dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self._producer.parameters[name].shape

    def n_columns(self, name: str) -> int:
        """Return the numbers of a whole row of a parameter."""
        return self._widths.get(name, int(np.prod(self.shape(name))))

    @property
    def _widths(self) -> dict[str, int]:
        return {name: width for name, width in self.columns.items() if name in self.dense}

    def todo(self) -> list[Unit]:
        """Return all units."""
        return self.units

    def asks(self, batch: BatchRef) -> Asked:
        """Return the batch's rows where they stay, or where the unit's are formed."""
        if self._arriving is not None:
            return Asked(self._arriving.of_batch(batch), self.factored)
        if self.dense and not self._rows:
            self._rows = self._producer.allocate(self._n_held, self.dense, self._widths)
        first = self._first[batch.unit.index] + batch.start - batch.unit.start
        rows = {name: values[first : first + len(batch)] for name, values in self._rows.items()}
        return Asked(rows, self.factored)

    def norms(self, gradients: BatchGradients, n_samples: int) -> dict[str, np.ndarray]:
        """Return squared norms of the rows; of factors, which their Grams tell, only whether they are finite."""
        if self.every_norm:
            return batch_norms(gradients.rows, gradients.factors, n_samples)
        norms = squared_norms_of({name: values[:n_samples] for name, values in gradients.rows.items()})
        finite = _finite(gradients.factors, _sum_is_finite)
        unsure = [name for name, flags in finite.items() if not flags.all()]  # numbers that are finite may have no sum
        finite |= _finite({name: gradients.factors[name] for name in unsure}, _is_finite)
        return norms | {name: np.where(flags, 0.0, np.nan) for name, flags in finite.items()}

    def batch(self, batch: BatchRef, gradients: BatchGradients, dropped: Collection[int] = ()) -> None:
        """Take the factors of a batch, without padding, or without a copy; its rows are in their buffers."""
        if gradients.factors:
            packed = pack(on_host(gradients.factors), dropped=list(dropped), views=self._views)
            self._factors.append((batch, packed))

    def unit(self, unit: Unit, facts: UnitFacts) -> int:
        """Take the rows of a unit to the host, where they are not there."""
        self.facts[unit.index] = facts
        self.skipped |= facts.skipped
        self.n_targets += int(facts.n_targets.sum())
        if self._arriving is not None:
            for name, values in self._arriving.of_unit(unit, facts.skipped).items():
                if name not in self._rows:
                    shape = (self._n_held, values.shape[1])
                    self._rows[name] = torch.empty(shape, dtype=values.dtype, device=self.home)
                first = self._first[unit.index]
                self._rows[name][first : first + len(unit)] = values
        rows = sum(len(unit) * values.shape[1] * values.itemsize for values in self._rows.values())
        return rows + self._factor_bytes(unit)

    def settle(self) -> None:
        """Do nothing: what was taken is held."""

    def rows_of(self, unit: Unit) -> dict[str, Tensor]:
        """Return the rows of a unit that was taken, (n, P_k) each; those of skipped samples are zero."""
        first = self._first[unit.index]
        rows = {name: values[first : first + len(unit)] for name, values in self._rows.items()}
        for sample in self.facts[unit.index].skipped:
            for values in rows.values():
                values[sample - unit.start].zero_()
        return rows

    def packed_of(self, batch: BatchRef) -> BatchFactors | None:
        """Return the factors of the batch that was taken last, as a store holds them; `None`: they are elsewhere."""
        return self._factors[-1][1] if self._factors and self._factors[-1][0] == batch else None

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is held."""
        return sum(values.nbytes for values in self._rows.values()) + sum(map(self._factor_bytes, self.own))

    def _factor_bytes(self, unit: Unit) -> int:
        """Return the bytes of the factors of a unit."""
        of_unit = [packed.tensors.values() for batch, packed in self._factors if batch.unit == unit]
        return sum(side.nbytes for sides in of_unit for side in sides)

    @property
    def home(self) -> torch.device:
        """Where the gradients are."""
        return torch.device("cpu") if self._through_host else self._producer.device

    @property
    def reduced_on(self) -> torch.device | None:
        """The device that multiplies the gradients; `None`: Dask's workers do, in host memory."""
        return None if self._through_host else self._producer.device

    def _settled(self) -> None:
        """Let what is held be read: nobody wrote into it, and the rows of skipped samples are zero.

        Raises:
            CaptureError: factors were altered after their batch.
        """
        for name in self.factored:
            if not all(map(is_as_made, self._sides(name))):
                raise CaptureError(
                    f"{name}: its layer's inputs or their gradients were written to after their batch was done, by the "
                    "model or by a hook. --hold disk (storage_mode='streaming') writes them down at once."
                )
        self._zero_skipped()

    def _sides(self, name: str) -> Iterator[Tensor]:
        """Yield the factors of a parameter that are held."""
        for _, packed in self._factors:
            for keys in packed.pairs.get(name, ()):
                yield from (packed.tensors[key] for key in keys)

    def _zero_skipped(self) -> None:
        """Let the rows of skipped samples be zero, which they are where they came by units."""
        if self._arriving is None:
            for unit in self.own:
                for number in self.skipped:
                    if unit.start <= number < unit.stop:
                        for values in self._rows.values():
                            values[self._first[unit.index] + number - unit.start].zero_()

    def uses(self) -> dict[str, FactorUses]:
        """Return how this rank's samples use each parameter that is held as factors."""
        found = {name: FactorUses() for name in self.factored}
        for _, packed in self._factors:
            for name, pairs in packed.pairs.items():
                for left, right in pairs:
                    of_pair = FactorUses.of(sum(packed.lengths[left]), packed.tensors[left], packed.tensors[right])
                    found[name] += of_pair
        return found

    def part(self, columns: Sequence[Columns]) -> Parcel:
        """Return what this rank holds of some columns, as it goes to another rank; each parameter comes once.

        Raises:
            CaptureError: factors were altered after their batch.
        """
        self._settled()
        tensors = {
            f"rows {some.name}": self._rows[some.name][:, some.start : some.stop]
            for some in columns
            if some.name in self._rows
        }
        wanted = {some.name: some for some in columns if some.name in self.factored}
        segments: dict[str, list[list[Any]]] = {name: [] for name in wanted}
        self._add_factors(wanted, segments, tensors)
        return Parcel(tensors, {"units": [unit.index for unit in self.own], "segments": segments})

    def _add_factors(
        self, wanted: Mapping[str, Columns], segments: Mapping[str, list[list[Any]]], tensors: dict[str, Tensor]
    ) -> None:
        for batch, packed in self._factors:
            for name, some in wanted.items():
                for left, right in packed.pairs.get(name, ()):
                    parts = (
                        PartOfSide.cut(packed.tensors[left], f"{batch.start} {left}", some, "left"),
                        PartOfSide.cut(packed.tensors[right], f"{batch.start} {right}", some, "right"),
                    )
                    tensors |= {part.key: part.values for part in parts}
                    ends = [[part.key, part.first] for part in parts]
                    segments[name].append([batch.start, list(packed.lengths[left]), *ends])

    def joined(self, parcels: Sequence[Parcel], columns: Sequence[Columns]) -> Any:
        """Return the gradients of all samples in some columns from the parts of all ranks, as `held` does."""
        names = [some.name for some in columns]
        factors = {
            name: [
                FactorSegment(
                    sent.start,
                    tuple(sent.lengths),
                    HeldSide(sent.left, sent.first_left),
                    HeldSide(sent.right, sent.first_right),
                )
                for sent in sent_segments(parcels, name)
            ]
            for name in names
            if name in self.factored
        }
        rows = {name: values.numpy() for name, values in self._joined_rows(parcels, names).items()}
        return self._source(rows, factors, self.n_samples, {some.name: some.start for some in columns})

    def _joined_rows(self, parcels: Sequence[Parcel], names: Sequence[str]) -> dict[str, Tensor]:
        rows: dict[str, Tensor] = {}
        for name in names:
            for parcel in parcels:
                part = parcel.tensors.get(f"rows {name}")
                if part is None:
                    continue
                if name not in rows:
                    rows[name] = part.new_empty(self.n_samples, part.shape[1])
                for unit in (self.units[index] for index in parcel.note["units"]):
                    rows[name][unit.start : unit.stop], part = part[: len(unit)], part[len(unit) :]
        return rows

    def _source(
        self,
        rows: Mapping[str, np.ndarray],
        factors: Mapping[str, Sequence[FactorSegment]],
        n_samples: int,
        first: Mapping[str, int] | None = None,
    ) -> MemoryGradients:
        names = [*rows, *factors]
        return MemoryGradients(
            rows,
            factors,
            {name: self.shape(name) for name in names},
            n_samples,
            self.row_dtype,
            columns={name: self.n_columns(name) for name in names},
            first=first,
        )

    def held(self) -> Any:
        """Return the gradients of all samples, those of skipped samples zero, as the reduction takes them."""
        return self.source(all_samples=True)

    def source(self, *, all_samples: bool = False) -> MemoryGradients:
        """Return the gradients of the valid samples, or of all: those of skipped samples are zero then.

        Raises:
            CaptureError: factors were altered after their batch.
        """
        skipped = set() if all_samples else set(self.skipped)
        valid = [number for number in range(self.n_samples) if number not in skipped]
        self._settled()
        rows = {name: values[valid] if skipped else values for name, values in self._rows.items()}
        factors: dict[str, list[FactorSegment]] = {name: [] for name in self.factored}
        place = {number: index for index, number in enumerate(valid)}
        for batch, packed in sorted(self._factors, key=lambda pair: pair[0]):
            kept = [offset for offset, number in enumerate(batch.samples) if number in place]
            if not kept:
                continue
            sides = {key: HeldSide(tensor) for key, tensor in packed.tensors.items()}
            for name, uses in packed.pairs.items():
                for left, right in uses:
                    lengths = tuple(packed.lengths[left][offset] for offset in kept)
                    start = place[batch.start + kept[0]]
                    factors[name].append(FactorSegment(start, lengths, sides[left], sides[right]))
        return self._source({name: values.numpy() for name, values in rows.items()}, factors, len(valid))


def _finite(factors: Mapping[str, Sequence[FactorPair]], check: Callable[[Tensor], Tensor]) -> dict[str, np.ndarray]:
    """Return (B,) bool of each parameter: whether a sample's factors pass a check; one wait for the device."""
    found: dict[str, Tensor] = {}
    for name, pairs in factors.items():
        for pair in pairs:
            side = pair.right if pair.by_index else pair.left  # a loss that is finite has finite inputs
            found[name] = found[name] & check(side) if name in found else check(side)
    flags = torch.stack(list(found.values())).cpu().numpy() if found else ()
    return dict(zip(found, flags, strict=True))


def _sum_is_finite(side: Tensor) -> Tensor:
    """Return (B,) bool: true only where all are finite. A sum takes a fortieth of the time."""
    return torch.isfinite(side.flatten(1).sum(dim=1, dtype=torch.promote_types(side.dtype, torch.float32)))


def _is_finite(side: Tensor) -> Tensor:
    return torch.isfinite(side).flatten(1).all(dim=1)
