"""Memory of the host: gradients of all samples, as rows or as factors, until they are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.gradients.factors import BatchFactors, FactorPair, matrix_shape, on_host, pack
from streamfisher.gradients.norms import batch_norms, squared_norms_of
from streamfisher.gradients.producer import Asked, BatchGradients, GradientProducer
from streamfisher.runtime.exchange import Parcel
from streamfisher.sinks.interface import UnitFacts
from streamfisher.sinks.unit_rows import UnitRows
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

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the values; `None`: ids."""
        return None if self.values.dim() == 1 else self.values.dtype

    @property
    def width(self) -> int:
        """The values per position, 1 for ids."""
        return self.values.shape[1] if self.values.dim() > 1 else 1

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return columns `start` to `stop` of all positions, float32 or float64, a view where it can be; or all ids."""
        if self.values.dim() == 1:
            return self.values.numpy()
        part = self.values[:, start:stop]
        return (part if part.dtype in (torch.float32, torch.float64) else part.float()).numpy()


class MemoryGradients(MemoryRows):
    """Rows of some parameters and factors of the others, with the same face as a stored run."""

    def __init__(
        self,
        rows: Mapping[str, np.ndarray],
        factors: Mapping[str, Sequence[FactorSegment]],
        shapes: Mapping[str, tuple[int, ...]],
        n_samples: int,
        row_dtype: torch.dtype,
    ) -> None:
        super().__init__(rows)
        self.factors, self.shapes, self.n_samples = dict(factors), dict(shapes), n_samples
        widths = {name: values.shape[1] for name, values in rows.items()}
        self.parameters = {name: int(np.prod(shape)) for name, shape in shapes.items()} | widths
        self.numpy_row_dtype = self.numpy_read_dtype = np.dtype("float64" if row_dtype == torch.float64 else "float32")

    def columns(
        self, name: str, start: int, stop: int, rows: slice | None = None, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return (N, stop - start), or a range of those rows; a view where they are held as rows."""
        if name not in self.factors:
            return super().columns(name, start, stop, rows, out=out)
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
        if self._through_host and producer.device.type != "cpu":
            self.through_units()

    def through_units(self) -> None:
        """Let rows be formed in buffers of one unit and copied from there, as they must be from a device."""
        height = max(len(unit) for unit in self.units)
        self._arriving = UnitRows(lambda: self._producer.allocate(height, self.dense, self._widths))

    @property
    def parameters(self) -> list[str]:
        """Those held as rows, then those held as factors."""
        return [*self.dense, *self.factored]

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
        """Take the factors of a batch, without padding; its rows are in their buffers."""
        if gradients.factors:
            self._factors.append((batch, pack(on_host(gradients.factors), dropped=list(dropped))))

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

    def _zero_skipped(self) -> None:
        """Let the rows of skipped samples be zero, which they are where they came by units."""
        if self._arriving is None:
            for unit in self.own:
                for number in self.skipped:
                    if unit.start <= number < unit.stop:
                        for values in self._rows.values():
                            values[self._first[unit.index] + number - unit.start].zero_()

    def part(self, names: Sequence[str]) -> Parcel:
        """Return what this rank holds of some parameters, as it goes to another rank."""
        self._zero_skipped()
        tensors = {f"rows {name}": self._rows[name] for name in names if name in self._rows}
        segments: dict[str, list[list[Any]]] = {name: [] for name in names if name in self.factored}
        self._add_factors(segments, tensors)
        return Parcel(tensors, {"units": [unit.index for unit in self.own], "segments": segments})

    def _add_factors(self, segments: Mapping[str, list[list[Any]]], tensors: dict[str, Tensor]) -> None:
        for batch, packed in self._factors:
            for name, found in segments.items():
                for sides in packed.pairs.get(name, ()):
                    keys = [f"{batch.start} {side}" for side in sides]
                    tensors |= {key: packed.tensors[side] for key, side in zip(keys, sides, strict=True)}
                    found.append([batch.start, list(packed.lengths[sides[0]]), *keys])

    def joined(self, parcels: Sequence[Parcel], names: Sequence[str]) -> Any:
        """Return the gradients of all samples of some parameters from the parts of all ranks, as `held` does."""
        return MemoryGradients(
            {name: values.numpy() for name, values in self._joined_rows(parcels, names).items()},
            {
                name: [
                    FactorSegment(start, tuple(lengths), HeldSide(left), HeldSide(right))
                    for start, lengths, left, right in joined_segments(parcels, name)
                ]
                for name in names
                if name in self.factored
            },
            self._shapes(names),
            self.n_samples,
            self._producer.row_dtype,
        )

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

    def _shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        return {name: self._producer.parameters[name].shape for name in names}

    def held(self) -> Any:
        """Return the gradients of all samples, those of skipped samples zero, as the reduction takes them."""
        return self.source(all_samples=True)

    def source(self, *, all_samples: bool = False) -> MemoryGradients:
        """Return the gradients of the valid samples, or of all: those of skipped samples are zero then."""
        skipped = set() if all_samples else set(self.skipped)
        valid = [number for number in range(self.n_samples) if number not in skipped]
        self._zero_skipped()
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
        arrays = {name: values.numpy() for name, values in rows.items()}
        return MemoryGradients(arrays, factors, self._shapes(self.parameters), len(valid), self._producer.row_dtype)


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


def joined_segments(parcels: Sequence[Parcel], name: str) -> list[tuple[int, list[int], Tensor, Tensor]]:
    """Return (first sample, positions of each sample, L, R) of every use of a parameter, in the order of the samples.

    Uses of one batch stay in the order in which its rank gave them.
    """
    found = [(parcel, *segment) for parcel in parcels for segment in parcel.note["segments"].get(name, ())]
    return [
        (start, lengths, parcel.tensors[left], parcel.tensors[right])
        for parcel, start, lengths, left, right in sorted(found, key=lambda entry: entry[1])
    ]
