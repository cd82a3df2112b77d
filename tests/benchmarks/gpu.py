"""What one GPU makes of the whole job: correctness, every hold, and how long it takes beside a plain pass.

    cd tests && python -m benchmarks.gpu                 # on a CUDA device; no network, models with random weights
    cd tests && python -m benchmarks.gpu --device cpu --scale tiny

Every part runs in a process of its own and prints its line when it ends, so that what is done is known however the
whole is cut off; a part that has no time left is left out and said to be. The table comes again at the end, best first.

correct   small models: top eigenvalues against float64 on the CPU, relative to the largest; for each hold
job       collect, Grams and the spectra of `none` and `layer`, nothing kept, over a plain forward and backward pass
kept      collecting with all gradients kept, over writing as many bytes raw
streamed  the job for a model of the shape of Llama-2-7B, layer by layer
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import streamfisher as sf

HOLDS = ("device", "host", "disk")
#: hidden size, intermediate size, layers, heads, vocabulary, samples, tokens
JOBS = {
    "full": (2048, 5632, 16, 16, 32000, 64, 256),
    "tiny": (64, 172, 2, 4, 256, 8, 32),
}
STREAMED = {
    "full": (4096, 11008, 32, 32, 32000, 512, 512),
    "tiny": (64, 172, 3, 4, 256, 8, 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=sorted(JOBS), default="full")
    parser.add_argument("--seconds", type=float, default=470.0, help="for all parts together")
    parser.add_argument("--samples", type=int, default=None, help="of the streamed model")
    parser.add_argument("--part", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        kind, _, how = arguments.part.partition("/")
        print(json.dumps({"correct": correct, "job": job, "kept": kept, "streamed": streamed}[kind](how, arguments)))
        return
    holds = HOLDS if arguments.device != "cpu" else HOLDS[1:]
    parts = [f"correct/{hold}" for hold in holds] + [f"job/{hold}" for hold in holds]
    parts += ["kept/auto", f"streamed/{holds[0]}"]
    deadline, lines = time.monotonic() + arguments.seconds, []
    for part in parts:
        left = deadline - time.monotonic()
        lines.append((part, _run(part, arguments, left) if left > 10 else {"left out": "no time"}))
        print(_line(*lines[-1]), flush=True)
    print("\nall parts, best first")
    for part, found in sorted(lines, key=lambda line: (line[0].split("/")[0], line[1].get("ratio", 1e9))):
        print(_line(part, found))


def _run(part: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    options = [f"--{name}={value}" for name, value in vars(arguments).items() if value is not None and name != "part"]
    command = [sys.executable, "-m", "benchmarks.gpu", *options, f"--part={part}"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"cut off": f"after {seconds:.0f} s"}
    if ended.returncode:
        return {"failed": (ended.stderr.strip().splitlines() or [str(ended.returncode)])[-1][:300]}
    return json.loads(ended.stdout.strip().splitlines()[-1])


def _line(part: str, found: dict[str, Any]) -> str:
    return f"{part:16s} " + "  ".join(f"{name} {value}" for name, value in found.items())


def correct(hold: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compare spectra on the device with those of float64 on the CPU."""
    from factored_models import MODELS

    errors = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, data) in MODELS.items():
            exact = _collected(make().double(), data(), Path(folder) / f"{name}-cpu", "disk", dtype_compute="float64")
            model = make().to(arguments.device)
            found = _collected(model, data(), Path(folder) / name, hold, device=arguments.device)
            pairs = [run.spectrum("none").blocks["global"].eigenvalues for run in (exact, found)]
            errors[name] = float(abs(pairs[1] - pairs[0]).max() / pairs[0].max())
    return {"largest error": f"{max(errors.values()):.1e}", **{name: f"{error:.1e}" for name, error in errors.items()}}


def _collected(model: torch.nn.Module, samples: Any, path: Path, hold: str, **options: Any) -> sf.Run:
    config = sf.SpectralConfig(**{"hold": hold, "keep_gradients": "none", "device": "cpu", "chunk_size": 4} | options)
    return sf.collect(model, samples, path, config=config)


def job(hold: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the whole job beside a plain pass."""
    return _timed(JOBS[arguments.scale], hold, arguments, stream="none")


def streamed(hold: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the whole job of a large model, layer by layer."""
    return _timed(STREAMED[arguments.scale], hold, arguments, stream="layers", samples=arguments.samples)


def kept(hold: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time collecting with all gradients kept beside writing as many bytes, both into the folder of temporary files."""
    from benchmarks.kept_gradients import files_of, write_raw

    model, ids = _model(JOBS[arguments.scale], arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        options = sf.SpectralConfig(hold=hold, keep_gradients="all", device=arguments.device, batch_tokens=8192)
        start = time.perf_counter()
        run = sf.collect(model, {"input_ids": ids}, path, config=options)
        collected = time.perf_counter() - start
        size = sum(file.stat().st_size for file in files_of(path))
        shutil.rmtree(path)
        start = time.perf_counter()
        write_raw(Path(folder) / "raw", size)
        raw = time.perf_counter() - start
    layout = run.manifest.layout
    return {
        "ratio": round(collected / raw, 2),
        "collect": f"{collected:.1f} s",
        "raw": f"{raw:.1f} s",
        "bytes": f"{size / 1e9:.2f} GB",
        "codec": layout["codec"],
        "held too": layout["copy"],
    }


def _model(
    sizes: tuple[int, ...], arguments: argparse.Namespace, samples: int | None = None
) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a Llama of random weights on the device, and token ids of random samples."""
    import transformers

    hidden, intermediate, layers, heads, vocabulary, n, length = sizes
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        dtype="bfloat16" if arguments.scale == "full" else "float32",
    )
    with torch.device(arguments.device):
        model = transformers.LlamaForCausalLM._from_config(config).eval()
    ids = torch.randint(0, vocabulary, (samples or n, length), generator=torch.Generator().manual_seed(1))
    return model, ids


def _timed(
    sizes: tuple[int, ...], hold: str, arguments: argparse.Namespace, *, stream: str, samples: int | None = None
) -> dict[str, Any]:
    model, ids = _model(sizes, arguments, samples)
    on_cuda = arguments.device.startswith("cuda")
    plain = min(_plain(model, ids, arguments.device) for _ in range(2))
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        options = sf.SpectralConfig(
            hold=hold, keep_gradients="none", device=arguments.device, stream=stream, batch_tokens=8192
        )
        start = time.perf_counter()
        run = sf.collect(model, {"input_ids": ids}, Path(folder) / "run.zarr", config=options)
        collected = time.perf_counter() - start
        for structure in ("none", "layer"):
            run.spectrum(structure)
        seconds = time.perf_counter() - start
        waves = len(run.store.waves)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_cuda else 0.0
    return {
        "ratio": round(seconds / plain, 2),
        "plain": f"{plain:.2f} s",
        "job": f"{seconds:.1f} s",
        "collect": f"{collected:.1f} s",
        "waves": waves,
        "peak": f"{peak:.1f} GB",
    }


def _plain(model: torch.nn.Module, ids: torch.Tensor, device: str) -> float:
    """Return the seconds of forward and backward of all samples, with weight gradients."""
    start = time.perf_counter()
    for batch in ids.split(max(8192 // ids.shape[1], 1)):
        batch = batch.to(device)
        logits = model(input_ids=batch).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits.float(), batch[:, 1:].flatten(), reduction="sum").backward()
        model.zero_grad()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
