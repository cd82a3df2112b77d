"""Finding a model's segments and the rule of each parameter, with the weights of one layer in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.data.batches import padded_tokens
from streamfisher.errors import NonFiniteError, StreamError, StreamfisherError, first_line
from streamfisher.gradients.engine import GradientEngine
from streamfisher.gradients.parameters import Selection
from streamfisher.gradients.probe_report import ProbeReport
from streamfisher.gradients.shapes import GradientShape
from streamfisher.models.calling import batch_size
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.weights import AROUND, Resident
from streamfisher.stream.replay import Boundary, replay_batch, shell_loss, span_loss
from streamfisher.stream.routing import (
    Names,
    Span,
    joined,
    kind_of,
    probe_boundary,
    probe_segment,
    random_gradients,
    renamed,
)
from streamfisher.stream.segments import Stack, cut_segments
from streamfisher.stream.shell import Shell
from streamfisher.stream.trace import Key, Trace, agree, trace_stack

_SEED = 11  # of the random output gradients with which layers are probed

#: `(module, loss, parameter names) -> engine`
EngineMaker = Callable[[nn.Module, Any, Sequence[str]], GradientEngine]


class Study:
    """One look at a model on a few samples: a trace, a routing for each parameter, and a check that nothing is random.

    Args:
        shell: of the model.
        selection: the captured parameters.
        loss: the run's.
        weights: of the model.
        make_engine: makes the engine that probes a segment.
        device: where the model runs.
        memory: bytes for the gradients that a probe compares; `None`: a quarter of what is free.
    """

    def __init__(
        self,
        shell: Shell,
        selection: Selection,
        loss: PerSampleLoss,
        weights: Resident,
        make_engine: EngineMaker,
        device: torch.device,
        memory: int | None = None,
    ) -> None:
        self.shell, self.selection, self.loss, self.weights = shell, selection, loss, weights
        self.make_engine, self.device, self.memory = make_engine, device, memory
        self.shapes: dict[str, GradientShape] = {}  # what each parameter's gradient is made of, once it was probed
        self.activations = 0.0  # the most bytes that a segment's backward pass takes for each padded token
        self._tokens = 1

    def run(self, batch: Mapping[str, Any], *, probe: bool = True) -> tuple[Stack, Names, ProbeReport | None]:
        """Return the model's segments, its parameters' names, and the routing.

        Args:
            batch: a dict of batched tensors with at least 2 samples.
            probe: look for a routing; otherwise there is one already.

        Raises:
            StreamError: the model is no stack of layers that can be replayed.
            LossError: a segment couples samples.
            CaptureError: a parameter disagrees with plain autograd on every path.
        """
        batch = few_samples({k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        self._tokens = padded_tokens(batch)
        reports: list[ProbeReport] = []
        trace, names = self._trace(batch, reports if probe else None)
        if not bool(torch.isfinite(trace.losses).all()):
            raise NonFiniteError(
                "the loss of one of the first samples is not finite. Look for NaN in the data and in the model's "
                "parameters, or use a wider --dtype."
            )
        with self.shell, self.weights.held(AROUND):
            free = {id(p): name for name, p in self.shell.model.named_parameters() if name in names.owners}
            segments, middle = cut_segments(trace, self.shell.model, names.names, names.owners)
            stack = self._checked(Stack(trace, segments, middle, _sorted_reads(trace)), batch)
            if probe and free:
                reports.append(self._probe_around(stack, batch, list(free.values())))
        return stack, names, joined(reports, self.selection, names.names) if probe else None

    def _trace(self, batch: Mapping[str, Any], reports: list[ProbeReport] | None) -> tuple[Trace, Names]:
        """Trace the model; layers whose forward nobody calls count among the code around the layers."""
        while True:
            names = Names.of(self.selection, list(self.shell.layers))
            holders = {layer for owners in names.owners.values() for layer in owners}
            self.weights.bind(list(self.shell.layers))
            if reports is not None:
                reports.clear()
            probes = _LayerProbes(self, names, batch_size(batch), reports)
            with self.shell, self.weights.held(AROUND):
                trace = trace_stack(
                    self.shell,
                    self.loss,
                    batch,
                    ids={id(p): name for name, p in self.shell.model.named_parameters() if name in names.owners},
                    trainable=holders.__contains__,
                    held=self.weights.held,
                    upcoming=self.weights.prefetch,
                    visit=probes.visit,
                )
            uncalled = set(self.shell.layers).difference(call.module for call in trace.calls)
            if not uncalled:
                return trace, names
            self.shell.leave_in_place(uncalled)

    def _checked(self, stack: Stack, batch: Mapping[str, Any]) -> Stack:
        """Run the shell again with what the layers returned: it must give what the trace saw, from what it reads.

        Raises:
            StreamError: it does not.
        """
        trace = stack.trace
        outs = sorted(key for key in trace.values if key[0] == "out")
        tensors = {key: trace.values[key] for key in outs if isinstance(trace.values[key], Tensor)}
        shapes = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
        after = (*trace.glue, len(trace.calls))
        everything = {k: tuple(key for key in tensors if key[1] < k) for k in after}
        for reads in (stack.reads, everything):  # it may read more than gradients tell
            stack = Stack(trace, stack.segments, stack.middle, reads)
            needed = set().union(*reads.values())
            values = {k: v for k, v in trace.values.items() if k[0] == "out" and (k in needed or k not in tensors)}
            replayed = replay_batch(stack, outs, Boundary(values, {}, shapes), batch_size(batch), self.device, batch)
            loss, notes = shell_loss(self.shell, stack, self.loss, through=True)
            loss(self.shell.model, replayed)
            fresh = [key for k in trace.glue for key in trace.fresh(k) if isinstance(trace.values[key], Tensor)]
            same = all(agree(trace.values[key], notes[0].fresh[key]) for key in fresh)
            losses = notes[0].losses
            if same and losses is not None and agree(trace.losses, losses):
                return stack
        raise StreamError(
            "the code around the layers gives another result when it is repeated on the same samples: dropout is on, "
            "or the loss is random. Make it deterministic in eval mode."
        )

    def _probe_around(self, stack: Stack, batch: Mapping[str, Any], free: Sequence[str]) -> ProbeReport:
        trace, n_samples = stack.trace, batch_size(batch)
        keys = [key for k in trace.glue for key in trace.fresh(k) if key in trace.carrying]
        boundary = Boundary(trace.values, random_gradients(trace, keys, n_samples, _SEED, self.device))
        outs = sorted(key for key in trace.values if key[0] == "out")
        replayed = replay_batch(stack, outs, boundary, n_samples, self.device, batch)
        loss, _ = shell_loss(self.shell, stack, self.loss, through=True, terms=trace.glue, offset=True)
        report, shapes = self.probed(self.shell.model, loss, free, replayed)
        self.shapes |= {shape.name: shape for shape in shapes}
        return report

    def probed(
        self, module: nn.Module, loss: Any, names: Sequence[str], batch: Mapping[str, Any]
    ) -> tuple[ProbeReport, list[GradientShape]]:
        """Probe a segment, and look at what its gradients are made of."""
        with self.make_engine(module, loss, names) as engine:
            try:
                report = engine.probe(batch, self.memory)
            except StreamfisherError:
                raise
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise _cannot_replay(names, error) from error
            shapes, activations = engine.shapes(batch)
        self.activations = max(self.activations, activations * padded_tokens(batch) / self._tokens)
        return report, shapes


class _LayerProbes:
    """Probes the first layer of each kind while the trace has its weights in memory."""

    def __init__(self, study: Study, names: Names, n_samples: int, reports: list[ProbeReport] | None) -> None:
        self.study, self.names, self.n_samples, self.reports = study, names, n_samples, reports
        self.known: dict[tuple, tuple[ProbeReport, list[GradientShape]]] = {}
        self.done: set[str] = set()

    def visit(self, trace: Trace, k: int) -> None:
        """Find the routing of the layer of call k."""
        study, name = self.study, trace.calls[k].module
        if self.reports is None or name in self.done:
            return
        self.done.add(name)
        layers = {name: study.shell.layers[name]}
        span = Span(layers)
        inside = self.names.inside(span)
        if not inside:
            return
        kind = kind_of(layers[name], trace, k, list(inside))
        if kind not in self.known:
            segment = probe_segment(trace, k)
            stack = Stack(trace, (), (), {})
            boundary = probe_boundary(trace, segment, self.n_samples, _SEED, study.device)
            loss, _ = span_loss(layers, stack, segment, armed=False, offset=True)
            batch = replay_batch(stack, segment.inputs, boundary, self.n_samples, study.device)
            self.known[kind] = study.probed(span, loss, list(inside), batch)
        report, shapes = self.known[kind]
        self.reports.append(renamed(report, span, inside))
        study.shapes |= {inside[s.name]: dataclasses.replace(s, name=inside[s.name]) for s in shapes}


def few_samples(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return two samples of a batch, or three where an axis of length two could be taken for the batch."""
    n_samples = batch_size(batch)
    ambiguous = any(2 in value.shape[1:] for value in batch.values() if isinstance(value, Tensor))
    few = 3 if ambiguous and n_samples >= 3 else 2
    return {
        key: value[:few] if isinstance(value, Tensor) and value.dim() and value.shape[0] == n_samples else value
        for key, value in batch.items()
    }


def _sorted_reads(trace: Trace) -> dict[int, tuple[Key, ...]]:
    return {k: tuple(sorted(found)) for k, found in trace.reads.items()}


def _cannot_replay(names: Sequence[str], error: Exception) -> StreamError:
    reason = first_line(error)
    return StreamError(
        f"the segment of {names[0]} cannot be replayed for one sample alone, from what it was given for several "
        f"({reason}): one of its arguments mixes the samples in an axis. Use --stream none."
    )
