"""Write docs/coverage.md: `python tests/gradients/coverage_table.py`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import transformers  # noqa: E402
from gradients import model_zoo, zoo_check  # noqa: E402

HEAD = f"""# Coverage: every trainable parameter of these models, against a float64 autograd loop

Written by `python tests/gradients/coverage_table.py` with torch {torch.__version__.split("+")[0]} and transformers
{transformers.__version__}, on the CPU. The models are tiny and randomly initialised; batches hold 5 samples of unequal
lengths (text) with padding. *Coverage* is the share of trainable parameters that has rows. An *error* is
`||rows - truth|| / ||truth||` of the worst parameter, where the truth is plain autograd in float64 on one sample at a
time; a parameter whose gradient is below 1e-4 of the whole gradient is measured against that. *Per sample* is the
share of parameters that needs a backward pass of its own for each sample; everything else comes from one backward pass
per batch. For the float64 column, code that asks for float32 (norms, softmax) is kept in float64: otherwise plain
autograd itself repeats to 1e-7 only.

| model | loss | parameters | coverage | error float64 | error float32 | rules (parameter tensors) | per sample |
|---|---|---:|---:|---:|---:|---|---:|
"""

#: What follows the table: written by hand, and kept.
TAIL = "## What the probe proves, and what is watched after it"


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    only = sys.argv[1:]
    lines = []
    for entry in model_zoo.ZOO:
        if only and not any(word.lower() in entry.name.lower() for word in only):
            continue
        double = zoo_check.compare(model_zoo.build(entry), entry.batch(5), torch.float64)
        single = zoo_check.compare(model_zoo.build(entry), entry.batch(5), torch.float32)
        rules = ", ".join(f"{rule} {count}" for rule, count in single.report.rules().items())
        lines.append(
            f"| {entry.name} | {single.loss.name} | {single.trainable:,} | {single.captured / single.trainable:.0%} | "
            f"{double.worst:.1e} | {single.worst:.1e} | {rules} | {single.report.share_per_sample:.1%} |"
        )
        print(lines[-1], flush=True)
        for name, reason in single.report.fallbacks.items():
            print(f"    {name}: {reason}", flush=True)
    if not only:
        page = ROOT / "docs" / "coverage.md"
        tail = page.read_text(encoding="utf-8").partition(TAIL)[2]
        page.write_text(HEAD + "\n".join(lines) + f"\n\n{TAIL}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
