"""The probe: no rule is believed before its rows agree with plain autograd on each sample alone.

Every place of every parameter has a list of candidates: the closed formula for its module, the same with the time axis
first, the generic rule on its module, on the modules around it, and in the end nothing. All places try their first
candidate in one batched pass; parameters that disagree move on to the next one, until all agree or have none left.
Those take a backward pass per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.config import dtype_name
from streamfisher.errors import CaptureError, LossError, first_line
from streamfisher.gradients.candidates import Candidate, NoiseSearch, groups_of, options_of
from streamfisher.gradients.groups import Group
from streamfisher.gradients.passes import GradientPasses
from streamfisher.gradients.probe_report import ParameterReport, ProbeReport
from streamfisher.gradients.reference import Reference, gradient_error, make_reference
from streamfisher.gradients.uses import nonzero
from streamfisher.models.calling import batch_size, sample_of
from streamfisher.models.kept_tensors import works_on_modes

#: The probe takes this many samples: a third tells a batch axis from an axis that happens to have size 2.
PROBE_SAMPLES = 3


def run_probe(engine: GradientPasses, batch: Mapping[str, Any], memory: int) -> ProbeReport:
    """Find the routing of every captured parameter and verify it.

    Args:
        engine: entered.
        batch: the samples to probe with.
        memory: bytes for gradients; parameters are probed in parts that fit.

    Raises:
        LossError: a sample's loss or gradient depends on the other samples of its batch, or on chance.
        CaptureError: a parameter disagrees on every path, the per-sample one included.
    """
    n_samples = batch_size(batch)
    parts = parts_within(engine, n_samples, memory)
    engine.see_arithmetic(sample_of(batch, 0))
    reference = make_reference(engine, batch, n_samples, parts)
    called = _called_modules(engine, sample_of(batch, 0))
    options = options_of(engine.model, engine.slots, called)
    groups: list[Group] = []
    dropped: dict[str, str] = {}
    for part in parts:
        if len(parts) > 1:
            reference.take(engine, batch, part)
        of_part, dropped_of_part = _route(engine, batch, part, reference, options)
        groups += of_part
        dropped |= dropped_of_part
    engine.use_groups(groups, dropped)

    reports = {}
    for part in parts:
        if len(parts) > 1:
            reference.take(engine, batch, part)
        rows = engine.allocate(n_samples, part)
        engine.rows(batch, rows)
        for name in part:
            agrees, error, noise = _compare(engine, rows, reference, name)
            if not agrees:
                raise CaptureError(
                    f"The per-sample gradients of parameter {name!r} differ from plain autograd by {error:.1e} "
                    "(relative) on every path. Exclude it, or report this model."
                )
            square = reference.squares[name]
            reports[name] = ParameterReport(
                name=name,
                rule=_rule_name(name, groups, dropped),
                numel=engine.parameters[name].numel,
                error=error,
                share=square / reference.total if reference.total else 0.0,
                zero=square == 0.0,
                noise=noise,
                reason=dropped.get(name, ""),
            )
        del rows  # before those of the next part are made
    captured = sum(info.numel for info in engine.parameters.values())
    left_out = sum(parameter.numel() for parameter in engine.left_out.values())
    _refuse_hidden(engine, batch, [name for name, report in reports.items() if report.zero])
    report = ProbeReport(
        n_samples=n_samples,
        tolerance=engine.tolerance,
        parameters=reports,
        excluded=dict(engine.excluded),
        excluded_numel=left_out,
        coverage_parameters=captured / (captured + left_out),
        coverage_norm=sum(reference.squares.values()) / reference.total if reference.total else 1.0,
        groups=tuple(group.to_dict() for group in groups),
        notes=engine.notes,
        alone=engine.plain.alone,
        arithmetic=tuple(sorted(dtype_name(dtype) for dtype in engine.arithmetic)),
    )
    engine.use_groups(groups, dropped, report.unproved)
    return report


def parts_within(engine: GradientPasses, n_samples: int, memory: int) -> list[list[str]]:
    """Return the captured parameters in parts whose rows and references fit the memory, at least one each."""
    each = (2 * n_samples + 2) * torch.finfo(engine.row_dtype).bits // 8
    parts: list[list[str]] = [[]]
    size = 0
    for name, info in engine.parameters.items():
        if parts[-1] and size + each * info.numel > memory:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += each * info.numel
    return parts


def _route(
    engine: GradientPasses,
    batch: Mapping[str, Any],
    part: Sequence[str],
    reference: Reference,
    options: Mapping[str, Sequence[Candidate | None]],
) -> tuple[list[Group], dict[str, str]]:
    """Return the groups that serve the parameters of a part, and the parameters that none serves, with reasons."""
    slots = [slot for slot in engine.slots if slot.parameter in part]
    position = dict.fromkeys((slot.name for slot in slots), 0)
    dropped: dict[str, str] = {}
    search = NoiseSearch()
    rows = engine.allocate(len(reference.losses), part)
    singles = True
    groups: list[Group] = []
    if engine.loss.sequential:
        dropped = dict.fromkeys(part, "the model returns only a scalar loss")

    while True:
        active = [slot for slot in slots if slot.parameter not in dropped]
        chosen = {slot.name: options[slot.name][position[slot.name]] for slot in active}
        groups = groups_of(active, chosen)
        if not singles:
            for group in groups:
                group.layouts = tuple(layout for layout in group.layouts if layout != "single")
                group.expands = False
        engine.capture.install(groups)
        names = [name for name in part if name not in dropped]
        try:
            failed = engine.learning_pass(batch, rows, names)
        except LossError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            # The plain forward ran: expanding a broadcast batch axis, or watching at all, breaks this model's own code.
            reason = f"the forward fails while it is watched: {first_line(error)}"
            if singles:
                singles = False
            else:
                dropped.update(dict.fromkeys(names, reason))
            continue
        moved = False
        for name in names:
            agrees, deviation, noise = (
                (False, 0.0, False) if name in failed else _compare(engine, rows, reference, name)
            )
            if (agrees and not noise) or name in search.settled:
                continue
            moved = True
            places = [slot.name for slot in active if slot.parameter == name]
            if agrees:
                search.note(name, deviation, {place: position[place] for place in places})
            if search.enough(name) or all(position[place] == len(options[place]) - 1 for place in places):
                if search.found(name):
                    position.update(search.settle(name))
                else:
                    dropped[name] = failed.get(name, "every batched rule disagrees with plain autograd")
                continue
            for place in places:
                position[place] = min(position[place] + 1, len(options[place]) - 1)
        if not moved:
            break
    for group in groups:
        group.settle()
    return groups, dropped


def _rule_name(name: str, groups: Iterable[Group], dropped: Mapping[str, str]) -> str:
    if name in dropped:
        return "per_sample"
    rules = [group.rule for group in groups if name in group.names.values() and group.layouts]
    return "+".join(sorted(set(rules))) or "unreached"


def _refuse_hidden(engine: GradientPasses, batch: Mapping[str, Any], zero: Sequence[str]) -> None:
    """Refuse parameters that have a gradient in train mode only, because eval() puts something else in their place.

    Raises:
        CaptureError: the message names one.
    """
    modules = dict(engine.model.named_modules())
    owners = {s.owner: s.parameter for s in engine.slots if s.parameter in zero and works_on_modes(modules[s.owner])}
    try:
        for owner in owners:
            modules[owner].train()
            for module in modules[owner].modules():
                module.training = module is modules[owner]  # what is inside stays in eval mode
        grads = engine.gradients_alone(batch, 0, names=list(owners.values()))[1] if owners else {}
    finally:
        for owner in owners:
            modules[owner].eval()
    hidden = sorted(nonzero({name: grad for name, grad in grads.items() if grad is not None}))
    if hidden:
        raise CaptureError(
            f"{hidden[0]} has a gradient in train mode and none in eval mode, in which gradients are taken: eval() of "
            f"its module keeps a tensor made of it without gradient. {len(hidden)} parameters in all. Let the module "
            "make that tensor in every forward pass, or leave such parameters out with --exclude."
        )


def _called_modules(engine: GradientPasses, sample: Mapping[str, Any]) -> set[str]:
    """Return the names of the modules that the forward calls."""
    called: set[str] = set()
    handles = []
    for name, module in engine.model.named_modules():

        def note(_module: nn.Module, _args: Any, name: str = name) -> None:
            called.add(name)

        handles.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            engine.loss(engine.model, sample)
    finally:
        for handle in handles:
            handle.remove()
    return called


def _compare(
    engine: GradientPasses, rows: Mapping[str, Tensor], reference: Reference, name: str
) -> tuple[bool, float, bool]:
    """Return whether a parameter's rows agree, the worst error, and whether agreement is only up to noise."""
    agrees, worst, noise = True, 0.0, False
    for i, truth in enumerate(reference.rows):
        error, significant = gradient_error(rows[name][i], truth[name], reference.norms[i], engine.floor)
        if not error <= engine.tolerance:
            agrees = agrees and not significant
            noise = True
        worst = max(worst, error)
    return agrees, worst, noise
