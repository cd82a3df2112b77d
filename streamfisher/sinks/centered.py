"""Rows without their mean: subtracted in float64 before they are rounded and stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import numpy as np
import torch

from streamfisher.data.batches import BatchRef, Unit
from streamfisher.gradients.norms import squared_norms_of
from streamfisher.gradients.producer import Asked, BatchGradients
from streamfisher.sinks.disk import DiskSink
from streamfisher.sinks.interface import UnitFacts


class CenteredSink:
    """A `GradientSink` around another: rows arrive as they are and go on without their mean.

    Args:
        inner: takes the centered rows.
        mean: parameter -> (P_k,) float64, over the valid samples.
    """

    def __init__(self, inner: DiskSink, mean: Mapping[str, np.ndarray]) -> None:
        self.inner, self.mean = inner, mean

    @property
    def parameters(self) -> list[str]:
        """Those of the inner sink."""
        return self.inner.parameters

    def todo(self) -> list[Unit]:
        """Return the units that the inner sink does not have."""
        return self.inner.todo()

    def asks(self, batch: BatchRef) -> Asked:
        """Return what the inner sink asks."""
        return self.inner.asks(batch)

    def norms(self, gradients: BatchGradients, n_samples: int) -> dict[str, np.ndarray]:
        """Return the squared norms of the rows as they are."""
        return self.inner.norms(gradients, n_samples)

    def batch(self, batch: BatchRef, gradients: BatchGradients, dropped: Collection[int] = ()) -> None:
        """Hand a batch on: its rows are centered with their unit."""
        self.inner.batch(batch, gradients, dropped)

    def unit(self, unit: Unit, facts: UnitFacts) -> int:
        """Subtract the mean from the valid rows of a unit and hand it on, with the norms of what is stored."""
        valid = [sample - unit.start for sample in range(unit.start, unit.stop) if sample not in facts.skipped]
        rows = self.inner.rows.of_unit(unit, facts.skipped)
        for name, values in rows.items():
            center = torch.from_numpy(np.asarray(self.mean[name])).to(values.device)
            for place in valid:
                values[place] = values[place].double() - center  # a row at a time: in float64 it takes twice the room
        return self.inner.write(unit, dataclasses.replace(facts, squared_norms=squared_norms_of(rows)), rows)

    def settle(self) -> None:
        """Return when the inner sink has everything."""
        self.inner.settle()
