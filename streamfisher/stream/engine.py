"""A stream in an engine's clothes: what collects a run's waves need not know that each is a segment of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.byte_sizes import format_bytes
from streamfisher.collection.batches import UnitBatches, batch_number
from streamfisher.errors import CapacityError, CaptureError, StreamError
from streamfisher.gradients.factors import FactorPair
from streamfisher.gradients.passes import BatchGradients
from streamfisher.gradients.probe_report import ProbeReport
from streamfisher.gradients.shapes import GradientShape
from streamfisher.gradients.tolerance import TOLERANCE
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.weights import Resident
from streamfisher.stream.backward import LOSSES, TARGETS
from streamfisher.stream.boundaries import MISSING, Boundaries
from streamfisher.stream.layer_stream import LayerStream
from streamfisher.stream.segments import Segment


class StreamEngine:
    """What `GradientEngine` is for a whole model, one segment at a time.

    Args:
        model: a stack of layers.
        loss: what `resolve_loss` returned.
        include: glob patterns of parameter names to capture; empty: all trainable ones.
        exclude: glob patterns of parameter names to leave out.
        dtype_compute: the least dtype in which rows are formed.
        deterministic: see `GradientEngine`.
        weights: where a segment's weights come from; `None`: they are in memory.
        keep_every: see `LayerStream`.

    Raises:
        ModelError: nothing can be captured.
        StreamError: the loss cannot be streamed.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        dtype_compute: torch.dtype = torch.float32,
        deterministic: bool = False,
        weights: Resident | None = None,
        keep_every: int = 1,
    ) -> None:
        self.model, self.loss = model, loss
        self.stream = LayerStream(
            model,
            loss,
            include=include,
            exclude=exclude,
            dtype_compute=dtype_compute,
            deterministic=deterministic,
            weights=weights,
            keep_every=keep_every,
        )
        selection = self.stream.selection
        self.tensors, self.parameters, self.excluded = selection.tensors, selection.infos, selection.excluded
        self.row_dtype = dtype_compute
        for info in self.parameters.values():
            self.row_dtype = torch.promote_types(self.row_dtype, info.dtype)
        self._segment: Segment | None = None
        self._batches: UnitBatches | None = None

    @property
    def tolerance(self) -> float:
        """Norm-relative error that counts as agreement."""
        dtypes = [info.dtype for info in self.parameters.values() if info.dtype in TOLERANCE]
        coarsest = max(dtypes, key=TOLERANCE.__getitem__, default=torch.float32)
        return max(TOLERANCE[coarsest], self.stream.report.tolerance if self.stream.report else 0.0)

    def __enter__(self) -> StreamEngine:
        self.stream.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.__exit__(*exc)

    def probe(self, batch: Mapping[str, Any], memory: int | None = None) -> ProbeReport:
        """Trace the model and verify a rule for each parameter, see `LayerStream.study`."""
        self.stream.memory = memory
        return self.stream.study(batch)

    def shapes(self, batch: Mapping[str, Any]) -> tuple[list[GradientShape], float]:
        """Return what the probe saw: what gradients are made of, and bytes for each padded token of a segment."""
        return self.stream.shapes, self.stream.activations

    def beside_weights(self, budget: int) -> int:
        """Return what a memory budget leaves beside the weights that are read segment by segment.

        Raises:
            CapacityError: the weights alone need all of it.
        """
        weights = self.stream.weights.within_budget(list(self.stream.shell.layers))
        if weights >= budget:
            raise CapacityError(
                f"two layers and the code around the layers have {format_bytes(weights)} of weights, and "
                f"--memory-budget {format_bytes(budget)} is for them and all else. Give more."
            )
        return budget - weights

    def waves(self) -> list[list[str]]:
        """Return the parameters of each segment that has any, in the order of the backward stream."""
        return [list(segment.parameters) for segment in self.stream.segments if segment.parameters]

    def apply_routes(self, report: ProbeReport, batch: Mapping[str, Any]) -> None:
        """Reuse the routing of an earlier probe; the model is traced if it was not."""
        if list(report.parameters) != list(self.parameters):
            raise CaptureError("The stored routing is for other parameters.")
        if self.stream.report is None:
            self.stream.study(batch, report)
        self.stream.report = report

    def keep_boundaries(self, folder: Path, after_batch: Callable[[], None] = lambda: None) -> None:
        """Keep boundaries in this folder, where other processes, and later ones, find them.

        Args:
            folder: made when it is needed.
            after_batch: called whenever a batch went through a segment outside of `rows`.
        """
        self.stream.use_boundaries(Boundaries(folder, durable=True))
        self.stream.forward_stream.after_batch = after_batch

    def thin_boundaries(self, limit: int, n_tokens: int) -> None:
        """Keep as many boundaries as fit.

        Args:
            limit: bytes for all batches.
            n_tokens: padded tokens of all batches.

        Raises:
            CapacityError: not even two fit: one that is kept and the gradient that goes down.
        """
        each = self.stream.boundary_bytes(n_tokens)
        fits = limit // max(each, 1) - 1
        if fits < 1:
            raise CapacityError(
                f"the hidden states at one boundary between layers take {format_bytes(each)} for all samples, with "
                f"their gradient {format_bytes(2 * each)}, and {format_bytes(limit)} of the disk are for them. Give or "
                "free more disk, or take fewer samples."
            )
        self.stream.forward_stream.keep_every = -(-len(self.stream.segments) // fits)

    def begin_wave(self, names: Collection[str], batches: UnitBatches) -> None:
        """Make ready for the pass of a wave: everything it needs of these batches is there afterwards."""
        self._segment = self._segment_of(names)
        self._batches = batches
        self.stream.begin(self._segment, batches)

    def prepare(self, names: Collection[str], batches: Mapping[int, dict[str, Tensor]]) -> None:
        """Do this process's part of what `begin_wave` needs, on some of the batches."""
        self.stream.begin(self._segment_of(names), batches)

    def finish_wave(self, names: Collection[str], batches: Collection[int]) -> None:
        """Forget what no later wave needs."""
        self.stream.finish(self._segment_of(names), batches)

    def same_segment(self, names: Collection[str], others: Collection[str]) -> bool:
        """Return whether two waves are parts of one segment."""
        return self._segment_of(names) == self._segment_of(others)

    def allocate(
        self, n_rows: int, names: Collection[str] | None = None, columns: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Return buffers `(n_rows, P_k)` in `row_dtype`, to be reused, see `GradientEngine.allocate`."""
        wanted = self.parameters if names is None else [name for name in self.parameters if name in names]
        widths = {name: self.parameters[name].numel for name in wanted} | dict(columns or {})
        return {
            name: torch.zeros(n_rows, widths[name], dtype=self.row_dtype, device=self.stream.device) for name in wanted
        }

    def rows(
        self, batch: Mapping[str, Any], out: Mapping[str, Tensor], factored: Collection[str] = ()
    ) -> BatchGradients:
        """Fill rows or return factors of the current wave's parameters, see `GradientEngine.rows`."""
        number = batch_number(batch)
        if self._segment is None or self._batches is None or number not in self._batches:
            raise CaptureError("a batch was asked for that the stream was not prepared for.")
        result = self.stream.gradients(self._segment, number, self._batches, out, factored)
        losses = self.stream.boundaries.get(number, LOSSES)
        targets = self.stream.boundaries.get(number, TARGETS)
        if losses is MISSING or targets is MISSING:
            raise CaptureError("the losses of a batch were not recorded.")
        return BatchGradients(losses, targets, result.factors)

    def guard(
        self,
        batch: Mapping[str, Any],
        out: Mapping[str, Tensor],
        factors: Mapping[str, Sequence[FactorPair]] | None = None,
    ) -> dict[str, float]:
        """Compare the sums of the rows that were taken last with the segment's ordinary gradient."""
        return self.stream.guard(self._segment, out, factors or {})

    def _segment_of(self, names: Collection[str]) -> Segment:
        for segment in self.stream.segments:
            if set(names) <= set(segment.parameters):
                return segment
        raise StreamError(
            f"the run's waves are not segments of this model: {', '.join(list(names)[:3])}, ... lie in several. "
            "Resume it with --stream none."
        )
