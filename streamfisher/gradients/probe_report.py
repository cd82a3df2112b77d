"""What the probe found: which rule serves which parameter, how exactly, and how much of the gradient that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamfisher.gradients.groups import GENERIC
from streamfisher.gradients.plain import Alone
from streamfisher.runtime.printable import printable

#: An error from which on a formula is as good as none.
_SURELY_NOT = 0.3


@dataclass(frozen=True)
class ParameterReport:
    """How one parameter is served."""

    name: str
    rule: str  # names of rules joined by '+' where a tied parameter has several; 'per_sample'; 'unreached'
    numel: int
    error: float  # worst over samples of ||row - autograd|| / ||autograd||; 0 where both are zero
    share: float  # of the squared gradient norm of the probed samples
    zero: bool  # the gradient of every probed sample is exactly zero
    noise: bool  # the error is above the tolerance, but below the rounding of the whole gradient
    reason: str = ""  # why the per-sample path


@dataclass(frozen=True)
class ProbeReport:
    """The routing of every captured parameter, verified against plain autograd, and the coverage it gives."""

    n_samples: int  # samples compared
    tolerance: float  # norm-relative
    parameters: dict[str, ParameterReport]
    excluded: dict[str, str]  # parameter -> reason
    excluded_numel: int  # trainable parameters left out
    coverage_parameters: float  # captured / trainable parameters, by number of elements
    coverage_norm: float  # captured share of the squared gradient norm of all trainable parameters
    groups: tuple[dict[str, Any], ...] = field(default=(), repr=False)  # the routing, see groups.Group
    notes: tuple[str, ...] = ()  # what is done otherwise than the model would by itself
    alone: Alone = "as given"  # how samples are taken alone
    arithmetic: tuple[str, ...] = ()  # dtypes in which the model computes

    @property
    def worst_error(self) -> float:
        """The largest error of a parameter whose gradient is more than rounding."""
        return max((p.error for p in self.parameters.values() if not p.noise), default=0.0)

    @property
    def per_sample(self) -> tuple[str, ...]:
        """Parameters that take a backward pass of their own for every sample."""
        return tuple(name for name, p in self.parameters.items() if p.rule == "per_sample")

    @property
    def zero(self) -> tuple[str, ...]:
        """Parameters of which every probed sample has the gradient zero, so that no rule is proved."""
        return tuple(name for name, p in self.parameters.items() if p.zero)

    @property
    def unproved(self) -> tuple[str, ...]:
        """Parameters whose rule the probed samples do not prove: they have no gradient, or mere rounding of one.

        Rounding proves nothing where any formula would be as far off as this one, unless the same formula of the same
        module is proved by its weight (an attention's key bias, whose exact gradient is zero).
        """
        proved = {name for name, p in self.parameters.items() if not p.zero and not p.noise}
        backed = {n for group in self.groups if group["names"].get("weight") in proved for n in group["names"].values()}
        closed = {group["rule"] for group in self.groups} - GENERIC.keys()

        def is_rounding(parameter: ParameterReport) -> bool:
            wrong = parameter.noise and parameter.error > _SURELY_NOT
            return wrong and parameter.name not in backed and bool(closed & {*parameter.rule.split("+")})

        return tuple(name for name, p in self.parameters.items() if p.zero or is_rounding(p))

    @property
    def fallbacks(self) -> dict[str, str]:
        """Return parameter -> reason for everything on the per-sample path."""
        return {name: self.parameters[name].reason for name in self.per_sample}

    @property
    def share_per_sample(self) -> float:
        """The share of captured parameters (by elements) that is on the per-sample path."""
        total = sum(p.numel for p in self.parameters.values())
        return sum(self.parameters[name].numel for name in self.per_sample) / total if total else 0.0

    def rules(self) -> dict[str, int]:
        """Return rule -> number of parameter tensors that it serves, most used first."""
        counts: dict[str, int] = {}
        for parameter in self.parameters.values():
            counts[parameter.rule] = counts.get(parameter.rule, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def summary(self) -> str:
        """Return a few lines for a person."""
        numel = sum(p.numel for p in self.parameters.values())
        lines = [
            f"{len(self.parameters)} parameter tensors ({numel:,} values) captured: "
            f"{self.coverage_parameters:.2%} of the trainable parameters, "
            f"{self.coverage_norm:.2%} of the squared gradient norm",
            f"worst relative error against plain autograd on {self.n_samples} samples: {self.worst_error:.1e} "
            f"(tolerance {self.tolerance:.0e})"
            if self.worst_error
            else f"bit-identical to plain autograd on {self.n_samples} samples",
            "rules: " + ", ".join(f"{rule} {count}" for rule, count in self.rules().items()),
        ]
        if self.per_sample:
            shown = ", ".join(self.per_sample[:4]) + (", ..." if len(self.per_sample) > 4 else "")
            lines.append(f"one pass per sample for {len(self.per_sample)} ({self.share_per_sample:.2%}): {shown}")
        if self.zero:
            shown = ", ".join(self.zero[:4]) + (", ..." if len(self.zero) > 4 else "")
            lines.append(
                f"zero gradient: {len(self.zero)} ({shown}); should a later sample have one, it takes a pass of its own"
            )
        left_out = {name: reason for name, reason in self.excluded.items() if reason != "frozen"}
        if left_out:
            shown = ", ".join(f"{name} ({reason})" for name, reason in list(left_out.items())[:4])
            lines.append(f"left out: {len(left_out)}: {shown}{', ...' if len(left_out) > 4 else ''}")
        frozen = len(self.excluded) - len(left_out)
        if frozen:
            lines.append(f"frozen: {frozen} parameter tensors")
        lines.extend(self.notes)
        return "\n".join(map(printable, lines))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` reads them back."""
        return {
            "n_samples": self.n_samples,
            "tolerance": self.tolerance,
            "worst_error": _plain(self.worst_error),
            "coverage_parameters": self.coverage_parameters,
            "coverage_norm": self.coverage_norm,
            "share_per_sample": self.share_per_sample,
            "parameters": {
                name: {
                    "rule": p.rule,
                    "numel": p.numel,
                    "error": _plain(p.error),
                    "share": _plain(p.share),
                    "zero": p.zero,
                    "noise": p.noise,
                    "reason": p.reason,
                }
                for name, p in self.parameters.items()
            },
            "fallbacks": self.fallbacks,
            "excluded": dict(self.excluded),
            "excluded_numel": self.excluded_numel,
            "groups": [dict(group) for group in self.groups],
            "notes": list(self.notes),
            "alone": self.alone,
            "arithmetic": list(self.arithmetic),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProbeReport:
        """Rebuild a report from what `to_dict` returned."""
        return cls(
            n_samples=values["n_samples"],
            tolerance=values["tolerance"],
            parameters={
                name: ParameterReport(
                    name, **{**entry, "error": math.inf if entry["error"] is None else entry["error"]}
                )
                for name, entry in values["parameters"].items()
            },
            excluded=dict(values["excluded"]),
            excluded_numel=values["excluded_numel"],
            coverage_parameters=values["coverage_parameters"],
            coverage_norm=values["coverage_norm"],
            groups=tuple(values["groups"]),
            notes=tuple(values.get("notes", ())),
            alone=values.get("alone", "as given"),
            arithmetic=tuple(values.get("arithmetic", ())),
        )


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
