"""A plan, and how it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streamfisher.byte_sizes import format_bytes
from streamfisher.planning.model_trace import ModelTrace
from streamfisher.planning.rates import UNKNOWN, Rates
from streamfisher.planning.shortfalls import Machine, round_up
from streamfisher.planning.strategy import BlockBytes, Stage, Strategy

#: Seconds of work that a kill may cost without a word of it in the short form of a plan.
_WORTH_SAYING = 60.0


@dataclass(frozen=True)
class RunPlan:
    """The ways of one run side by side, and the one that would be taken."""

    trace: ModelTrace
    n_samples: int
    mean_length: float
    n_grams: int
    gram_bytes: float
    machine: Machine
    rates: Rates
    blocks: tuple[BlockBytes, ...]
    strategies: tuple[Strategy, ...]
    chosen: Strategy
    least: Mapping[str, float]  # the smallest disk and memory budgets, in bytes, with which waves would do
    settings: Mapping[str, Any]  # of the config, as far as they decide
    notes: tuple[str, ...] = ()  # what comes out otherwise than with more memory

    def problems(self) -> list[str]:
        """Return what keeps the chosen way from fitting, a sentence each; empty if it fits."""
        return list(self.chosen.problems)

    def table(self) -> str:
        """Return the plan as text."""
        return plan_table(self)

    def summary(self) -> str:
        """Return the plan in three lines: what of, what it takes, and where gradients are meanwhile."""
        trace, way = self.trace, self.chosen
        where = {"device": "on the device", "host": "in memory"}.get(way.hold, "on disk")
        where += f" ({format_bytes(way.away)} of them in host memory)" if way.away else ""
        passes = "1 pass" if way.waves == 1 or way.name != "waves" else f"{way.waves} passes"
        time = f"about {format_seconds(way.seconds)}" if self.rates != UNKNOWN else "a short run"
        if self.rates != UNKNOWN and way.at_risk > _WORTH_SAYING:
            time += f", of which a kill costs about {format_seconds(way.at_risk)}"
        return "\n".join(
            (
                f"{trace.name}, {trace.n_params:,} parameters; {self.n_samples:,} samples of {self.mean_length:.0f} "
                "tokens on average",
                f"{passes} over the data, gradients {where} until they are reduced: {time}",
                f"at most {format_bytes(way.disk)} on disk and {format_bytes(way.memory)} of memory beside the "
                "weights (--verbose: all of the plan)",
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "model": self.trace.name,
            "n_params": self.trace.n_params,
            "bytes_weights": self.trace.weight_bytes,
            "n_samples": self.n_samples,
            "mean_length": self.mean_length,
            "forward_flops_per_sample": self.trace.forward_flops,
            "activation_bytes_per_sample": self.trace.activation_bytes,
            "n_grams": self.n_grams,
            "bytes_grams": self.gram_bytes,
            "settings": dict(self.settings),
            "machine": vars(self.machine),
            "rates": vars(self.rates),
            "blocks": [vars(block) for block in self.blocks],
            "ways": [way.to_dict() for way in self.strategies],
            "chosen": self.chosen.name,
            "fits": self.chosen.fits,
            "problems": self.problems(),
            "notes": list(self.notes),
            "bytes_least": dict(self.least),
        }


def plan_table(plan: RunPlan) -> str:
    """Return the plan for a person to read."""
    trace = plan.trace
    lines = [
        f"{trace.name}: {trace.n_params:,} parameters in {len(trace.shapes)} tensors, "
        f"weights {format_bytes(trace.weight_bytes)}",
        f"{plan.n_samples:,} samples of {plan.mean_length:.0f} tokens on average; one plain forward and backward of "
        f"all of them is {format_count(3.0 * plan.n_samples * trace.forward_flops)} operations",
        "",
        *_columns([("block", "parameters", "as rows", "as factors", "stored"), *map(_block_row, folded(plan.blocks))]),
        f"Grams: {plan.n_grams} of {format_bytes(8.0 * plan.n_samples**2)}, {format_bytes(plan.gram_bytes)} in all. "
        "Sizes are uncompressed.",
        "",
        *strategies_table(plan),
        "",
        f"Taken: {taken(plan.chosen)}. {_risk(plan)}",
        *_columns([("stage", "operations", "read", "written", "memory", "time"), *map(_stage_row, plan.chosen.stages)]),
        "Memory is the host's, beside the model's weights. Rates: " + _rates(plan),
    ]
    lines += plan.notes
    if plan.chosen.fits:
        lines.append("It fits.")
    else:
        lines.append("It does not fit:")
        lines += [f"  - {problem}" for problem in plan.problems()]
        disk, memory = (round_up(plan.least[what]) for what in ("disk", "memory"))
        if plan.strategies[-1].fits:
            lines.append(f"--stream layers would fit, in {format_seconds(plan.strategies[-1].seconds)}.")
        lines.append(f"The least with which waves would do: --disk-budget {disk} --memory-budget {memory}.")
    return "\n".join(lines)


def _risk(plan: RunPlan) -> str:
    """Return what a kill costs, in words."""
    way = plan.chosen
    if way.hold == "disk":
        return "A kill costs the units in flight: what was written is there."
    what = "the wave in flight" if way.waves > 1 else "the pass"
    what += " and the forward pass" if way.name != "waves" and way.boundaries else ""
    return f"A kill costs {what}" + (f", about {format_seconds(way.at_risk)}." if plan.rates != UNKNOWN else ".")


def strategies_table(plan: RunPlan) -> list[str]:
    """Return the ways of a run side by side."""
    head = ("way", "passes", "written", "disk at most", "boundaries", "weights", "memory", "time", "fits")
    return _columns([head, *(strategy_row(way) for way in plan.strategies)])


def strategy_row(way: Strategy) -> tuple[str, ...]:
    """Return one way as cells of text."""
    name = f"{way.name} ({way.waves})" if way.name == "waves" else way.name
    name += {"device": ", on the device", "host": ", in memory"}.get(way.hold, "")
    name += " and in memory" if way.away else ""
    boundaries = "" if not way.boundaries else format_bytes(way.boundaries)
    if way.every > 1:
        boundaries += f" (1 in {way.every})"
    return (
        name,
        f"{way.passes:.2f}",
        format_bytes(way.gradients),
        format_bytes(way.disk),
        boundaries or "-",
        format_bytes(way.weights),
        format_bytes(way.memory),
        format_seconds(way.seconds),
        "yes" if way.fits else "no",
    )


def folded(blocks: Sequence[BlockBytes]) -> list[tuple[str, BlockBytes]]:
    """Return blocks with runs of equal ones written as one: `layer_0 ... layer_31`, each."""
    found: list[tuple[list[str], BlockBytes]] = []
    for block in blocks:
        same = found and (found[-1][1].n_params, found[-1][1].stored) == (block.n_params, block.stored)
        if same:
            found[-1][0].append(block.name)
        else:
            found.append(([block.name], block))
    return [
        (names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}, each of {len(names)}", block)
        for names, block in found
    ]


def format_count(value: float) -> str:
    """Return `'2.1e+15'`."""
    return f"{value:.2g}"


def format_seconds(seconds: float) -> str:
    """Return a time in the unit that suits it; a dash for none."""
    if seconds == 0.0:
        return "-"
    for limit, scale, unit in ((120.0, 1.0, "s"), (7200.0, 60.0, "min"), (172800.0, 3600.0, "h")):
        if seconds < limit:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 86400.0:.3g} days"


def taken(way: Strategy) -> str:
    """Return a way in words, with the number of its waves."""
    if way.name != "waves":
        return way.name
    where = {"device": "on the device", "host": "in memory"}.get(way.hold, "on disk")
    return f"a single wave, with all gradients {where} at once" if way.waves == 1 else f"{way.waves} waves"


def _block_row(named: tuple[str, BlockBytes]) -> tuple[str, ...]:
    name, block = named
    return (
        name,
        f"{block.n_params:,}",
        format_bytes(block.dense),
        format_bytes(block.factors),
        format_bytes(block.stored),
    )


def _stage_row(stage: Stage) -> tuple[str, ...]:
    return (
        stage.name,
        format_count(stage.flops),
        format_bytes(stage.read),
        format_bytes(stage.written),
        format_bytes(stage.memory),
        format_seconds(stage.seconds),
    )


def _rates(plan: RunPlan) -> str:
    rates = plan.rates
    if rates == UNKNOWN:
        return "not measured, because the run is short; `streamfisher plan` measures them."
    return (
        f"passes {format_count(rates.passes)}/s, products {format_count(rates.products)}/s, rows of factors "
        f"{format_count(rates.forming)}/s, solve {format_count(rates.solve)}/s, write {format_bytes(rates.write)}/s, "
        f"read {format_bytes(rates.read)}/s; {rates.source}."
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
