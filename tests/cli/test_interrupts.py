"""Ctrl-C ends a command whenever it comes: while modules are imported, while it works, and where code swallows it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import time
from pathlib import Path
import torch

def model():
    Path("model.ready").touch()
    return torch.nn.Sequential(torch.nn.Embedding(256, 8), torch.nn.Linear(8, 256))

def slow():
    for n in range(100_000):
        if n == 2:
            Path("data.ready").touch()
        time.sleep(0.01)
        yield {"input_ids": torch.arange(8)}

def swallowed():
    Path("swallowed.ready").touch()
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "given.py").write_text(PROGRAM)
    started = []

    def begin(*words):
        process = subprocess.Popen(
            [sys.executable, "-m", "streamfisher", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ends(process, within):
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=within)
    return process.returncode, output


def until(path):
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5, 2.5])
def test_while_modules_are_imported(seconds, start, tmp_path):
    process = start("run", "given:model", "given:slow", "--out", "run.zarr")
    time.sleep(seconds)
    code, output = ends(process, within=20)
    assert code in (130, -signal.SIGINT), output  # -2: Python itself had hardly begun
    assert not (tmp_path / "run.zarr").exists()


def test_while_samples_are_read(start, tmp_path):
    process = start("run", "given:model", "given:slow", "--out", "run.zarr")
    until(tmp_path / "data.ready")
    code, output = ends(process, within=20)
    assert code == 130 and "goes on where it stopped" in output, output


def test_while_units_are_collected_what_is_in_flight_is_finished(start, tmp_path):
    process = start(
        "collect", "given:model", "given:slow", "--samples", "200", "--chunk-size", "2", "--out", "run.zarr"
    )
    until(tmp_path / "run.zarr/done/rows-000001.json")
    code, output = ends(process, within=30)
    assert code == 130 and "finishing what is in flight" in output, output
    assert (tmp_path / "run.zarr/done/rows-000001.json").is_file()


def test_where_code_swallows_it(start, tmp_path):
    process = start(
        "run", "given:swallowed", "given:slow", "--out", "run.zarr", "--tokenizer", "bytes", "--quiet", "--samples", "2"
    )
    until(tmp_path / "swallowed.ready")
    code, output = ends(process, within=30)
    assert code == 130 and "did not let go" in output, output
