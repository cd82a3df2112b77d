"""A model as a stream of segments: forward once for all batches, then backward segment by segment.

Forward, every batch goes through a layer before the next layer is taken; what layers hand on to each other is kept at
the boundaries. Backward, from the top, a segment is replayed on each batch from its recorded inputs and the gradient of
its outputs; that gives the rows of its parameters and the gradient that the segment below needs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamfisher.data.batches import BatchRef, padded_tokens
from streamfisher.errors import CaptureError, StreamError
from streamfisher.gradients.engine import GradientEngine
from streamfisher.gradients.parameters import select_parameters
from streamfisher.gradients.probe_report import ProbeReport
from streamfisher.gradients.producer import BatchGradients
from streamfisher.gradients.shapes import GradientShape
from streamfisher.gradients.state import as_it_was, without_fast_paths, without_parameter_hooks
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.offload import working_device
from streamfisher.models.weights import Resident
from streamfisher.stream.backward import LOSSES, TARGETS, DamagedGradient, OpenSegment, grad_at, passed, segment_loss
from streamfisher.stream.boundaries import MISSING, Boundaries
from streamfisher.stream.forward import Batches, ForwardStream
from streamfisher.stream.replay import grad_name, value_name
from streamfisher.stream.routing import Names, patterns
from streamfisher.stream.segments import Segment, Stack
from streamfisher.stream.shell import Shell
from streamfisher.stream.study import Study, few_samples


class LayerStream:
    """Per-sample gradients segment by segment. A context manager: inside, the model is in eval mode.

        with LayerStream(model, loss) as stream:
            stream.study(batches[0])
            stream.forward(batches)
            for segment in stream.segments:
                stream.begin(segment, batches)
                for index in batches:
                    stream.gradients(segment, index, batches, rows)
                stream.finish(segment, batches)

    Args:
        model: a stack of layers.
        loss: what `resolve_loss` returned.
        include: glob patterns of parameter names to capture; empty: all trainable ones.
        exclude: glob patterns of parameter names to leave out.
        dtype_compute: the least dtype in which rows are formed.
        deterministic: use the attention kernel whose result does not depend on padding or batch mates.
        weights: where a segment's weights come from; `None`: they are in memory.
        boundaries: where boundary tensors are kept; `None`: in memory.
        keep_every: of the hidden states between layers, only every so-many-th is kept, and the rest made again.
        memory: bytes for the gradients that the probe compares; `None`: a quarter of what is free.

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
        boundaries: Boundaries | None = None,
        keep_every: int = 1,
        memory: int | None = None,
    ) -> None:
        if loss.sequential:
            raise StreamError("the model returns only a scalar loss, taken one sample at a time; use --stream none.")
        self.model, self.loss, self.deterministic, self.dtype_compute = model, loss, deterministic, dtype_compute
        self.selection = select_parameters(model, include, exclude)
        self.shell = Shell(model)
        self.weights = weights or Resident()
        self.boundaries = boundaries or Boundaries()
        self.keep_every, self.memory = keep_every, memory
        self.device = working_device(model, *next(iter(self.selection.tensors.items())))
        self.report: ProbeReport | None = None
        self.shapes: list[GradientShape] = []  # what each parameter's gradient is made of, after a study that probed
        self.activations = 0.0  # bytes that a segment's backward pass takes for each padded token
        self._parts: tuple[Stack, Names, ForwardStream] | None = None
        self._undo: contextlib.ExitStack | None = None
        self._open: OpenSegment | None = None
        self._order: tuple[Batches, dict[BatchRef, BatchRef]] | None = None  # what comes after each of these

    def __enter__(self) -> LayerStream:
        with contextlib.ExitStack() as stack:
            stack.enter_context(as_it_was(self.model))
            stack.enter_context(without_parameter_hooks(self.model))
            stack.enter_context(without_fast_paths(self.model))
            if self.deterministic:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            self.model.eval()
            stack.callback(self._close_segment)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments in the order of the backward stream."""
        return self._studied[0].segments

    @property
    def forward_stream(self) -> ForwardStream:
        """What fills the boundaries."""
        return self._studied[2]

    def study(self, batch: Mapping[str, Any], report: ProbeReport | None = None) -> ProbeReport:
        """Trace the model on a few samples, and verify a rule for each parameter, layer by layer.

        Args:
            batch: a dict of batched tensors with at least 2 samples.
            report: the routing of an earlier study, which is used as it is.

        Raises:
            StreamError: the model is no stack of layers that can be replayed.
            LossError: a segment couples samples.
            CaptureError: a parameter disagrees with plain autograd on every path.
        """
        if self._undo is None:
            raise CaptureError("Use the LayerStream in a with statement, which restores the model at its end.")
        study = Study(self.shell, self.selection, self.loss, self.weights, self._make_engine, self.device, self.memory)
        stack, names, probed = study.run(batch, probe=report is None)
        self._traced_tokens = padded_tokens(few_samples(batch))
        self.shapes = [study.shapes[name] for name in names.names if name in study.shapes]
        self.activations = study.activations
        report = probed or report
        if report is None:
            raise CaptureError("the study found no routing, and none was given.")
        self.report = report
        forward = ForwardStream(
            self.shell, stack, self.loss, self.weights, self.boundaries, self.device, self.keep_every
        )
        self._parts = stack, names, forward
        return report

    def use_boundaries(self, boundaries: Boundaries) -> None:
        """Keep boundaries there from now on."""
        self.boundaries = boundaries
        if self._parts is not None:
            self._parts[2].boundaries = boundaries

    def boundary_bytes(self, n_tokens: int) -> int:
        """Return the bytes of the largest boundary between layers, for so many padded tokens."""
        stack = self._studied[0]
        kept = stack.kept()
        sizes = [
            sum(stack.trace.values[key].nbytes for key in segment.outputs if key in kept) for segment in stack.layers
        ]
        return max(sizes) * n_tokens // self._traced_tokens

    def forward(self, batches: Batches) -> None:
        """Fill the boundaries of all batches, layer by layer; what is there already is not made again."""
        self.forward_stream.run(batches)

    def begin(self, segment: Segment, batches: Batches) -> None:
        """Make what a segment needs on these batches and what a stopped run, or thinning, left missing."""
        position = self.segments.index(segment)
        late = [index for index in batches if not self._is_passed(index, position - 1)]
        if late:
            self._descend({index: batches[index] for index in late}, position)
        self._make_inputs(segment, batches)
        following = self.segments[position + 1 : position + 2]
        self._open_segment(segment)
        if following and following[0].calls:
            self.weights.prefetch(*following[0].modules)

    def gradients(
        self,
        segment: Segment,
        index: BatchRef,
        batches: Batches,
        out: Mapping[str, Tensor],
        factored: Collection[str] = (),
    ) -> BatchGradients:
        """Fill the rows of a segment's parameters on one batch, and hand the gradient on to the segment below.

        Args:
            segment: begun.
            index: of the batch.
            batches: all batches by index.
            out: parameter -> buffer (B, P_k); parameters that are in neither `out` nor `factored` are not formed.
            factored: parameters of which factors are returned instead.

        Returns:
            The run's losses and targets for the first segment, `tail`; of no meaning for the others.
        """
        if self._open is None or self._open.segment != segment:
            raise CaptureError(f"segment {segment.name} was not begun.")
        self._open.prefetch(index)
        following = self._following(index, batches)
        if following is not None:
            self._open.prefetch(following)
        try:
            return self._open.gradients(index, batches, out, factored)
        except DamagedGradient:
            self._renew(index, batches, segment)
            return self._open.gradients(index, batches, out, factored)

    def guard(self, segment: Segment, out: Mapping[str, Tensor], factors: Mapping[str, Any]) -> dict[str, float]:
        """Compare the sum of the rows that `gradients` took last with the segment's ordinary gradient.

        Args:
            segment: the one at work.
            out: rows of its parameters.
            factors: of its parameters.

        Returns:
            Parameter -> relative difference, see `GradientEngine.guard`.
        """
        if self._open is None or self._open.segment != segment:
            raise CaptureError(f"segment {segment.name} was not begun.")
        return self._open.guard(out, factors)

    def finish(self, segment: Segment, batches: Iterable[BatchRef]) -> None:
        """Forget what no segment below needs: all batches are through this one, and their rows are safe."""
        stack = self._studied[0]
        position = self.segments.index(segment)
        below = self.segments[position + 1 :]
        read = set().union(*stack.reads.values())
        values = {key for s in below for key in s.inputs} | read
        fresh = {key for k in stack.trace.glue for key in stack.trace.fresh(k)}
        grads = {key for s in below for key in (*s.inputs, *s.outputs)} | fresh
        if position + 1 == len(self.segments):
            values, grads = set(), set()
        for index in batches:
            latest: dict[str, int] = {}  # name of a gradient -> the last segment that added to it
            for at in range(position, -1, -1):
                recorded = self.boundaries.get(index, passed(at))
                for name in () if recorded is MISSING else recorded.split():
                    latest.setdefault(name, at)
            needed = {LOSSES, TARGETS, *(value_name(key) for key in values), *map(passed, range(position + 1))}
            needed |= {grad_at(key, latest[grad_name(key)]) for key in grads if grad_name(key) in latest}
            self.boundaries.keep_only(index, needed)
        self._close_segment()

    def _descend(self, batches: Batches, position: int) -> None:
        """Pass gradients down to segment `position` without taking rows, from the lowest segment that was passed."""
        start = {index: self._lowest_passed(index, position) + 1 for index in batches}
        for at in range(min(start.values()), position):
            members = {index: batches[index] for index in batches if start[index] <= at}
            segment = self.segments[at]
            self._make_inputs(segment, members)
            self._open_segment(segment)
            for index in members:
                self.gradients(segment, index, members, {})
                self.forward_stream.after_batch()
            self._close_segment()

    def _following(self, index: BatchRef, batches: Batches) -> BatchRef | None:
        if self._order is None or self._order[0] is not batches:
            self._order = batches, dict(itertools.pairwise(batches))
        return self._order[1].get(index)

    def _make_inputs(self, segment: Segment, batches: Batches) -> None:
        stack = self._studied[0]
        if segment.name == "tail":
            self.forward_stream.run(batches)
        elif segment.calls:
            self.forward_stream.run(batches, segment.inputs)
        else:
            calls = [*stack.trace.glue, *([stack.n_calls] if stack.tied else [])]
            self.forward_stream.run(batches, [key for k in calls for key in stack.reads.get(k, ())])

    def _renew(self, index: BatchRef, batches: Batches, segment: Segment) -> None:
        """Make the gradients of one batch again, from the top down to a segment."""
        position = self.segments.index(segment)
        for at in range(position):
            self.boundaries.drop(index, passed(at))
        self._descend({index: batches[index]}, position)
        self._open_segment(segment)

    def _is_passed(self, index: BatchRef, position: int) -> bool:
        return position < 0 or self.boundaries.has(index, passed(position))

    def _lowest_passed(self, index: BatchRef, below: int) -> int:
        return next((at for at in range(below - 1, -1, -1) if self._is_passed(index, at)), -1)

    def _open_segment(self, segment: Segment) -> None:
        self._close_segment()
        _, names, forward = self._studied
        if self.report is None:
            raise CaptureError("Call study before streaming: no layer is replayed untraced.")
        self._open = OpenSegment(forward, segment, names, self.report, self._make_engine)

    def _close_segment(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()

    def _make_engine(self, module: nn.Module, loss: Any, names: Sequence[str]) -> GradientEngine:
        return GradientEngine(
            module,
            segment_loss(loss),
            include=patterns(names),
            dtype_compute=self.dtype_compute,
            deterministic=self.deterministic,
        )

    @property
    def _studied(self) -> tuple[Stack, Names, ForwardStream]:
        if self._parts is None:
            raise CaptureError("Call study before streaming: no layer is replayed untraced.")
        return self._parts
