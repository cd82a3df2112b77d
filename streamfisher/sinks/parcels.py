"""What ranks give each other of the gradients that they hold: some columns of some parameters, of their own samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from streamfisher.runtime.exchange import Parcel

#: What is cut of a parameter: its rows, or one of its factors; `None`: nothing.
Cut = Literal["rows", "left", "right"] | None


@dataclass(frozen=True)
class Columns:
    """Columns `start` to `stop` of a parameter's rows, or of one of its factors, beside the whole of the other."""

    name: str
    start: int
    stop: int
    cut: Cut


class FactorUses(NamedTuple):
    """How some samples use a parameter whose gradients are held as factors."""

    positions: int = 0
    by_index: int = 0  # uses whose left factor is one-hot
    uses: int = 0
    left_bytes: int = 0
    right_bytes: int = 0

    @classmethod
    def of(cls, positions: int, left: Tensor, right: Tensor) -> FactorUses:
        """Return those of one pair of factors."""
        return cls(positions, int(not left.is_floating_point()), 1, left.nbytes, right.nbytes)

    def __add__(self, other: FactorUses) -> FactorUses:  # type: ignore[override]
        """Return those of both."""
        return FactorUses(*(one + more for one, more in zip(self, other, strict=True)))


class PartOfSide(NamedTuple):
    """Some columns of a factor of one batch, or all."""

    values: Tensor
    first: int  # number of the first column
    key: str  # differs where tensors do

    @classmethod
    def cut(cls, values: Tensor, key: str, columns: Columns, side: Cut) -> PartOfSide:
        """Return what goes of a factor; ids stay whole."""
        if columns.cut != side or not values.is_floating_point():
            return cls(values, 0, key)
        return cls(values[..., columns.start : columns.stop], columns.start, f"{key} {columns.start}:{columns.stop}")


class SentSegment(NamedTuple):
    """One use of a parameter by consecutive samples, as it came."""

    start: int  # first sample
    lengths: list[int]  # positions of each; none where they are padded
    left: Tensor
    first_left: int
    right: Tensor
    first_right: int


def sent_segments(parcels: Sequence[Parcel], name: str) -> list[SentSegment]:
    """Return every use of a parameter, in the order of the samples.

    Uses of one batch stay in the order in which its rank gave them.
    """
    found = [(parcel, *segment) for parcel in parcels for segment in parcel.note["segments"].get(name, ())]
    return [
        SentSegment(start, lengths, parcel.tensors[left], first_left, parcel.tensors[right], first_right)
        for parcel, start, lengths, (left, first_left), (right, first_right) in sorted(found, key=lambda use: use[1])
    ]
