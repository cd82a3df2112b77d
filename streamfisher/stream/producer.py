"""The other producer: a stream of the model's layers, where each wave is a segment or a part of one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from streamfisher.byte_sizes import format_bytes
from streamfisher.config import dtype_name
from streamfisher.data.batches import BatchRef
from streamfisher.errors import CapacityError, CaptureError, StreamError
from streamfisher.gradients.parameters import ParameterInfo
from streamfisher.gradients.probe_report import ProbeReport
from streamfisher.gradients.producer import Asked, BatchGradients, Wave
from streamfisher.gradients.shapes import GradientShape
from streamfisher.gradients.tolerance import TOLERANCE
from streamfisher.models.batches import ModelBatches
from streamfisher.runtime.ranks import Ranks
from streamfisher.stream.backward import LOSSES, TARGETS
from streamfisher.stream.boundaries import MISSING, Boundaries, boundary_spacing
from streamfisher.stream.host_copies import HostCopies
from streamfisher.stream.layer_stream import LayerStream
from streamfisher.stream.segments import Segment


class StreamProducer:
    """A `GradientProducer` that has one segment of the model at work at a time; a context manager.

    What segments hand on to each other is kept in a folder, so that ranks share it and a resumed run finds it; or in
    host memory, where a rank takes its own batches and a kill costs the wave.

    Args:
        stream: of the model.
        first: gives the batch that the model is traced on.
        ranks: all of them; they divide what a segment needs and is missing. `None`: this process alone.
    """

    def __init__(
        self, stream: LayerStream, first: Callable[[], Mapping[str, Tensor]], ranks: Ranks | None = None
    ) -> None:
        self.stream, self._first, self._ranks = stream, first, ranks
        selection = stream.selection
        self._parameters, self._excluded = selection.infos, selection.excluded
        self._row_dtype = stream.dtype_compute
        for info in self._parameters.values():
            self._row_dtype = torch.promote_types(self._row_dtype, info.dtype)
        self._wave: Wave | None = None
        self._todo: ModelBatches | None = None  # those of the wave's batches that the stream is prepared for
        self._in_memory = False  # boundaries of this rank's own batches are, which others do not see

    def __enter__(self) -> Self:
        self.stream.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.__exit__(*exc)

    @property
    def parameters(self) -> Mapping[str, ParameterInfo]:
        """Captured parameters, in the model's order."""
        return self._parameters

    @property
    def excluded(self) -> Mapping[str, str]:
        """Trainable parameters that are left out, with the reason."""
        return self._excluded

    @property
    def columns(self) -> Mapping[str, int]:
        """Nothing: a stream projects no row."""
        return {}

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype in which rows are formed."""
        return self._row_dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.stream.device

    @property
    def tolerance(self) -> float:
        """Norm-relative difference from plain autograd that counts as agreement."""
        dtypes = [info.dtype for info in self._parameters.values() if info.dtype in TOLERANCE]
        coarsest = max(dtypes, key=TOLERANCE.__getitem__, default=torch.float32)
        report = self.stream.report
        if report is None:
            return TOLERANCE[coarsest]
        seen = (tolerance for dtype, tolerance in TOLERANCE.items() if dtype_name(dtype) in report.arithmetic)
        return max(TOLERANCE[coarsest], report.tolerance, *seen)

    def probe(self, memory: int | None = None) -> ProbeReport:
        """Trace the model and verify a rule for each parameter, see `LayerStream.study`."""
        self.stream.memory = memory
        return self.stream.study(self._first())

    def shapes(self) -> tuple[list[GradientShape], float]:
        """Return what the probe saw: what gradients are made of, and bytes for each padded token of a segment."""
        return self.stream.shapes, self.stream.activations

    def apply_routes(self, report: ProbeReport) -> None:
        """Reuse the routing of an earlier probe; the model is traced if it was not."""
        if list(report.parameters) != list(self._parameters):
            raise CaptureError("The stored routing is for other parameters.")
        if self.stream.report is None:
            self.stream.study(self._first(), report)
        self.stream.report = report

    def segments(self) -> list[list[str]]:
        """Return the parameters of each segment that has any, in the order of the backward stream."""
        return [list(segment.parameters) for segment in self.stream.segments if segment.parameters]

    def beside_weights(self, budget: int) -> int:
        """Return what a memory budget leaves beside the weights that are read segment by segment.

        Raises:
            CapacityError: nothing is left.
        """
        weights = self.stream.weights.within_budget(list(self.stream.shell.layers))
        if weights >= budget:
            raise CapacityError(
                f"two layers and the code around the layers have {format_bytes(weights)} of weights, and "
                f"--memory-budget {format_bytes(budget)} is for them and all else. Give more."
            )
        return budget - weights

    def keep_between_waves(self, room: int, n_tokens: int, folder: Path | None = None, memory: int = 0) -> None:
        """Keep as many boundaries between layers as fit; the others are made again.

        Args:
            room: bytes on the disk for boundaries.
            n_tokens: padded tokens of all batches.
            folder: where they are kept, and found by other processes and later ones.
            memory: bytes of host memory for those of this rank's batches, the disk being for what exceeds them; 0: all
                are kept on the disk, for all ranks.

        Raises:
            CapacityError: not even two fit: one that is kept and the gradient that goes down.
        """
        count = 1 if self._ranks is None else self._ranks.count
        self._in_memory = memory > 0
        if folder is not None:
            copies = HostCopies(self.device) if self._in_memory and self.device.type != "cpu" else None
            self.stream.use_boundaries(
                Boundaries(folder, memory=memory or None, durable=not self._in_memory, copies=copies)
            )
            if self._ranks is not None:
                self.stream.forward_stream.after_batch = self._ranks.alive
        each = self.stream.boundary_bytes(n_tokens)
        self.stream.forward_stream.keep_every = boundary_spacing(room + count * memory, each, len(self.stream.segments))

    def allocate(
        self, n_rows: int, names: Collection[str] | None = None, columns: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Return zeroed buffers `(n_rows, P_k)`, see `GradientPasses.allocate`."""
        wanted = [name for name in self._parameters if names is None or name in names]
        widths = {name: self._parameters[name].numel for name in wanted} | dict(columns or {})
        return {
            name: torch.zeros(n_rows, widths[name], dtype=self._row_dtype, device=self.stream.device) for name in wanted
        }

    def begin(self, wave: Wave) -> None:
        """Make what the wave's segment needs of these batches; ranks divide what is missing."""
        segment = self._segment_of(wave)
        if self._in_memory:
            wave = dataclasses.replace(wave, todo=wave.todo if wave.own is None else wave.own)
        elif self._ranks is not None and self._ranks.count > 1:
            own = wave.todo[self._ranks.index :: self._ranks.count]
            self.stream.begin(segment, wave.batches.only(own))
            self._ranks.wait("for the stream's boundaries")
        self._wave, self._todo = wave, wave.batches.only(wave.todo)
        self.stream.begin(segment, self._todo)

    def gradients(self, batch: BatchRef, asked: Asked) -> BatchGradients:
        """Replay the wave's segment on one batch, and hand the gradient on to the segment below."""
        if self._wave is None or self._todo is None or batch not in self._todo:
            raise CaptureError(f"batch {batch} was asked for, and the stream was not prepared for it.")
        segment = self._segment_of(self._wave)
        result = self.stream.gradients(segment, batch, self._todo, asked.rows, asked.factored)
        losses = self.stream.boundaries.get(batch, LOSSES)
        targets = self.stream.boundaries.get(batch, TARGETS)
        if losses is MISSING or targets is MISSING:
            raise CaptureError("the losses of a batch were not recorded.")
        filled = {name: values[: len(batch)] for name, values in asked.rows.items()}
        return BatchGradients(losses, targets, result.factors, filled)

    def guard(
        self,
        batch: BatchRef,
        gradients: BatchGradients | None,
        names: Collection[str],
        places: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Compare the sums of the gradients that were taken last with the segment's ordinary gradient.

        Of the whole batch, whatever `places` are enough: its boundaries are at hand.
        """
        if self._wave is None or gradients is None:
            raise CaptureError("a stream compares the gradients of its own last batch.")
        rows = {name: values for name, values in gradients.rows.items() if name in names}
        factors = {name: pairs for name, pairs in gradients.factors.items() if name in names}
        return self.stream.guard(self._segment_of(self._wave), rows, factors)

    def guard_alone(self, batch: BatchRef, gradients: BatchGradients, names: Collection[str]) -> dict[int, float]:
        """Return nothing: the segments are compared batch by batch."""
        return {}

    @property
    def guards_in_parts(self) -> bool:
        """No: a segment's parameters are in memory, and one gradient of theirs at a time."""
        return False

    def finish(self, wave: Wave) -> None:
        """Forget what no later wave needs, once all of a segment's waves are through."""
        segment = self._segment_of(wave)
        is_main = self._ranks is None or self._ranks.is_main
        if (is_main or self._in_memory) and wave.parameters[-1] == segment.parameters[-1]:
            self.stream.finish(segment, wave.batches)
        if self._ranks is not None:
            self._ranks.wait("for the end of the segment")

    def close(self) -> None:
        """Delete the boundaries."""
        if self._ranks is None or self._ranks.is_main or self._in_memory:
            self.stream.boundaries.clear()

    def _segment_of(self, wave: Wave) -> Segment:
        for segment in self.stream.segments:
            if set(wave.parameters) <= set(segment.parameters):
                return segment
        raise StreamError(
            f"the run's waves are not segments of this model: {', '.join(wave.parameters[:3])}, ... lie in several. "
            "Resume it with --stream none."
        )
