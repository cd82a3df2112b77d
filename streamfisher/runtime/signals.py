"""Signals that ask a run to stop: what is in flight is finished and marked, then the process exits with 128 + signal.

| signal  | who sends it                                   | exit code |
|---------|------------------------------------------------|-----------|
| SIGINT  | Ctrl-C                                         | 130       |
| SIGTERM | a scheduler before it kills, a launcher        | 143       |
| SIGUSR1 | a scheduler's early warning (`--signal=USR1@`) | 138       |

A second SIGINT does not wait.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from streamfisher.errors import StoppedError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Which signal asked to stop, if one did."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def set(self, number: int, _frame: FrameType | None = None) -> None:
        """Remember the signal; a second SIGINT raises at once."""
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def finishing_first() -> Iterator[StopRequest]:
    """Turn the stopping signals into a request that the block looks at between two units of work.

    Outside the main thread, where Python lets nobody handle signals, they keep their handlers.
    """
    request = StopRequest()
    with _handlers(request.set):
        yield request


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into `StoppedError` in the main thread, as SIGINT is turned into `KeyboardInterrupt`."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else StoppedError(number)

    with _handlers(stop):
        yield


@contextmanager
def _handlers(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOPPING}  # type: ignore[arg-type]
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous if previous is not None else signal.SIG_DFL)


def die_with_launcher() -> None:
    """Let the kernel kill this process when the launcher that started it dies; on Linux, under torchrun or Accelerate.

    Killed with SIGKILL, a launcher cannot stop its ranks, and they would go on writing.
    """
    if not sys.platform.startswith("linux") or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != launcher or launcher == 1:  # it died before the call
        os._exit(128 + signal.SIGKILL)
