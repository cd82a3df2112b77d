"""The ordinary producer: forward and backward of the whole model, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from streamfisher.data.batches import BatchRef
from streamfisher.errors import CaptureError
from streamfisher.gradients.engine import GradientEngine
from streamfisher.gradients.parameters import ParameterInfo
from streamfisher.gradients.probe_report import ProbeReport
from streamfisher.gradients.producer import Asked, BatchGradients, Wave
from streamfisher.gradients.shapes import GradientShape
from streamfisher.gradients.shared_forward import SharedInputs
from streamfisher.gradients.tolerance import COUPLING
from streamfisher.models.calling import samples_of


class ModelProducer:
    """A `GradientProducer` of a model as a whole; a context manager, as its engine is.

    Args:
        engine: of the model.
        first: gives the batch that the engine is probed on.
    """

    def __init__(self, engine: GradientEngine, first: Callable[[], Mapping[str, Tensor]]) -> None:
        self.engine, self._first = engine, first
        self._probed_on: Mapping[str, Tensor] | None = None
        self._wave: Wave | None = None
        self._last: tuple[BatchRef, Mapping[str, Tensor]] | None = None  # so that a guarded batch is made once

    def __enter__(self) -> Self:
        self.engine.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.engine.__exit__(*exc)

    @property
    def parameters(self) -> Mapping[str, ParameterInfo]:
        """Captured parameters, in the model's order."""
        return self.engine.parameters

    @property
    def excluded(self) -> Mapping[str, str]:
        """Trainable parameters that are left out, with the reason."""
        return self.engine.excluded

    @property
    def columns(self) -> Mapping[str, int]:
        """Numbers of a row of parameters that are projected."""
        return {} if self.engine.projection is None else self.engine.projection.columns

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype in which rows are formed."""
        return self.engine.row_dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.engine.device

    @property
    def tolerance(self) -> float:
        """Norm-relative difference from plain autograd that counts as agreement."""
        return self.engine.guard_tolerance

    def probe(self, memory: int | None = None) -> ProbeReport:
        """Choose a rule for each parameter and verify it, see `GradientEngine.probe`."""
        return self.engine.probe(self._few(), memory)

    def shapes(self) -> tuple[list[GradientShape], float]:
        """Return what each parameter's gradient is made of, and the bytes a backward pass takes a padded token."""
        return self.engine.shapes(self._few())

    def apply_routes(self, report: ProbeReport) -> None:
        """Use the routing of an earlier probe."""
        self.engine.apply_routes(report)

    def segments(self) -> None:
        """Return `None`: any parameters may share a wave."""

    def beside_weights(self, budget: int) -> int:
        """Return the budget: the weights are there already."""
        return budget

    def keep_between_waves(self, room: int, n_tokens: int, folder: Path | None = None, memory: int = 0) -> None:
        """Keep nothing: each wave is a pass of its own."""

    def allocate(
        self, n_rows: int, names: Collection[str] | None = None, columns: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Return zeroed buffers `(n_rows, P_k)`, see `GradientPasses.allocate`."""
        return self.engine.allocate(n_rows, names, columns)

    def begin(self, wave: Wave) -> None:
        """Take batches from this wave."""
        self._wave, self._last = wave, None

    def gradients(self, batch: BatchRef, asked: Asked) -> BatchGradients:
        """Take the gradients of one batch by one forward and backward pass."""
        contents = self._contents(batch)
        per_input = 1 if self._wave is None else self._wave.batches.per_input
        shared = None if per_input == 1 else SharedInputs(batch.start % per_input, per_input)
        return self.engine.rows(contents, asked.rows, asked.factored, shared)

    def guard(
        self,
        batch: BatchRef,
        gradients: BatchGradients | None,
        names: Collection[str],
        places: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Compare the sums of the gradients of a batch with its ordinary gradient, see `GradientEngine.guard`."""
        rows = {} if gradients is None else {name: v for name, v in gradients.rows.items() if name in names}
        factors = {} if gradients is None else {name: v for name, v in gradients.factors.items() if name in names}
        contents = self._contents(batch)
        if places is not None and len(places) < len(batch) and not self.engine.loss.sequential:
            where = list(places)
            contents = samples_of(contents, where)
            rows = {name: values[where] for name, values in rows.items()}
            factors = {name: [pair.of(where) for pair in pairs] for name, pairs in factors.items()}
        return self.engine.guard(contents, rows, factors, names)

    def guard_alone(self, batch: BatchRef, gradients: BatchGradients, names: Collection[str]) -> dict[int, float]:
        """Compare the first, the last and the shortest sample of a batch with the same samples alone.

        The losses first: what batch mates or padding change shows there, and only then gradients are taken.
        """
        if self._wave is None:
            raise CaptureError("begin a wave before asking for gradients.")
        batches, engine = self._wave.batches, self.engine
        drawn = batches.label_seed is not None  # labels may be others by rounding
        if len(batch) == 1 or engine.loss.sequential or drawn or self.guards_in_parts:
            return {}
        found = {}
        for sample in sorted({batch.start, batch.stop - 1, batches.shortest(batch)}):
            place = sample - batch.start
            alone, loss = batches.of_samples([sample]), float(gradients.losses[place])
            if abs(engine.loss_alone(alone) - loss) <= max(self.tolerance, COUPLING) * max(abs(loss), 1e-3):
                continue
            rows = {name: v[place : place + 1] for name, v in gradients.rows.items() if name in names}
            factors = {name: [p.of(place) for p in pairs] for name, pairs in gradients.factors.items() if name in names}
            worst = max(engine.guard_alone(alone, rows, factors).values(), default=0.0)
            if worst > self.tolerance:
                found[sample] = worst
        return found

    @property
    def guards_in_parts(self) -> bool:
        """Whether weights are offloaded or sharded."""
        return not self.engine.one_gradient_at_a_time

    def finish(self, wave: Wave) -> None:
        """Let go of the wave's batches."""
        self._wave = self._last = None

    def close(self) -> None:
        """Do nothing: nothing was kept."""

    def _few(self) -> Mapping[str, Tensor]:
        if self._probed_on is None:
            self._probed_on = self._first()
        return self._probed_on

    def _contents(self, batch: BatchRef) -> Mapping[str, Tensor]:
        if self._wave is None:
            raise CaptureError("begin a wave before asking for gradients.")
        if self._last is None or self._last[0] != batch:
            self._last = batch, self._wave.batches[batch]
        return self._last[1]
