"""Host memory of each rank while a checkpoint is loaded: whole and then sharded, and each rank its part only.

    python tests/benchmarks/sharded_loading.py --ranks 2 --layers 8

writes a Llama-shaped checkpoint in safetensors files of 100 MB to a temporary folder and loads it under torchrun, both
ways and with and without a cast. Printed is by how much the memory of a rank grew at its peak: anonymous pages, which
each rank has of its own, and all resident pages, mapped files included, which the ranks of a node share.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8, help="of 11.5 million parameters")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # a rank: folder, way, dtype
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
        return
    print(f"{arguments.ranks} ranks; MB at the peak of each")
    print(f"{'':24}{'checkpoint':>12}{'dtype':>10}{'anonymous':>24}{'resident':>24}")
    for dtype in ("float32", "bfloat16"):
        for way in ("whole, then sharded", "each rank its part"):
            found = peaks_of(arguments.ranks, way, dtype, arguments.layers)
            columns = [", ".join(f"{peak / 1e6:.0f}" for peak in peaks) for peaks in (found.anonymous, found.resident)]
            print(f"{way:24}{found.checkpoint / 1e6:12.0f}{dtype:>10}{columns[0]:>24}{columns[1]:>24}")


@dataclass(frozen=True)
class Peaks:
    """Bytes by which each rank grew at its peak."""

    checkpoint: int  # bytes of its files, in float32
    anonymous: list[int]
    resident: list[int]


def peaks_of(ranks: int, way: str, dtype: str, layers: int) -> Peaks:
    """Load a checkpoint on some ranks and return what it took."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        write(folder, layers)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        printed = subprocess.run(
            [sys.executable, *launcher, __file__, "--measure", folder, way, dtype],
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    peaks = [[int(value) for value in line.split()[1:]] for line in printed.splitlines() if line.startswith("PEAK ")]
    return Peaks(size, [peak[0] for peak in peaks], [peak[1] for peak in peaks])


def write(folder: str, layers: int) -> None:
    import torch
    import transformers

    sizes = {"hidden_size": 1024, "intermediate_size": 2432, "num_attention_heads": 8, "vocab_size": 8000}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **sizes))
    model.save_pretrained(folder, max_shard_size="100MB")


def measure(folder: str, way: str, dtype: str) -> None:
    import torch
    import torch.distributed as dist

    from streamfisher import load_model
    from streamfisher.models import shard

    importlib.import_module("transformers.models.llama.modeling_llama")  # what code takes is not counted
    dist.init_process_group("gloo")
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's own peak begins anew
    before, peaks, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peaks.append(resident().anonymous)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    whole = way.startswith("whole")
    model = load_model(folder, dtype=getattr(torch, dtype), sharded=not whole)
    model = shard(model, torch.device("cpu")) if whole else model
    done.set()
    watcher.join()
    anonymous, all_pages = max(peaks) - before.anonymous, resident().peak - before.now
    sys.stdout.write(f"PEAK {anonymous} {all_pages}\n")  # in one piece: both ranks write to one pipe
    sys.stdout.flush()
    dist.destroy_process_group()


class Resident(NamedTuple):
    """Bytes of this process."""

    anonymous: int
    now: int  # all resident pages
    peak: int  # of those, as the kernel saw it


def resident() -> Resident:
    """Return what this process has in memory."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    values = {words[0]: 1024 * int(words[1]) for words in lines if words[0] in ("RssAnon:", "VmRSS:", "VmHWM:")}
    return Resident(values["RssAnon:"], values["VmRSS:"], values["VmHWM:"])


if __name__ == "__main__":
    main()
