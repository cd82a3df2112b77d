"""The reduction on a real Dask cluster gives the bits of the threads, also when a worker is killed."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import cli
from tiny_models import TinyRegression, vectors

import streamfisher as sf
from streamfisher.errors import ConfigError
from streamfisher.reduction import NumpySum, TorchSum, build_grams, folds, panel_sum
from streamfisher.reduction.products import complete
from streamfisher.runtime import dask_client
from streamfisher.sinks import MemoryRows
from streamfisher.store import PANEL

TESTS = Path(__file__).parents[1]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.parametrize("known", [0, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-14), (np.float32, 1e-5)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_torch_products_are_numpys_to_rounding(known, dtype, tolerance, scale):
    generator = np.random.default_rng(1)
    rows = (scale * generator.standard_normal((12, 300))).astype(dtype)
    sums = [NumpySum(12, known), TorchSum(12, known, torch.device("cpu"))]
    for one in sums:
        one.add(rows[:, :200])
        one.add(rows[:, 200:])
    wide = rows.astype(np.float64)
    expected = (wide @ wide.T)[known:]
    for one in sums:
        result = one.result()
        assert result.dtype == np.float64
        assert np.abs(result - expected).max() <= tolerance * np.abs(expected).max()
        assert np.array_equal(result[:, known:], result[:, known:].T)


def test_new_rows_and_the_known_part_make_the_whole():
    rows = np.random.default_rng(2).standard_normal((9, 40))
    whole = rows @ rows.T
    assert np.array_equal(complete(whole[4:], whole[:4, :4]), np.tril(whole) + np.tril(whole, -1).T)


def test_grams_by_torch_end_to_end(monkeypatch):
    rows = {"p": np.random.default_rng(3).standard_normal((10, 20 * PANEL)).astype(np.float32)}
    config = sf.SpectralConfig(n_workers=2)
    (expected,) = build_grams(MemoryRows(rows), config, lambda gram: gram)
    monkeypatch.setattr(folds, "panel_sum", lambda n, known, device: TorchSum(n, known, torch.device("cpu")))
    (found,) = build_grams(MemoryRows(rows), config, lambda gram: gram)
    np.testing.assert_allclose(found.gram, expected.gram, atol=1e-6 * expected.gram.max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_products_without_cuda_are_refused_and_auto_takes_numpy():
    with pytest.raises(ConfigError, match=r"gram_device='cuda': this process sees no CUDA device"):
        panel_sum(4, 0, "cuda")
    assert isinstance(panel_sum(4, 0, "auto"), NumpySum)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_products_on_cuda_are_numpys_to_rounding():
    rows = np.random.default_rng(1).standard_normal((64, PANEL)).astype(np.float32)
    one = panel_sum(64, 0, "cuda")
    one.add(rows)
    np.testing.assert_allclose(one.result(), rows.astype(np.float64) @ rows.T, atol=1e-5 * PANEL)


def test_a_scheduler_that_does_not_answer_is_named():
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(ConfigError, match=f"--dask-scheduler {address}: no scheduler answered within 1 s"):
        dask_client(address, timeout=1).__enter__()
    with pytest.raises(ConfigError, match=r"--dask-scheduler nonsense://x: no scheduler answered"):
        dask_client("nonsense://x", timeout=1).__enter__()


@contextlib.contextmanager
def cluster(n_workers, folder):
    """A scheduler and workers as processes of their own, on loopback."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment, "cwd": folder}
    dask = [sys.executable, "-m", "dask"]
    listen = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--dashboard-address", ":0"]
    scheduler = subprocess.Popen([*dask, "scheduler", *listen], **options)
    plain = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--dashboard-address", ":0", "--host", "127.0.0.1"]
    workers = [subprocess.Popen([*dask, "worker", address, *plain], **options) for _ in range(n_workers)]
    try:
        yield address, workers
    finally:
        for process in [*workers, scheduler]:
            process.terminate()
        for process in [*workers, scheduler]:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def small_run(path):
    config = sf.SpectralConfig(chunk_size=4, n_workers=1, use_deterministic=True)
    return sf.collect(TinyRegression(), vectors(22), path, config=config)


@pytest.mark.slow
@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_cluster_gives_the_bits_of_the_threads(n_workers, tmp_path):
    run = small_run(tmp_path / "run")
    run.build_grams()
    expected = {name: run.gram(name).tobytes() for name in run.parameters}
    with cluster(n_workers, tmp_path) as (address, _):
        assert cli("gram", run.path, "--rebuild", "--dask-scheduler", address, "--quiet") == 0
        assert cli("spectrum", run.path, "--dask-scheduler", address, "--quiet") == 0
    assert {name: run.gram(name).tobytes() for name in run.parameters} == expected


class SlowRows(MemoryRows):
    """Rows that take their time, so that a worker can be killed in the middle."""

    def columns(self, name, start, stop, rows=None, *, out=None):
        time.sleep(0.1)
        return super().columns(name, start, stop)


def itself(gram):
    return gram


@pytest.mark.slow
def test_a_worker_killed_midway_changes_no_bit(tmp_path):
    generator = np.random.default_rng(5)
    rows = {f"p{i}": generator.standard_normal((20, 3 * PANEL)).astype(np.float32) for i in range(24)}
    config = sf.SpectralConfig(n_workers=1, use_deterministic=True, dtype_gram="float64")
    expected = {found.name: found.gram for found in build_grams(MemoryRows(rows), config, itself)}
    with cluster(2, tmp_path) as (address, workers), dask_client(address):
        import distributed

        client = distributed.default_client()
        client.wait_for_workers(2, timeout=30)
        threading.Timer(1.5, lambda: workers[0].send_signal(signal.SIGKILL)).start()
        found = build_grams(SlowRows(rows), config, itself)
        assert workers[0].poll() is not None, "killed while the Grams were built"
        assert len(client.scheduler_info()["workers"]) == 1
    for gram in found:
        assert np.array_equal(gram.gram, expected[gram.name])
