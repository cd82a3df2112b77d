"""Buffers for the rows of one unit of samples, used again for the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from streamfisher.data.batches import BatchRef, Unit

#: Makes zeroed buffers `{parameter: (rows, columns)}`.
Allocate = Callable[[], dict[str, Tensor]]


class UnitRows:
    """Rows of the unit at hand, where they are formed.

    Fresh memory for each batch would cost more than what is computed in it, so there is one set of buffers, made when
    the first batch comes: a rank that gets no unit needs none.
    """

    def __init__(self, allocate: Allocate) -> None:
        self._allocate = allocate
        self._buffers: dict[str, Tensor] | None = None

    def of_batch(self, batch: BatchRef) -> dict[str, Tensor]:
        """Return the part of the buffers that is the batch's, (B, P_k) each."""
        if self._buffers is None:
            self._buffers = self._allocate()
        first = batch.start - batch.unit.start
        return {name: values[first : first + len(batch)] for name, values in self._buffers.items()}

    def of_unit(self, unit: Unit, skipped: Iterable[int]) -> dict[str, Tensor]:
        """Return the unit's rows, (n, P_k) each; those of skipped samples are zero."""
        buffers = self._buffers or {}
        for sample in skipped:
            for values in buffers.values():
                values[sample - unit.start].zero_()
        return {name: values[: len(unit)] for name, values in buffers.items()}
