"""What `--fsync` costs: the same run of the demo model with and without it, in turn, each in a process of its own.

    python tests/benchmarks/fsync_cost.py

The figure is the time of `collect`, without imports and loading; the filesystem is that of `--folder`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median


def measure(folder: Path, samples: int, *, fsync: bool) -> float:
    """Collect the demo model's gradients into `folder` in this process; return the seconds it took."""
    import streamfisher as sf
    from streamfisher.demo import demo_samples, load_demo_model

    model, data = load_demo_model(), demo_samples(samples)
    start = time.perf_counter()
    sf.collect(model, data, folder / "run.zarr", config=sf.SpectralConfig(fsync=fsync))
    return time.perf_counter() - start


def _filesystem(folder: Path) -> str:
    """Return the type of the filesystem that a folder is on: the longest mount point that it lies under."""
    found = {}
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if folder.resolve().is_relative_to(point):
            found[len(point)] = kind
    return found[max(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--one", choices=["yes", "no"], default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print(measure(Path(folder), arguments.samples, fsync=arguments.one == "yes"))
        return
    seconds: dict[str, list[float]] = {"no": [], "yes": []}
    for _ in range(arguments.repeats):
        for fsync in seconds:
            command = [sys.executable, __file__, "--one", fsync, "--samples", str(arguments.samples)]
            command += ["--folder", str(arguments.folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds[fsync].append(float(done.stdout.splitlines()[-1]))
    print(f"{arguments.samples} samples on {_filesystem(arguments.folder)}")
    for fsync, found in seconds.items():
        print(
            f"fsync {fsync:3s}  " + "  ".join(f"{value:.2f} s" for value in found) + f"  median {median(found):.2f} s"
        )
    print(f"ratio of the medians: {median(seconds['yes']) / median(seconds['no']):.2f}")


if __name__ == "__main__":
    main()
