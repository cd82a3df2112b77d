"""Which ways there are to serve a parameter's place in the model, in the order in which the probe tries them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from streamfisher.gradients.batch_axis import BATCH_FIRST, TIME_FIRST
from streamfisher.gradients.groups import GENERIC, Group
from streamfisher.gradients.parameters import Slot
from streamfisher.gradients.rules import rules_for

#: How many modules around a parameter's own are tried with the generic rule.
MAX_ANCESTORS = 3

#: How many candidates are compared for a parameter whose gradient is mere rounding.
MAX_NOISY = 4


@dataclass(frozen=True)
class Candidate:
    """One way to serve a parameter's place: a rule, the module it watches, and the layouts it may assume."""

    site: str
    rule: str
    relative: str  # the parameter's name as seen from the site
    layouts: tuple[str, ...]


@dataclass
class NoiseSearch:
    """Parameters whose gradient is so small that any error is below the rounding of the whole gradient.

    There a wrong formula (or none at all) would pass as rounding, so a few more candidates are tried and the one that
    agrees best is kept.
    """

    best: dict[str, tuple[float, dict[str, int]]] = field(default_factory=dict)  # parameter -> error, positions
    tried: dict[str, int] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)

    def note(self, name: str, error: float, positions: dict[str, int]) -> None:
        """Remember a candidate that agrees up to noise."""
        self.tried[name] = self.tried.get(name, 0) + 1
        if name not in self.best or error < self.best[name][0]:
            self.best[name] = (error, positions)

    def enough(self, name: str) -> bool:
        """Return whether no more candidates are worth a pass."""
        return self.tried.get(name, 0) >= MAX_NOISY

    def found(self, name: str) -> bool:
        """Return whether one of them is worth keeping: not if the best leaves a row zero that is not."""
        return name in self.best and abs(self.best[name][0] - 1.0) > 1e-9

    def settle(self, name: str) -> dict[str, int]:
        """Return the positions of the best candidate, which is final."""
        self.settled.add(name)
        return self.best[name][1]


def candidates_of(
    slot: Slot, modules: Mapping[str, nn.Module], called: set[str], with_attention: set[str]
) -> list[Candidate]:
    """Return the candidates of one place, most efficient first.

    A module that the forward does not call is watched and taken to contribute nothing; should a later batch call it,
    that batch's parameters are taken sample by sample. A module around it may use its parameters all the same (as
    attention uses its output projection's), which is tried next.

    Args:
        slot: the place.
        modules: of the model, by name.
        called: names of those that the forward calls.
        with_attention: names of those that are, or hold, an `nn.MultiheadAttention`.
    """
    found: list[Candidate] = []
    rules = rules_for(modules[slot.owner])
    if slot.owner not in called:
        name = rules[0].name if rules else "generic"
        found.append(Candidate(slot.owner, name, slot.attribute, BATCH_FIRST))
    else:
        for rule in rules:
            found.append(Candidate(slot.owner, rule.name, slot.attribute, rule.layouts))
            if "time" in rule.layouts:
                found.append(Candidate(slot.owner, rule.name, slot.attribute, TIME_FIRST))
    site, relative = slot.owner, slot.attribute
    for _ in range(MAX_ANCESTORS + 1):
        if site in called:
            for name in ("generic", "generic_loop"):
                # A loop over the whole model is what the per-sample path does anyway.
                if site or name == "generic":
                    found.append(Candidate(site, name, relative, BATCH_FIRST))
            if site and site in with_attention:
                found += [Candidate(site, name, relative, TIME_FIRST) for name in ("generic", "generic_loop")]
        if not site:
            break
        site, _, last = site.rpartition(".")
        relative = f"{last}.{relative}"
    return found


def options_of(model: nn.Module, slots: Sequence[Slot], called: set[str]) -> dict[str, list[Candidate | None]]:
    """Return the candidates of every place; None stands for "contributes nothing".

    Where a tied parameter has a closed formula at one place (a head's bias in its linear layer), a second place that
    only holds it (the prediction module around) is first taken to contribute nothing.
    """
    modules = dict(model.named_modules())
    attention = [n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.MultiheadAttention)]
    around = {name[:end] for name in attention for end in (*_dots(name), len(name))}
    candidates = {slot.name: candidates_of(slot, modules, called, around) for slot in slots}
    closed = {
        slot.parameter
        for slot in slots
        if slot.owner in called and candidates[slot.name] and candidates[slot.name][0].rule not in GENERIC
    }
    options: dict[str, list[Candidate | None]] = {}
    for slot in slots:
        held = slot.parameter in closed and slot.owner in called and candidates[slot.name][0].rule in GENERIC
        options[slot.name] = [*([None] if held else []), *candidates[slot.name]]
    return options


def _dots(name: str) -> list[int]:
    return [place for place, sign in enumerate(name) if sign == "."]


def groups_of(slots: Iterable[Slot], chosen: Mapping[str, Candidate | None]) -> list[Group]:
    """Return the groups that serve `chosen` (slot name -> candidate), in the order of the slots."""
    groups: dict[Any, Group] = {}
    for slot in slots:
        candidate = chosen.get(slot.name)
        if candidate is None:
            continue
        key = (candidate.site, candidate.rule, candidate.layouts)
        group = groups.setdefault(key, Group(candidate.site, candidate.rule, {}, candidate.layouts))
        group.names[candidate.relative] = slot.parameter
    return list(groups.values())
