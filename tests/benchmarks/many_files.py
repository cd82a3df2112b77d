"""What a run of very many small files costs: factors of small layers, one array for each side, layer and unit.

    python tests/benchmarks/many_files.py               # 300 layers, 167 units: 100,000 arrays, 200,000 files

A model of 7 billion parameters has 291, so that 32 units make about 10,000 arrays of factors, most of them large. Here
there are ten times as many, all small, and what each step takes is their number's price: collecting, opening,
the Grams of all layers, `verify`, deleting. Beside it the same gradients as rows, which share arrays.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import streamfisher as sf

WIDTH, POSITIONS = 16, 4


class Layers(nn.Module):
    """Linear layers without bias, one after the other."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().sum(dim=(1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--units", type=int, default=167)
    arguments = parser.parse_args()
    n = 2 * arguments.units
    data = {"x": torch.randn(n, POSITIONS, WIDTH, generator=torch.Generator().manual_seed(1))}
    model = Layers(arguments.layers)
    for representation in ("factors", "dense"):
        print(f"{arguments.layers} layers, {arguments.units} units, as {representation}")
        with tempfile.TemporaryDirectory() as folder:
            measure(model, data, Path(folder) / "run.zarr", representation)


def measure(model: nn.Module, data: dict[str, Tensor], path: Path, representation: str) -> None:
    """Print the seconds of each step of one run."""
    options = {"keep_gradients": ("*",), "chunk_size": 2, "hold": "disk", "representation": representation}
    config = sf.SpectralConfig(**options)
    steps: list[tuple[str, Callable[[], object]]] = [
        ("collect", lambda: sf.collect(model, data, path, config=config, loss=loss)),
        ("open", lambda: sf.open_run(path)),
        ("Grams and spectrum", lambda: sf.open_run(path).spectrum("none")),
        ("verify", lambda: sf.verify(sf.open_run(path))),
    ]
    for what, step in steps:
        start = time.perf_counter()
        step()
        print(f"  {what:20s} {time.perf_counter() - start:8.2f} s", flush=True)
    files = [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    start = time.perf_counter()
    shutil.rmtree(path)
    print(f"  {'delete':20s} {time.perf_counter() - start:8.2f} s; {len(files):,} files, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
