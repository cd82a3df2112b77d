"""Modes of torch that the caller is in, and that would change what a gradient is: left, or refused."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from streamfisher.errors import ConfigError
from streamfisher.runtime.determinism import one_thread
from streamfisher.runtime.threads import is_forked


@contextmanager
def modes_of_its_own() -> Iterator[None]:
    """Leave inference mode and `no_grad` inside, and use one thread in a forked process; usable as a decorator.

    Raises:
        ConfigError: the caller is under autocast or has made meta the default device, which cannot be left without
            computing something else than what was asked for.
    """
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise ConfigError(
                f"torch.autocast({device!r}) is on: the rows would be gradients of two arithmetics at once. Call this "
                "outside of it; dtype_model='bfloat16' takes the model in half width throughout."
            )
    if torch.get_default_device().type == "meta":
        raise ConfigError("The default device is 'meta', where nothing has values. Set it back before collecting.")
    alone = is_forked() and torch.get_num_threads() > 1
    if alone:
        warnings.warn(
            "this process was forked, and the threads of OpenMP were not: torch works with one thread here. A process "
            "that is spawned has all of them.",
            stacklevel=3,
        )
    with torch.inference_mode(False), torch.enable_grad(), one_thread(alone):
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """Hand back the random generators of Python, numpy and torch, on all devices, as they came."""
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Leave autocast, where a training loop is inside of it: gradients are then of the model's own arithmetic."""
    with contextlib.ExitStack() as left:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                left.enter_context(torch.autocast(device, enabled=False))
        yield
