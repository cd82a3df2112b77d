"""The backward stream: one segment after the other from the top, on each batch rows and the gradient for below."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.data.batches import BatchRef
from streamfisher.gradients.engine import GradientEngine
from streamfisher.gradients.groups import Group
from streamfisher.gradients.probe_report import ProbeReport
from streamfisher.gradients.producer import BatchGradients
from streamfisher.models.calling import batch_size
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.weights import AROUND
from streamfisher.stream.boundaries import MISSING
from streamfisher.stream.forward import Batches, ForwardStream
from streamfisher.stream.replay import Boundary, Replay, grad_name, replay_batch, shell_loss, span_loss, value_name
from streamfisher.stream.routing import Names, Span
from streamfisher.stream.segments import Segment
from streamfisher.stream.study import EngineMaker
from streamfisher.stream.trace import Key

ReplayLoss = Any  # `(module, batch) -> (B,)`

LOSSES, TARGETS = "losses", "targets"  # names among the boundaries: of the run's own, which `tail` finds


class CurrentLoss:
    """A loss that is another one for each batch: what a segment's engine differentiates."""

    def __init__(self) -> None:
        self.loss: ReplayLoss = None

    def __call__(self, module: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Evaluate the loss of the batch at hand."""
        return self.loss(module, batch)


class OpenSegment:
    """A segment at work: its weights are in memory and its engine is entered. Closed by its exit stack.

    Args:
        forward: with the model's shell, segments, weights and boundaries.
        segment: to work on.
        names: captured parameters.
        report: the routing.
        make_engine: makes the segment's engine.
    """

    def __init__(
        self, forward: ForwardStream, segment: Segment, names: Names, report: ProbeReport, make_engine: EngineMaker
    ) -> None:
        self.forward, self.segment = forward, segment
        self.stack, self.shell, self.boundaries = forward.stack, forward.shell, forward.boundaries
        self.position = self.stack.segments.index(segment)
        self.current = CurrentLoss()
        self._last: Mapping[str, Any] = {}  # the batch of the last replay
        with contextlib.ExitStack() as stack:
            if segment.calls:
                stack.enter_context(forward.weights.held(*segment.modules))
                span = Span({name: self.shell.layers[name] for name in segment.modules})
                module: nn.Module = span
                inside = names.inside(span)
                groups = [_own_group(span, values, inside) for values in report.groups if span.holds(values["site"])]
            else:
                stack.enter_context(self.shell)
                stack.enter_context(forward.weights.held(AROUND))
                module = self.shell.model
                inside = {name: name for name, _ in module.named_parameters() if name in names.owners}
                sites = {name for name, _ in module.named_modules()}
                groups = [Group.from_dict(values) for values in report.groups if values["site"] in sites]
            self.module = module
            self.slow = [own for own, name in inside.items() if name in report.per_sample]
            self.engine: GradientEngine | None = None
            if inside:
                self.engine = stack.enter_context(make_engine(module, self.current, list(inside)))
                self.engine.use_precision(report)
                unproved = [own for own, name in inside.items() if name in report.unproved]
                self.engine.use_groups(groups, self.slow, unproved)
            else:
                stack.enter_context(frozen(module))
            self.inside = {own: name for own, name in inside.items() if name in segment.parameters}
            self.close = stack.pop_all().close

    def gradients(
        self, index: BatchRef, batches: Batches, out: Mapping[str, Tensor], factored: Collection[str]
    ) -> BatchGradients:
        """Take the rows of one batch, and record the gradients of what the segment got."""
        own = {public: name for name, public in self.inside.items()}
        rows = {own[name]: buffer for name, buffer in out.items() if name in own}
        wanted = [own[name] for name in factored if name in own]
        if self.segment.name == "tail":
            result, replay = self._tail(index, batches[index], rows, wanted)
        elif self.segment.name == "head":
            result, replay = self._head(index, batches[index], rows, wanted)
        else:
            result, replay = self._layers(index, batches, rows, wanted)
        arrived = replay.leaves.gradients()
        for key, grad in arrived.items():
            self.boundaries.put(index, grad_at(key, self.position), grad)
        # Last of all, so that what it names is there.
        self.boundaries.put(index, passed(self.position), " ".join(map(grad_name, arrived)))
        factors = {self.inside[name]: pairs for name, pairs in result.factors.items()}
        return BatchGradients(result.losses, result.n_targets, factors)

    def guard(self, out: Mapping[str, Tensor], factors: Mapping[str, Any]) -> dict[str, float]:
        """Compare the sums of the rows of the last replay with the segment's ordinary gradient."""
        own = {public: name for name, public in self.inside.items()}
        rows = {own[name]: values for name, values in out.items() if name in own}
        pairs = {own[name]: values for name, values in factors.items() if name in own}
        if self.engine is None or not (rows or pairs):
            return {}
        differences = self.engine.guard(self._last, rows, pairs)
        return {self.inside[name]: value for name, value in differences.items() if name in self.inside}

    def _tail(self, index: BatchRef, batch: Mapping[str, Any], rows: Any, wanted: Any) -> tuple[BatchGradients, Replay]:
        loss, notes = shell_loss(self.shell, self.stack, self.forward.loss, through=True, armed=True)
        result = self._run(loss, self.forward.shell_batch(index, batch, [self.stack.n_calls]), rows, wanted)
        seen = notes[0].losses
        assert seen is not None  # the replay goes through the head
        losses, targets = seen.double().cpu(), self.forward.loss.n_targets(batch).cpu()
        self.boundaries.put(index, LOSSES, losses)
        self.boundaries.put(index, TARGETS, targets)
        return BatchGradients(losses, targets, result.factors), notes[0]

    def _head(self, index: BatchRef, batch: Mapping[str, Any], rows: Any, wanted: Any) -> tuple[BatchGradients, Replay]:
        stack = self.stack
        calls = [*stack.trace.glue, *([stack.n_calls] if stack.tied else [])]
        replayed = self.forward.shell_batch(index, batch, calls)
        for k in stack.trace.glue:
            replayed |= {grad_name(key): grad for key, grad in self._arrived(index, stack.trace.fresh(k)).items()}
        loss, notes = shell_loss(self.shell, stack, self.forward.loss, through=stack.tied, terms=stack.trace.glue)
        return self._run(loss, replayed, rows, wanted), notes[0]

    def _layers(self, index: BatchRef, batches: Batches, rows: Any, wanted: Any) -> tuple[BatchGradients, Replay]:
        stack, segment = self.stack, self.segment
        values = {key: self.forward.value(index, key, batches[index]) for key in segment.inputs}
        grads = self._arrived(index, (*segment.inputs, *segment.outputs))
        if segment.calls[-1] + 1 in stack.middle:
            for key, grad in self._through_middle(index, batches[index], segment.calls[-1] + 1).items():
                grads[key] = grads[key] + grad if key in grads else grad
        used = dataclasses.replace(segment, outputs=tuple(key for key in segment.outputs if key in grads))
        loss, notes = span_loss(self.shell.layers, stack, used, armed=True)
        n_samples = batch_size(batches[index])
        replayed = replay_batch(stack, segment.inputs, Boundary(values, grads), n_samples, self.forward.device)
        return self._run(loss, replayed, rows, wanted), notes[0]

    def _through_middle(self, index: BatchRef, batch: Mapping[str, Any], k: int) -> dict[Key, Tensor]:
        """Return what the model's own code before call k makes of the gradients of that call's arguments."""
        replayed = self.forward.shell_batch(index, batch, [k])
        fresh = self._arrived(index, self.stack.trace.fresh(k))
        replayed |= {grad_name(key): grad for key, grad in fresh.items()}
        loss, notes = shell_loss(self.shell, self.stack, self.forward.loss, through=False, terms=(k,), armed=True)
        with self.shell, self.forward.weights.held(AROUND), frozen(self.shell.model):
            _pass_on(self.shell.model, loss, replayed)
        return notes[0].leaves.gradients()

    def _arrived(self, index: BatchRef, keys: Collection[Key]) -> dict[Key, Tensor]:
        """Return the gradients of these values that the segments above have recorded, the latest sum of each.

        Raises:
            DamagedGradient: a recorded one is missing or damaged.
        """
        grads: dict[Key, Tensor] = {}
        for key, name in self._recorded(index, keys).items():
            grads[key] = self.boundaries.get(index, name, self.forward.device)
            if grads[key] is MISSING:
                raise DamagedGradient(index)
        return grads

    def _recorded(self, index: BatchRef, keys: Collection[Key]) -> dict[Key, str]:
        """Return the names of the gradients of these values, of the latest sum of each.

        Raises:
            DamagedGradient: it is not known what was recorded.
        """
        names: dict[Key, str] = {}
        for position in range(self.position - 1, -1, -1):
            recorded = self.boundaries.get(index, passed(position))
            if recorded is MISSING:
                raise DamagedGradient(index)
            recorded = recorded.split()
            for key in keys:
                if key not in names and grad_name(key) in recorded:
                    names[key] = grad_at(key, position)
        return names

    def prefetch(self, index: BatchRef) -> None:
        """Begin to take to the device what a batch needs that comes next; where something is missing, it waits."""
        if not self.segment.calls:
            return
        with contextlib.suppress(DamagedGradient):
            names = self._recorded(index, (*self.segment.inputs, *self.segment.outputs)).values()
            self.boundaries.prefetch(index, [*map(value_name, self.segment.inputs), *names])

    def _run(self, loss: ReplayLoss, batch: Mapping[str, Any], rows: Any, wanted: Any) -> BatchGradients:
        """Take rows and factors; the first evaluation of `loss` collects the gradients for below."""
        names = [*rows, *wanted]
        if self.engine is None:
            return _pass_on(self.module, loss, batch)
        if all(name in self.slow for name in names):
            with self.engine.capture.suspended():
                result = _pass_on(self.module, loss, batch)
            if not names:
                return result
        self.current.loss, self._last = loss, batch
        return self.engine.rows(batch, rows, wanted)


class DamagedGradient(Exception):  # noqa: N818 - caught within this room: the gradient is made again
    """The gradient of a boundary is not what was recorded."""


def grad_at(key: Key, position: int) -> str:
    """Return the name of what segment `position` (from the top) left of the gradient of a value."""
    return f"{grad_name(key)}@{position}"


def passed(position: int) -> str:
    """Return the name under which it is noted that segment `position` (from the top) is through with a batch."""
    return f"passed.{position}"


def _own_group(span: Span, values: Mapping[str, Any], inside: Mapping[str, str]) -> Group:
    own = {public: name for name, public in inside.items()}
    group = Group.from_dict(values)
    group.site = span.own_name(group.site)
    group.names = {attribute: own[name] for attribute, name in group.names.items()}
    return group


def _pass_on(module: nn.Module, loss: ReplayLoss, batch: Mapping[str, Any]) -> BatchGradients:
    """Pass the gradient on without taking any rows; the parameters are frozen."""
    with torch.enable_grad():
        losses = loss(module, batch)
        if losses.requires_grad:
            losses.sum().backward()
    return BatchGradients(losses.detach().double().cpu(), torch.ones(len(losses), dtype=torch.int64), {})


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no parameter require grad inside."""
    flags = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def segment_loss(loss: ReplayLoss) -> PerSampleLoss:
    """Return a segment's loss in the form that an engine takes."""
    return PerSampleLoss("user:segment", "user", "", loss, leaves_batch=True)
