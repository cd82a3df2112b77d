"""Runs as processes of their own: one, or several ranks under torchrun."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
OPTIONS = ["--chunk-size", "2", "--blocks", "layer,none", "--deterministic", "--workers", "1", "--quiet"]


def command(out, model="slow", data="thirty_vectors", *options):
    where = [f"rank_models:{model}", f"rank_models:{data}", "--out", str(out)]
    return ["-m", "streamfisher", "run", *where, *OPTIONS, *options]


def environment(**extra):
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **extra}


def free_port():
    """Return a port that nothing listens on, below those that the system gives to connections going out."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
        return port


def launch(count, arguments, **extra):
    """Start the command on `count` ranks."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", str(free_port())]
    launcher = [] if count == 1 else torchrun
    return subprocess.Popen(
        [sys.executable, *launcher, *arguments],
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return printed


def markers(out):
    return len(list((out / "done").glob("rows-*.json"))) if (out / "done").is_dir() else 0


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def bytes_of(out):
    files = [
        path
        for part in ("gradients", "packed", "samples", "gram")
        for path in (out / part).rglob("c/*")
        if path.is_file()
    ]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files}
    return found | {"spectrum.json": (out / "spectrum.json").read_bytes()}


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
