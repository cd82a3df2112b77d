"""Gradients that stay on the device where they were made, until they are reduced there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.gradients.factors import FactorPair, is_as_made
from streamfisher.gradients.producer import BatchGradients, GradientProducer
from streamfisher.runtime.exchange import Parcel
from streamfisher.sinks.memory import MemorySink
from streamfisher.sinks.parcels import Columns, FactorUses, PartOfSide, sent_segments


@dataclass(frozen=True)
class PlacedPair(FactorPair):
    """One use of a parameter in a batch, padded as it came: `g_i = sum_t L_it^T R_it`; padding adds zero."""

    start: int  # first sample of the batch
    first: int = 0  # number of the first column of the left factor that is here


@dataclass(frozen=True)
class DeviceGradients:
    """The gradients of all samples on one device: rows of some parameters, factors of the others."""

    rows: Mapping[str, Tensor]  # (N, P_k) each
    pairs: Mapping[str, Sequence[PlacedPair]]  # of consecutive samples
    shapes: Mapping[str, tuple[int, ...]]  # of all parameters
    parameters: Mapping[str, int]  # number of columns of each
    n_samples: int
    row_dtype: torch.dtype
    device: torch.device
    first: Mapping[str, int] = field(default_factory=dict)  # number of the first column of rows that is here, if not 0

    def on_host(self, name: str) -> np.ndarray:
        """Return the rows of a small parameter, (N, P_k), in host memory."""
        if name in self.rows:
            return self.rows[name].cpu().numpy()
        rows = torch.zeros(self.n_samples, self.parameters[name], dtype=self.row_dtype)
        for pair in self.pairs[name]:
            here = rows[pair.start : pair.start + len(pair.right)].view(len(pair.right), *self.shapes[name][:1], -1)
            right = pair.right.cpu().to(rows.dtype)
            if pair.by_index:
                for row, ids, values in zip(here, pair.left.cpu(), right, strict=True):
                    row.index_add_(0, ids, values)
            else:
                here += pair.left.cpu().to(rows.dtype).transpose(1, 2) @ right
        return rows.numpy()


class DeviceSink(MemorySink):
    """A `GradientSink` that leaves the gradients of all samples on the producer's device; arguments as `MemorySink`.

    Rows are written into their place at once. Factors stay as they came, an input that several layers share once.
    """

    _through_host = False

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
        super().__init__(
            producer, units, factored, parameters=parameters, columns=columns, every_norm=every_norm, own=own
        )
        self._pairs: dict[str, list[PlacedPair]] = {name: [] for name in self.factored}

    def batch(self, batch: BatchRef, gradients: BatchGradients, dropped: Collection[int] = ()) -> None:
        """Take the factors of a batch; those of samples that are skipped become zero."""
        taken: dict[int, Tensor] = {}
        places = torch.tensor(sorted(dropped), device=self._producer.device)

        def take(side: Tensor) -> Tensor:
            if id(side) not in taken:
                kept = side.detach() if is_as_made(side) else side.detach().clone()
                taken[id(side)] = kept.index_fill(0, places, 0) if dropped and kept.is_floating_point() else kept
            return taken[id(side)]

        for name, pairs in gradients.factors.items():
            self._pairs[name] += [PlacedPair(take(pair.left), take(pair.right), batch.start) for pair in pairs]

    def _factor_bytes(self, unit: Unit) -> int:
        """Return the bytes of the factors of a unit, a tensor that several pairs share counted once."""
        sizes: dict[tuple[int, int], int] = {}
        for pairs in self._pairs.values():
            for pair in pairs:
                if unit.start <= pair.start < unit.stop:
                    sizes |= {(side.data_ptr(), side.nbytes): side.nbytes for side in (pair.left, pair.right)}
        return sum(sizes.values())

    def held(self) -> DeviceGradients:
        """Return what is held, of all samples; gradients of skipped samples are zero.

        Raises:
            CaptureError: factors were altered after their batch.
        """
        self._settled()
        pairs = {name: sorted(pairs, key=lambda pair: pair.start) for name, pairs in self._pairs.items()}
        return self._gradients(dict(self._rows), pairs)

    def _sides(self, name: str) -> Iterator[Tensor]:
        """Yield the factors of a parameter that are held."""
        for pair in self._pairs[name]:
            yield from (pair.left, pair.right)

    def uses(self) -> dict[str, FactorUses]:
        """Return how this rank's samples use each parameter that is held as factors."""
        found = {name: FactorUses() for name in self.factored}
        for name, pairs in self._pairs.items():
            for pair in pairs:
                found[name] += FactorUses.of(pair.right.shape[:2].numel(), pair.left, pair.right)
        return found

    def _add_factors(
        self, wanted: Mapping[str, Columns], segments: Mapping[str, list[list[Any]]], tensors: dict[str, Tensor]
    ) -> None:
        keys: dict[int, str] = {}
        for name, some in wanted.items():
            for pair in self._pairs[name]:
                left, right = (keys.setdefault(id(side), str(len(keys))) for side in (pair.left, pair.right))
                parts = (
                    PartOfSide.cut(pair.left, left, some, "left"),
                    PartOfSide.cut(pair.right, right, some, "right"),
                )
                tensors |= {part.key: part.values for part in parts}
                segments[name].append([pair.start, [], *([part.key, part.first] for part in parts)])

    def joined(self, parcels: Sequence[Parcel], columns: Sequence[Columns]) -> DeviceGradients:
        """Return the gradients of all samples in some columns from the parts of all ranks, as `held` does."""
        names = [some.name for some in columns]
        pairs = {
            name: [
                PlacedPair(sent.left, sent.right, sent.start, sent.first_left) for sent in sent_segments(parcels, name)
            ]
            for name in names
            if name in self.factored
        }
        return self._gradients(self._joined_rows(parcels, names), pairs, {some.name: some.start for some in columns})

    def _gradients(
        self,
        rows: Mapping[str, Tensor],
        pairs: Mapping[str, Sequence[PlacedPair]],
        first: Mapping[str, int] | None = None,
    ) -> DeviceGradients:
        names = [*rows, *pairs]
        return DeviceGradients(
            rows,
            pairs,
            {name: self.shape(name) for name in names},
            {name: self.n_columns(name) for name in names},
            self.n_samples,
            self.row_dtype,
            self._producer.device,
            dict(first or {}),
        )
