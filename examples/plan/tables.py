"""Make the tables of docs/planning.md again: `python examples/plan/tables.py [--check]`.

Every table is planned from the configs in this folder and from rates that are given, so the page is the same on any
machine. `--check` only says whether the page is up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from streamfisher import SpectralConfig
from streamfisher.byte_sizes import format_bytes
from streamfisher.models import build_skeleton
from streamfisher.planning import Machine, ModelTrace, Rates, RunPlan, plan_run, strategy_row, trace_model

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "planning.md"
SAMPLES, TOKENS = 1024, 512


@dataclass(frozen=True)
class Setting:
    """A machine that is assumed, as options of the command."""

    title: str
    devices: int
    memory: float
    disk: float
    rate: float  # bytes/s of the disk
    flops: float  # operations/s of all devices together
    solve: float = 1e11

    def options(self) -> str:
        """Return the command's options that describe it."""
        room = f"--memory-budget {_size(self.memory)} --disk-budget {_size(self.disk)}"
        return (
            f"--flops {self.flops:g} --solve-flops {self.solve:g} --disk {_size(self.rate)}/s --devices {self.devices} "
            f"--device-memory 80GB {room}"
        )

    def machine(self) -> Machine:
        """Return what there is to work with."""
        return Machine(int(self.memory), int(self.disk), self.devices, 80 * 10**9)

    def rates(self) -> Rates:
        """Return how fast it is taken to be."""
        return Rates(self.flops, self.flops, self.flops, self.solve, self.rate, self.rate)


NODE = Setting("One node of 8 H100", 8, 2e12, 30e12, 10e9, 8 * 400e12)
SINGLE = Setting("One H100", 1, 512e9, 4e12, 5e9, 400e12)
WORKSTATION = Setting("A workstation", 1, 128e9, 2e12, 3e9, 80e12)


@cache
def _trace(model: str) -> ModelTrace:
    batch = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long)}
    return trace_model(build_skeleton(str(HERE / model)), batch, causal=True)


def plan(model: str, setting: Setting) -> RunPlan:
    """Return the plan of one of the example models."""
    return plan_run(
        _trace(model),
        [TOKENS] * SAMPLES,
        SpectralConfig(stream="auto", n_workers=1),
        machine=setting.machine(),
        rates=setting.rates(),
    )


def command(model: str, setting: Setting) -> str:
    """Return the command that prints the plan."""
    data = f"--samples {SAMPLES} --max-length {TOKENS} --stream auto --workers 1"
    return f"streamfisher plan examples/plan/{model} {data} {setting.options()}"


def models_table() -> str:
    """Return what the gradients of each model take."""
    lines = [
        "| model | parameters | weights | as rows | as held | Grams | plain pass, operations |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model in ("llama-2-7b", "llama-3-70b", "llama-3.1-405b", "mixtral-8x7b"):
        found = plan(model, NODE)
        rows, held = found.strategies[0].gradients, found.strategies[1].gradients
        lines.append(
            f"| {model} | {found.trace.n_params:,} | {format_bytes(found.trace.weight_bytes)} | {format_bytes(rows)} | "
            f"{format_bytes(held)} | {format_bytes(found.gram_bytes)} | {3 * SAMPLES * found.trace.forward_flops:.2g} |"
        )
    return "\n".join(lines)


def strategies_table(models: tuple[str, ...], settings: tuple[Setting, ...]) -> str:
    """Return every way of every model on every machine, and the commands."""
    lines = [
        "| model | machine | way | passes | written | disk at most | boundaries | weights | memory | time | fits |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    commands = []
    for model in models:
        for setting in settings:
            found = plan(model, setting)
            commands.append("    " + command(model, setting))
            for way in found.strategies:
                mark = "**" if way is found.chosen and way.fits else ""
                name, *cells = strategy_row(way)
                lines.append(f"| {model} | {setting.title} | {mark}{name}{mark} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + "\n".join(commands)


TABLES = {
    "models": models_table,
    "node": lambda: strategies_table(("llama-2-7b", "llama-3-70b", "mixtral-8x7b"), (NODE,)),
    "machines": lambda: strategies_table(("llama-2-7b", "llama-3-70b", "llama-3.1-405b"), (WORKSTATION, SINGLE, NODE)),
}


def updated(page: str) -> str:
    """Return the page with every table made again."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"docs/planning.md has no place for the table {name!r}.")
        text = make()
        page = pattern.sub(rf"\g<1>{text}\n\g<2>", page)
    return page


def main() -> int:
    """Write the page, or say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table is out of date")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = updated(before)
    if check:
        print("docs/planning.md is up to date." if after == before else "docs/planning.md is out of date.")
        return int(after != before)
    PAGE.write_text(after, encoding="utf-8")
    print(f"{len(TABLES)} tables written to {PAGE}")
    return 0


def _size(value: float) -> str:
    return f"{value / 1e12:g}TB" if value >= 1e12 else f"{value / 1e9:g}GB"


if __name__ == "__main__":
    sys.exit(main())
