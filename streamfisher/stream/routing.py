"""Which rule serves which parameter, found layer by layer: a layer is probed once for all layers of its kind.

A layer is probed against plain autograd of itself, each sample alone, with the same inputs and the same (random) output
gradients. The formulas are linear in the output gradient, so one that is right for a random gradient is right for the
true one; the guard compares every segment with its ordinary gradient while a run goes on.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from streamfisher.gradients.groups import Group
from streamfisher.gradients.parameters import Selection
from streamfisher.gradients.probe_report import ParameterReport, ProbeReport
from streamfisher.stream.replay import Boundary
from streamfisher.stream.segments import Segment
from streamfisher.stream.trace import Key, Trace


class Span(nn.Module):
    """Layers side by side, under names of their own: `layers.0.` is what the model calls `transformer.h.7.`."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers.values())
        self.prefixes = {f"layers.{j}": name for j, name in enumerate(layers)}

    def full_name(self, name: str) -> str:
        """Return the model's name of a parameter or module."""
        head, digits, rest = (*name.split(".", 2), "")[:3]
        prefix = self.prefixes[f"{head}.{digits}"]
        return f"{prefix}.{rest}" if rest else prefix

    def holds(self, name: str) -> bool:
        """Return whether a module or parameter of the model lies in one of the layers."""
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in self.prefixes.values())

    def own_name(self, name: str) -> str:
        """Return the name here of a module of the model."""
        for own, prefix in self.prefixes.items():
            if name == prefix or name.startswith(f"{prefix}."):
                return own + name[len(prefix) :]
        raise KeyError(name)


@dataclasses.dataclass(frozen=True)
class Names:
    """Captured parameters by name, and the layers that hold them."""

    names: tuple[str, ...]  # in the model's order
    public: Mapping[str, str]  # every name of a captured parameter -> its public one
    owners: Mapping[str, tuple[str, ...]]  # public name -> layers; empty for the code around the layers

    @classmethod
    def of(cls, selection: Selection, layers: Sequence[str]) -> Names:
        """Return the names of a selection of a model with these layers."""
        public = {slot.name: slot.parameter for slot in selection.slots}
        owners: dict[str, dict[str, None]] = {name: {} for name in selection.infos}
        prefixes = {f"{layer}.": layer for layer in layers}
        for alias, name in public.items():
            for prefix, layer in prefixes.items():
                if alias.startswith(prefix):
                    owners[name][layer] = None
        return cls(tuple(selection.infos), public, {name: tuple(found) for name, found in owners.items()})

    def inside(self, span: Span) -> dict[str, str]:
        """Return own name -> public name of the captured parameters in a span."""
        found = {}
        for own, _ in span.named_parameters():
            public = self.public.get(span.full_name(own))
            if public is not None:
                found[own] = public
        return found


def patterns(names: Sequence[str]) -> tuple[str, ...]:
    """Return glob patterns that match exactly these names."""
    return tuple(glob.escape(name) for name in names)


def kind_of(layer: nn.Module, trace: Trace, k: int, captured: Sequence[str]) -> tuple:
    """Return what two layers must have in common for one probe to speak for both."""
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in layer.named_parameters())
    call = trace.calls[k]
    held = tuple((key in trace.carrying, key in trace.batched) for key in (*call.sources, *call.outputs))
    return type(layer), shapes, tuple(captured), repr(call.spec), held


def random_gradients(
    trace: Trace, keys: Sequence[Key], n_samples: int, seed: int, device: torch.device
) -> dict[Key, Tensor]:
    """Return standard normal gradients for tensors of a trace, (B, ...) each."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key in keys:
        value = trace.values[key]
        grad = torch.randn(n_samples, *value.shape[1:], generator=generator, dtype=torch.float32)
        found[key] = grad.to(device, value.dtype)
    return found


def probe_segment(trace: Trace, k: int) -> Segment:
    """Return one call as a segment of its own."""
    call = trace.calls[k]
    outputs = [key for key in call.outputs if key[:2] == ("out", k) and key in trace.carrying]
    return Segment(call.module, range(k, k + 1), (call.module,), (), tuple(dict.fromkeys(call.sources)), tuple(outputs))


def probe_boundary(trace: Trace, segment: Segment, n_samples: int, seed: int, device: torch.device) -> Boundary:
    """Return the traced inputs of a segment with random gradients of its outputs."""
    return Boundary(trace.values, random_gradients(trace, segment.outputs, n_samples, seed, device))


def renamed(report: ProbeReport, span: Span, inside: Mapping[str, str]) -> ProbeReport:
    """Return a report about a span's own names as one about the model's."""
    groups = []
    for values in report.groups:
        group = Group.from_dict(values)
        group.site = span.full_name(group.site)
        group.names = {attribute: inside[name] for attribute, name in group.names.items()}
        groups.append(group.to_dict())
    parameters = {inside[n]: dataclasses.replace(p, name=inside[n]) for n, p in report.parameters.items()}
    return dataclasses.replace(report, groups=tuple(groups), parameters=parameters)


def joined(reports: Sequence[ProbeReport], selection: Selection, names: Sequence[str]) -> ProbeReport:
    """Return one report about the whole model, its parameters in the model's order.

    The shares of the squared gradient norm are of a parameter within its segment: no gradient of the whole model exists
    while a model is probed layer by layer.
    """
    found: dict[str, ParameterReport] = {}
    for report in reports:
        found |= report.parameters
    numel = sum(selection.infos[name].numel for name in names)
    left_out = sum(report.excluded_numel for report in reports)
    return ProbeReport(
        n_samples=max(report.n_samples for report in reports),
        tolerance=max(report.tolerance for report in reports),
        parameters={name: found[name] for name in names},
        excluded=dict(selection.excluded),
        excluded_numel=left_out,
        coverage_parameters=numel / (numel + left_out),
        coverage_norm=min(report.coverage_norm for report in reports),
        groups=tuple(group for report in reports for group in report.groups),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
        alone=next((report.alone for report in reports if report.alone != "as given"), "as given"),
        arithmetic=tuple(dict.fromkeys(name for report in reports for name in report.arithmetic)),
    )
