"""From a trace to segments: which calls are replayed together, and which parameters each segment serves.

From the top down: `tail` (what only the code after the last layer uses: final norm, untied head), one segment for each
layer, or for all calls between the first and the last use of a shared one, and `head` (embeddings, and whatever else
the code around the layers uses, tied head included: its code is replayed as a whole, so that contributions of a tied
parameter meet in one pass).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from streamfisher.errors import StreamError
from streamfisher.stream.trace import Key, Trace


@dataclass(frozen=True)
class Segment:
    """Calls that are replayed together, and the captured parameters whose rows that gives."""

    name: str  # 'tail', 'head', or the names of the layers
    calls: range  # empty for 'tail' and 'head'
    modules: tuple[str, ...]  # layers called, each once
    parameters: tuple[str, ...]  # in the model's order
    inputs: tuple[Key, ...] = ()  # what the calls get from outside
    outputs: tuple[Key, ...] = ()  # what they return and others use, and that carries gradient


@dataclass(frozen=True)
class Stack:
    """A model as a stack of segments."""

    trace: Trace
    segments: tuple[Segment, ...]  # in the order of the backward stream: tail, layers from the top, head
    middle: tuple[int, ...]  # calls before which the model's code hands gradient from layer to layer
    reads: Mapping[int, tuple[Key, ...]]  # glue before call k -> layers' outputs whose values it needs

    @property
    def n_calls(self) -> int:
        """Return the number of calls of layers in one forward."""
        return len(self.trace.calls)

    @property
    def tied(self) -> bool:
        """Return whether `head` serves parameters that the code after the last layer uses as well."""
        return bool(self.trace.parameters[self.n_calls].intersection(self.segments[-1].parameters))

    @property
    def layers(self) -> tuple[Segment, ...]:
        """Return the segments of layers, from the bottom up."""
        return tuple(reversed(self.segments[1:-1]))

    def kept(self) -> set[Key]:
        """Return the keys of tensors that are boundaries: used by another segment than the one that makes them."""
        keys = {key for segment in self.layers for key in segment.inputs}
        return keys.union(*self.reads.values())


def cut_segments(
    trace: Trace, model: nn.Module, names: Sequence[str], owners: Mapping[str, Sequence[str]]
) -> tuple[tuple[Segment, ...], tuple[int, ...]]:
    """Return the segments in the order of the backward stream, and the calls with glue that hands gradient on.

    Args:
        trace: of one batch.
        model: for messages.
        names: captured parameters, in the model's order.
        owners: captured parameter -> the layers that hold it; empty for what the code around the layers holds.

    Raises:
        StreamError: a parameter is shared in a way that cannot be streamed.
    """
    calls_of: dict[str, list[int]] = {}
    for k, call in enumerate(trace.calls):
        calls_of.setdefault(call.module, []).append(k)
    used = trace.parameters
    around = set().union(*used.values())
    spans: list[range] = [range(k, k + 1) for k in range(len(trace.calls))]
    for name in names:
        layers = [layer for layer in owners[name] if layer in calls_of]
        if layers and name in around:
            raise StreamError(
                f"{name} is used within layer {layers[0]} and by the code around the layers, so that layer cannot be "
                f"streamed by itself in {type(model).__name__}."
            )
        uses = sorted(k for layer in layers for k in calls_of[layer])
        if len(uses) > 1:
            spans = _merged(spans, uses[0], uses[-1])
    glue = {k for k in trace.glue if any(key in trace.carrying for key in trace.fresh(k))}
    for span in spans:
        inner = [k for k in span[1:] if k in glue]
        if inner:
            layers = sorted({trace.calls[k].module for k in span})
            raise StreamError(
                f"layers {layers[0]} to {layers[-1]} share weights, and between them the model's own code changes what "
                f"they hand on (before call {inner[0]}), so they cannot be replayed together."
            )
    consumed = {key: k for k, call in enumerate(trace.calls) for key in call.sources}  # last use by a layer
    read = set().union(*trace.reads.values())
    segments = []
    for span in spans:
        made = {key for k in span for key in trace.calls[k].outputs if key[0] == "out" and key[1] in span}
        inputs = dict.fromkeys(key for k in span for key in trace.calls[k].sources if key not in made)
        outputs = sorted(
            key for key in made if key in trace.carrying and (consumed.get(key, -1) > span[-1] or key in read)
        )
        modules = tuple(dict.fromkeys(trace.calls[k].module for k in span))
        served = tuple(name for name in names if set(owners[name]).intersection(modules))
        segments.append(Segment(_name(modules), span, modules, served, tuple(inputs), tuple(outputs)))
    below = set().union(*(found for k, found in used.items() if k < len(trace.calls)))
    free = [name for name in names if not set(owners[name]).intersection(calls_of)]
    tail = tuple(name for name in free if name in around and name not in below)
    head = tuple(name for name in free if name not in tail)
    ends = Segment("tail", range(0), (), tail), Segment("head", range(0), (), head)
    return (ends[0], *reversed(segments), ends[1]), tuple(sorted(k for k in glue if k and trace.reads.get(k)))


def _merged(spans: list[range], first: int, last: int) -> list[range]:
    touched = [span for span in spans if span[-1] >= first and span[0] <= last]
    whole = range(touched[0][0], touched[-1][-1] + 1)
    before = [span for span in spans if span[-1] < whole[0]]
    return [*before, whole, *(span for span in spans if span[0] > whole[-1])]


def _name(modules: Sequence[str]) -> str:
    return modules[0] if len(modules) == 1 else f"{modules[0]}..{modules[-1]}"
