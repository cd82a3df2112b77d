"""Peak memory of a run against the number of samples: it must not grow while N does.

    python tests/benchmarks/memory_flat.py

Each size runs in a process of its own; the figure is that process's peak resident set. The only part that grows is the
N x N Gram (8 N^2 bytes per worker and fold), which is printed beside it, and what the data itself takes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def measure(n_samples: int, width: int) -> dict[str, float]:
    """Run collect, Grams and spectrum on `n_samples` in this process; return its peaks in MB."""
    import torch

    import streamfisher as sf

    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width) for _ in range(8)]
    model = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.Tanh())])
    batch = {"input_ids": torch.randn(n_samples, width), "labels": torch.randn(n_samples, width)}

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    start = peak()
    with tempfile.TemporaryDirectory() as folder:
        config = sf.SpectralConfig(chunk_size=16, n_workers=2, memory_budget="400MB")
        run = sf.collect(model, batch, Path(folder) / "run.zarr", config=config)
        collected = peak()
        run.spectrum("layer")
        size = run.info()["bytes_on_disk"] / 1e6
    return {"start": start, "collected": collected, "reduced": peak(), "stored": size, "gram": 8 * n_samples**2 / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument(
        "--width", type=int, default=512, help="of the 8 square layers (default: 2.1 million parameters)"
    )
    parser.add_argument("--one", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.width)))
        return
    print("samples  stored MB  one Gram MB  peak at start MB  after collecting MB  after the spectrum MB")
    for n_samples in arguments.samples:
        command = [sys.executable, __file__, "--one", str(n_samples), "--width", str(arguments.width)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{n_samples:7d}  {found['stored']:9.0f}  {found['gram']:11.1f}  {found['start']:16.0f}  "
            f"{found['collected']:19.0f}  {found['reduced']:21.0f}"
        )


if __name__ == "__main__":
    main()
