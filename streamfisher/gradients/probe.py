"""The probe: no rule is believed before its rows agree with plain autograd on each sample alone.

Every place of every parameter has a list of candidates: the closed formula for its module, the same with the time axis
first, the generic rule on its module, on the modules around it, and in the end nothing. All places try their first
candidate in one batched pass; parameters that disagree move on to the next one, until all agree or have none left.
Those take a backward pass per sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.errors import CaptureError, LossError, first_line
from streamfisher.gradients.candidates import Candidate, NoiseSearch, groups_of, options_of
from streamfisher.gradients.groups import Group
from streamfisher.gradients.modes import of_batch_norms
from streamfisher.gradients.norms import distance, norm
from streamfisher.gradients.passes import GradientPasses
from streamfisher.gradients.probe_report import ParameterReport, ProbeReport
from streamfisher.gradients.tolerance import COUPLING
from streamfisher.models.calling import batch_size, sample_of

#: The probe takes this many samples: a third tells a batch axis from an axis that happens to have size 2.
PROBE_SAMPLES = 3


@dataclass
class Reference:
    """Plain autograd on each sample alone."""

    rows: list[dict[str, Tensor | None]]  # per sample: parameter -> flat gradient, None where it has none; of one part
    norms: list[float]  # per sample: norm of the gradient over all trainable parameters
    losses: list[float]
    squares: dict[str, float]  # captured parameter -> squared norm over the samples
    total: float  # squared norm over the samples and all trainable parameters

    def take(self, engine: GradientPasses, samples: Sequence[Mapping[str, Any]], part: Sequence[str]) -> None:
        """Hold the rows of one part instead of those of another, which are freed first."""
        self.rows = []
        self.rows = [engine.plain_gradients(sample, names=part)[1] for sample in samples]


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
    samples = [sample_of(batch, i) for i in range(batch_size(batch))]
    parts = _parts(engine, len(samples), memory)
    reference = _reference(engine, samples, parts)
    # A float64 model may compute its norms in float32: what plain autograd itself cannot repeat is no disagreement.
    engine.noise = _check_independence(engine, batch, samples, reference, parts)
    called = _called_modules(engine, samples[0])
    options = options_of(engine.model, engine.slots, called)
    groups: list[Group] = []
    dropped: dict[str, str] = {}
    for part in parts:
        if len(parts) > 1:
            reference.take(engine, samples, part)
        of_part, dropped_of_part = _route(engine, batch, part, reference, options)
        groups += of_part
        dropped |= dropped_of_part
    engine.use_groups(groups, dropped)

    reports = {}
    for part in parts:
        if len(parts) > 1:
            reference.take(engine, samples, part)
        rows = engine.allocate(len(samples), part)
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
    return ProbeReport(
        n_samples=len(samples),
        tolerance=engine.tolerance,
        parameters=reports,
        excluded=dict(engine.excluded),
        excluded_numel=left_out,
        coverage_parameters=captured / (captured + left_out),
        coverage_norm=sum(reference.squares.values()) / reference.total if reference.total else 1.0,
        groups=tuple(group.to_dict() for group in groups),
        notes=engine.notes,
    )


def _parts(engine: GradientPasses, n_samples: int, memory: int) -> list[list[str]]:
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


def _reference(engine: GradientPasses, samples: list[dict[str, Any]], parts: Sequence[Sequence[str]]) -> Reference:
    """Return losses and norms of plain autograd on each sample alone; its gradients too where there is one part."""
    squares = dict.fromkeys(engine.parameters, 0.0)
    rows, norms, losses = [], [], []
    for sample in samples:
        whole = 0.0
        for index, part in enumerate(parts):
            loss, grads = engine.plain_gradients(sample, names=part, left_out=index == 0)
            for name, grad in grads.items():
                square = 0.0 if grad is None else norm(grad) ** 2
                whole += square
                if name in squares:
                    squares[name] += square
            if len(parts) == 1:
                rows.append({name: grads[name] for name in part})
            del grads
        norms.append(whole**0.5)
        losses.append(float(loss))
    return Reference(rows, norms, losses, squares, sum(norm**2 for norm in norms))


def _check_independence(
    engine: GradientPasses,
    batch: Mapping[str, Any],
    samples: list[dict[str, Any]],
    reference: Reference,
    parts: Sequence[Sequence[str]],
) -> float:
    """Raise `LossError` if sample i's gradient in the batch is not its gradient alone; return the rounding between."""
    noise = 0.0
    if len(samples) < 2 or engine.loss.sequential:
        return noise
    engine.noise = 0.0
    limit = max(engine.tolerance, COUPLING)
    for i, part in itertools.product(range(len(samples)), parts):
        loss, grads = engine.plain_gradients(batch, index=i, names=part)
        alone = reference.rows[i] if len(parts) == 1 else engine.plain_gradients(samples[i], names=part)[1]
        worst = max(
            (_error(grads[n], alone[n], reference.norms[i], engine.floor) for n in part),
            key=lambda pair: pair[0] if pair[1] else 0.0,
        )
        del grads, alone
        gap = abs(float(loss) - reference.losses[i]) / max(abs(reference.losses[i]), 1e-3)
        if (worst[0] <= limit or not worst[1]) and gap <= limit:
            noise = max(noise, worst[0] if worst[1] else 0.0)
            continue
        again, _ = engine.plain_gradients(samples[i])
        if float(again) != reference.losses[i] and abs(float(again) - reference.losses[i]) > 1e-6 * abs(float(again)):
            raise LossError(
                f"The loss of one sample is {reference.losses[i]:.6g} at one time and {float(again):.6g} at the next: "
                "the model or the loss is random even in eval mode. Make it deterministic."
            )
        if gap <= limit:
            raise LossError(
                f"The gradient of sample {i} of the batch, alone and in a batch of {len(samples)}, differs by "
                f"{worst[0]:.1e} (relative), and its loss of {reference.losses[i]:.6g} does not: the backward pass "
                "depends on the batch or on chance (an autograd function of one's own, a hook, a kernel that adds up "
                f"in no fixed order, which use_deterministic excludes).{of_batch_norms(engine.model)}",
                samples=[i],
            )
        raise LossError(
            f"The loss couples samples: alone, sample {i} of the batch has the loss {reference.losses[i]:.6g} and in a "
            f"batch of {len(samples)} {float(loss):.6g}; its gradients differ by {worst[0]:.1e} (relative). Per-sample "
            "gradients need a loss of each sample by itself (no contrastive terms, no batch statistics)."
            f"{of_batch_norms(engine.model)}",
            samples=[i],
        )
    return noise


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


def _error(row: Tensor | None, truth: Tensor | None, whole: float, floor: float) -> tuple[float, bool]:
    """Return the norm-relative error, and whether it is more than the rounding of the `whole` gradient's norm."""
    difference = distance(row, truth)
    if truth is None or row is None:
        return (0.0, False) if difference == 0.0 else (float("inf"), difference > floor * whole)
    size = norm(truth)
    if difference == 0.0:
        return 0.0, False
    # `not <=`, so that a NaN is an error and never an agreement.
    return (difference / size if size else float("inf")), not difference <= floor * whole


def _compare(
    engine: GradientPasses, rows: Mapping[str, Tensor], reference: Reference, name: str
) -> tuple[bool, float, bool]:
    """Return whether a parameter's rows agree, the worst error, and whether agreement is only up to noise."""
    agrees, worst, noise = True, 0.0, False
    for i, truth in enumerate(reference.rows):
        error, significant = _error(rows[name][i], truth[name], reference.norms[i], engine.floor)
        if not error <= engine.tolerance:
            agrees = agrees and not significant
            noise = True
        worst = max(worst, error)
    return agrees, worst, noise
