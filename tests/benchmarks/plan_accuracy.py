"""What `plan` says of a run, beside what the run then takes: bytes, time by stage.

`python tests/benchmarks/plan_accuracy.py [--samples 192] [--json FILE]`

Three models on this machine, each planned from its shapes with rates measured just before, then run: the demo model, a
Llama-shaped model of about 24 million parameters held as factors, and the same as rows, in waves. Ratios are plan over
run; 1 is perfect.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import streamfisher as sf
from streamfisher.demo import demo_samples, load_demo_model
from streamfisher.planning import RunPlan, measure, plan_run, this_machine, trace_model


def build_llama() -> torch.nn.Module:
    """A decoder of 8 layers of width 448."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=448, intermediate_size=1216, num_hidden_layers=8, num_attention_heads=7,
        num_key_value_heads=7, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_tokens(n_samples: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {"input_ids": torch.randint(0, 4096, (n_samples, length), generator=generator)}


def make_plan(model: torch.nn.Module, n_samples: int, length: int, config: sf.SpectralConfig, folder: Path) -> RunPlan:
    trace = trace_model(model, {"input_ids": torch.zeros(1, length, dtype=torch.long)}, causal=True)
    batch = max(1, min(config.batch_tokens // length, config.chunk_size, n_samples))
    rates = measure(n_samples, layer=dataclasses.replace(trace.layer, batch=batch), folder=folder)
    machine = this_machine(config, folder, loaded=True)  # as the run sees it
    return plan_run(trace, [length] * n_samples, config, machine=machine, rates=rates)


def compare(name: str, model: torch.nn.Module, samples, n_samples: int, length: int, config: sf.SpectralConfig) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        plan = make_plan(model, n_samples, length, config, Path(folder))
        planning = time.perf_counter() - start
        start = time.perf_counter()
        run = sf.collect(model, samples, Path(folder) / "run.zarr", config=config)
        collected = time.perf_counter()
        run.build_grams()
        reduced = time.perf_counter()
        run.spectrum("layer")
        end = time.perf_counter()
        on_disk = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
        waves = len(run.store.waves)
    planned = {stage.name: stage.seconds for stage in plan.chosen.stages}
    took = {"collect": collected - start, "reduce": reduced - collected, "solve": end - reduced}
    if waves > 1:  # each wave is reduced while it is collected
        planned = {"collect": planned["collect"] + planned["reduce"], "reduce": 0.0, "solve": planned["solve"]}
    result = {
        "run": name,
        "parameters": plan.trace.n_params,
        "samples": n_samples,
        "tokens": length,
        "planning_seconds": planning,
        "waves": [plan.chosen.waves, waves],
        "planned_seconds": planned,
        "run_seconds": took,
        "planned_total": sum(planned.values()),
        "run_total": sum(took.values()),
        "time_ratio": sum(planned.values()) / sum(took.values()),
        "planned_bytes": plan.chosen.disk,
        "bytes_on_disk": on_disk,
    }
    shares = ", ".join(f"{stage} {planned[stage]:.1f}/{took[stage]:.1f}" for stage in took)
    print(
        f"{name}: {waves} waves (planned {plan.chosen.waves}); seconds planned/run: {shares}; total "
        f"{result['planned_total']:.1f}/{result['run_total']:.1f}, ratio {result['time_ratio']:.2f}; planning took "
        f"{planning:.1f} s; {plan.rates}"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--json", default=None, metavar="FILE")
    parser.add_argument("--only", type=int, nargs="+", default=[0, 1, 2], help="which of the runs, by number")
    arguments = parser.parse_args()
    n = arguments.samples
    runs = [
        lambda: compare("demo", load_demo_model(), demo_samples(n), n, 128, sf.SpectralConfig()),
        lambda: compare("factors", build_llama(), random_tokens(n, 64), n, 64, sf.SpectralConfig()),
        lambda: compare(
            "rows in waves", build_llama(), random_tokens(n, 64), n, 64,
            sf.SpectralConfig(representation="dense", disk_budget=n * 24_000_000 * 4 // 2),
        ),
    ]  # fmt: skip
    results = [runs[number]() for number in arguments.only]
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
