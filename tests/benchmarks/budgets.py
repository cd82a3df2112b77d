"""A model of over 100 million parameters within a memory and a disk budget, on a small machine, and is it exact?

    python tests/benchmarks/budgets.py                  # 134 million parameters, 256 sequences of 64 bytes
    python tests/benchmarks/budgets.py --hold host      # gradients that nobody keeps, in memory
    python tests/benchmarks/budgets.py --flat           # 1x, 4x and 16x the parameters: the peak beside the model

Every run is a process of its own, whose peak resident set is sampled ten times a second, as is the size of the run's
folder. `base` is the peak of a process that imports the same packages, builds the same model, takes one forward and
backward pass of one sample, and does a whole run of a model of a few thousand parameters: that is the model, and what
libraries keep for themselves (BLAS, codecs, thread pools). The spectrum of some blocks is compared
with that of an unbudgeted run of just their parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

SHAPES = {
    # name: (hidden, intermediate, layers, vocabulary)
    "134M": (768, 2048, 12, 32000),
    "64M": (768, 2048, 9, 256),
    "16M": (384, 1024, 9, 256),
    "4M": (192, 512, 9, 256),
}
COMPARED = ("model.layers.5.*", "model.norm.weight")


def build(size: str):
    import torch
    import transformers

    hidden, intermediate, layers, vocabulary = SHAPES[size]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def run(size: str, samples: int, length: int, out: str, options: dict[str, object]) -> dict[str, float]:
    """Collect, reduce and solve in this process."""
    import streamfisher as sf
    from streamfisher.demo import demo_samples

    model, data = build(size), demo_samples(samples, length=length)
    start = time.perf_counter()
    found = sf.collect(model, data, out, config=sf.SpectralConfig(**options))
    collected = time.perf_counter() - start
    spectrum = found.spectrum("layer")
    seconds = time.perf_counter() - start
    spectrum.to_json(Path(out) / "spectrum.json")
    return {
        "seconds": seconds,
        "collect_seconds": collected,
        "waves": len(found.store.waves),
        "batch_tokens": found.store.batch_tokens,
        "parameters": sum(found.parameters.values()),
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def base(size: str, samples: int, length: int, out: str, options: dict[str, object]) -> dict[str, float]:
    """One plain forward and backward pass of one sample, and a run of a tiny model."""
    import torch

    import streamfisher as sf
    from streamfisher.demo import demo_samples

    model, sample = build(size), demo_samples(2, length=length)[0]["input_ids"][None]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embedded = model.get_input_embeddings()(sample).requires_grad_(True)
    logits = model(inputs_embeds=embedded).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], sample[0, 1:]).backward()
    with tempfile.TemporaryDirectory() as folder:
        tiny = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
        data = {"input": torch.randn(64, 64), "labels": torch.randn(64, 4)}
        sf.collect(tiny, data, Path(folder) / "run.zarr").spectrum("layer")
    return {"model_bytes": sum(p.numel() * p.element_size() for p in model.parameters())}


def watched(what: str, *arguments: object, out: Path | None = None) -> dict[str, float]:
    """Run a function of this file in a process of its own; return what it returned, and its peaks in bytes."""
    command = [sys.executable, "-W", "ignore", __file__, "--process", what, json.dumps(arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    peaks = {"peak_bytes": 0, "disk_bytes": 0}

    def watch() -> None:
        tick = 0
        while process.poll() is None:
            try:
                peaks["peak_bytes"] = max(peaks["peak_bytes"], psutil.Process(process.pid).memory_info().rss)
            except psutil.NoSuchProcess:
                return
            if out is not None and tick % 10 == 0:
                peaks["disk_bytes"] = max(peaks["disk_bytes"], folder_bytes(out))
            tick += 1
            time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    printed, _ = process.communicate()
    thread.join()
    if process.returncode:
        raise SystemExit(f"the process of {what} ended with {process.returncode}")
    return json.loads(printed.splitlines()[-1]) | peaks


def folder_bytes(path: Path) -> int:
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(folder) / name).stat().st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def options_of(arguments: argparse.Namespace) -> dict[str, object]:
    options = {"memory_budget": arguments.memory, "disk_budget": arguments.disk}
    return options | ({"hold": arguments.hold, "keep_gradients": "none"} if arguments.hold else {})


def budgeted(arguments: argparse.Namespace, folder: Path) -> None:
    import numpy as np

    options = options_of(arguments)
    out = folder / "run.zarr"
    plain = watched("base", arguments.size, arguments.samples, arguments.length, "", {})
    found = watched("run", arguments.size, arguments.samples, arguments.length, str(out), options, out=out)
    dense = 2 * found["parameters"] * arguments.samples
    print(
        f"{found['parameters']:,} parameters, {arguments.samples} samples of {arguments.length} tokens; dense bf16 "
        f"rows would be {dense / 1e9:.1f} GB\n"
        f"budgets {arguments.memory} of memory, {arguments.disk} of disk: {found['waves']:.0f} waves, batches of "
        f"{found['batch_tokens']:.0f} tokens\n"
        f"base {plain['peak_bytes'] / 1e9:.2f} GB (the model is {found['model_bytes'] / 1e9:.2f} GB of it)\n"
        f"peak {found['peak_bytes'] / 1e9:.2f} GB, that is {(found['peak_bytes'] - plain['peak_bytes']) / 1e9:.2f} GB "
        f"over the base; disk {found['disk_bytes'] / 1e9:.2f} GB at most\n"
        f"{found['seconds']:.0f} s in all, {found['collect_seconds']:.0f} s of them for gradients and Grams"
    )
    other = folder / "other.zarr"
    watched(
        "run",
        arguments.size,
        arguments.samples,
        arguments.length,
        str(other),
        {"include": COMPARED, "representation": "dense"},
    )
    spectra = [json.loads((path / "spectrum.json").read_text())["per_block"] for path in (out, other)]
    for key in spectra[1]:
        one, two = (np.array(spectrum[key]["eigenvalues"]) for spectrum in spectra)
        above = two > spectra[1][key]["noise_floor"]
        worst = float(np.max(np.abs(one - two)[above] / two[above]))
        print(
            f"block {key}: {above.sum()} eigenvalues above the floor, largest relative difference {worst:.1e}, ", end=""
        )
        print(f"of the largest eigenvalue {abs(one[0] - two[0]) / two[0]:.1e}")


def flat(arguments: argparse.Namespace, folder: Path) -> None:
    print("parameters  model MB  peak MB  base MB  peak over base MB  waves")
    for size in ("4M", "16M", "64M"):
        out = folder / f"{size}.zarr"
        options = options_of(arguments)
        plain = watched("base", size, arguments.samples, arguments.length, "", {})
        found = watched("run", size, arguments.samples, arguments.length, str(out), options, out=out)
        over = (found["peak_bytes"] - plain["peak_bytes"]) / 1e6
        print(
            f"{found['parameters'] / 1e6:9.1f}M  {found['model_bytes'] / 1e6:8.0f}  {found['peak_bytes'] / 1e6:7.0f}  "
            f"{plain['peak_bytes'] / 1e6:7.0f}  {over:17.0f}  {found['waves']:5.0f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="134M")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--memory", default=None, help="default: 3GB, and 600MB with --flat")
    parser.add_argument("--disk", default=None, help="default: 6GB, and 2GB with --flat")
    parser.add_argument("--hold", choices=["host", "disk"], default=None, help="keep none, and hold them there")
    parser.add_argument("--flat", action="store_true", help="the peak against the number of parameters instead")
    parser.add_argument("--folder", default=None, help="for the runs (default: a temporary one)")
    parser.add_argument("--process", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process is not None:
        what, values = arguments.process
        print(json.dumps({"run": run, "base": base}[what](*json.loads(values))))
        return
    arguments.memory = arguments.memory or ("600MB" if arguments.flat else "3GB")
    arguments.disk = arguments.disk or ("2GB" if arguments.flat else "6GB")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        (flat if arguments.flat else budgeted)(arguments, Path(folder))


if __name__ == "__main__":
    main()
