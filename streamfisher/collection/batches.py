"""The batches of a run by number, for whoever asks for them out of order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.collection.survey import Survey
from streamfisher.data.batches import Unit, collate, make_batches
from streamfisher.models.offload import to_model


class UnitBatches(Mapping[int, dict[str, Tensor]]):
    """The batches of some units by a number that is made of their contents; collated when they are looked at.

    Args:
        found: the samples.
        units: whose batches.
        batch_tokens: padded tokens of one batch.
        model: on whose device and in whose dtype they are.
    """

    def __init__(self, found: Survey, units: Sequence[Unit], batch_tokens: int, model: nn.Module) -> None:
        self.found, self.model = found, model
        self._ranges: dict[int, range] = {}
        for unit in units:
            lengths = [found.lengths[number] for number in range(unit.start, unit.stop)]
            for batch in make_batches(lengths, batch_tokens):
                where = range(unit.start + batch.start, unit.start + batch.stop)
                self._ranges[batch_number(self._collated(where))] = where

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self._collated(self._ranges[number])

    def __iter__(self) -> Iterator[int]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def only(self, units: Sequence[Unit]) -> UnitBatches:
        """Return the batches of some of the units."""
        part = UnitBatches(self.found, (), 1, self.model)
        within = [(unit.start, unit.stop) for unit in units]
        part._ranges = {
            number: where
            for number, where in self._ranges.items()
            if any(start <= where.start < stop for start, stop in within)
        }
        return part

    def share(self, index: int, count: int) -> UnitBatches:
        """Return every `count`-th batch from `index` on."""
        part = UnitBatches(self.found, (), 1, self.model)
        part._ranges = dict(list(self._ranges.items())[index::count])
        return part

    def _collated(self, where: range) -> dict[str, Tensor]:
        return to_model(collate([self.found.samples[number] for number in where]), self.model)


def batch_number(batch: Mapping[str, Any]) -> int:
    """Return a number made of a batch's contents."""
    digest = hashlib.blake2b(digest_size=7)
    for key in sorted(batch):
        value = batch[key]
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big")
