"""Full determinism for as long as it is asked for, and the global state put back afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import threadpoolctl
import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def one_thread(enabled: bool) -> Iterator[None]:
    """Let torch and BLAS use one thread inside, where `enabled`."""
    if not enabled:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpoolctl.threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(enabled: bool, seed: int) -> Iterator[None]:
    """Seed torch for the block and, where `enabled`, allow deterministic kernels only.

    cuBLAS reads `CUBLAS_WORKSPACE_CONFIG` when CUDA starts, so it must be set before the first CUDA call of a process:
    the command line does so first of all, a Python program that has already used CUDA must set it itself.

    One thread for torch and BLAS, because how many there are decides in what order they add up: a run under a launcher,
    which gives each rank one thread, would otherwise not have the bits of a run without it.

    Restored afterwards: random generators, deterministic mode, threads, cuDNN flags, and the environment variable.

    Args:
        enabled: `use_deterministic`.
        seed: of the block's random numbers.

    Raises:
        RuntimeError: by torch, when an operation has no deterministic form.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        if not enabled:
            yield
            return
        before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            os.environ.get(_CUBLAS),
        )
        os.environ.setdefault(_CUBLAS, ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        try:
            with one_thread(True):
                yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before[2], before[3]
            if before[4] is None:
                os.environ.pop(_CUBLAS, None)
