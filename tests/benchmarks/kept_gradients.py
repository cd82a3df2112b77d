"""What keeping gradients costs beside writing their bytes, and what reading them back costs beside reading the bytes.

    python tests/benchmarks/kept_gradients.py            # 3.1M parameters, 256 x 128 tokens: 3.2 GB of rows
    python tests/benchmarks/kept_gradients.py --small

Three ratios, each within one process: collecting with rows kept over the larger of computing the rows alone and writing
the same encoded bytes raw; the whole job with rows kept over the whole job with none kept and the raw writing; and the
spectrum of stored rows over reading the same files raw and one product of rows in memory. Raw is one thread that writes
files of 16 MiB without flushing them, and reads them back.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

import streamfisher as sf
from streamfisher.gradients import GradientEngine
from streamfisher.models import resolve_loss

SIZES = {
    "large": (256, 128, {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1024}),
    "small": (128, 64, {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "vocab_size": 256}),
}
PIECE = 16 << 20
PLACES = ("gradients", "packed", "factors")


def timed(call: Callable[[], object], before: Callable[[], object] = lambda: None, repeat: int = 1) -> float:
    """Return the least wall time of some repetitions."""
    times = []
    for _ in range(repeat):
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def files_of(run: Path) -> list[Path]:
    """Return the chunks of a run's gradients."""
    files = [path for place in PLACES for path in (run / place).rglob("*")]
    return [path for path in files if path.is_file() and path.name != "zarr.json"]


def write_raw(folder: Path, size: int) -> None:
    piece = np.random.default_rng(0).integers(0, 255, PIECE, dtype=np.uint8)
    folder.mkdir()
    for number, first in enumerate(range(0, size, PIECE)):
        (folder / str(number)).write_bytes(piece[: min(PIECE, size - first)].data)


def read_raw(files: list[Path]) -> None:
    buffer = bytearray(max(path.stat().st_size for path in files))
    for path in files:
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--codec", default="auto", help="of the stored chunks (default: %(default)s)")
    parser.add_argument("--direct-io", default="auto", help="write past the page cache (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk that is meant (default: for temporary files)")
    arguments = parser.parse_args()
    n, length, sizes = SIZES["small" if arguments.small else "large"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=4, max_position_embeddings=length, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, sizes["vocab_size"], (n, length), generator=torch.Generator().manual_seed(1))
    data = {"input_ids": ids}
    per_batch = 4096 // length
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, {n} x {length} tokens, {torch.get_num_threads()} threads")
    structures = ("none", "layer", "module")
    kept = sf.SpectralConfig(
        keep_gradients=("*",), representation="dense", codec=arguments.codec, direct_io=arguments.direct_io
    )

    def compute() -> None:
        loss = resolve_loss(model, {"input_ids": ids[:2]})
        with GradientEngine(model, loss) as engine:
            engine.probe({"input_ids": ids[:2]})
            out = engine.allocate(per_batch)
            for batch in ids.split(per_batch):
                engine.rows({"input_ids": batch}, {name: values[: len(batch)] for name, values in out.items()})

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        path = folder / "kept.zarr"

        def fresh(*paths: Path) -> Callable[[], None]:
            def clear() -> None:
                for one in paths:
                    shutil.rmtree(one, ignore_errors=True)

            return clear

        def spectra(run: sf.Run) -> None:
            for structure in structures:
                run.spectrum(structure)

        def job(path: Path, config: sf.SpectralConfig) -> None:
            spectra(sf.collect(model, data, path, config=config))

        repeat = arguments.repeat
        times = {"computing alone": timed(compute, repeat=repeat)}
        times["collect, kept"] = timed(lambda: sf.collect(model, data, path, config=kept), fresh(path), repeat)
        files = files_of(path)
        size = sum(file.stat().st_size for file in files)
        codec = sf.open_run(path).store.manifest.layout["codec"]
        times["raw writing"] = timed(lambda: write_raw(folder / "raw", size), fresh(folder / "raw"), repeat)
        fresh(folder / "raw")()
        times["raw reading"] = timed(lambda: read_raw(files), repeat=repeat)
        rows = np.random.default_rng(0).standard_normal((n, 1 << 16), dtype=np.float32)
        parts = -(-n_parameters // rows.shape[1])
        times["one product"] = timed(lambda: [rows @ rows.T for _ in range(parts)], repeat=repeat)
        times["spectrum of stored rows"] = timed(lambda: spectra(sf.open_run(path)))
        times["whole job, kept"] = timed(lambda: job(path, kept), fresh(path), repeat)
        none = sf.SpectralConfig(keep_gradients=())
        other = folder / "none.zarr"
        times["whole job, none kept"] = timed(lambda: job(other, none), fresh(other), repeat)
    ratios = {
        "collect / larger of computing, raw writing": times["collect, kept"]
        / max(times["computing alone"], times["raw writing"]),
        "whole job kept / none kept + raw writing": times["whole job, kept"]
        / (times["whole job, none kept"] + times["raw writing"]),
        "spectrum / raw reading + product": times["spectrum of stored rows"]
        / (times["raw reading"] + times["one product"]),
    }
    print(f"{size / 1e9:.2f} GB in {len(files)} files, codec {codec}")
    for what, seconds in times.items():
        print(f"{what:28s} {seconds:8.2f} s")
    for what, ratio in ratios.items():
        print(f"{what:44s} {ratio:6.2f}")
    print(json.dumps({"times": times, "ratios": ratios, "bytes": size, "codec": codec}))


if __name__ == "__main__":
    main()
