"""Signals that ask a run to stop: what is in flight is finished and marked, then the process exits with 128 + signal.

| signal  | who sends it                                   | exit code |
|---------|------------------------------------------------|-----------|
| SIGINT  | Ctrl-C                                         | 130       |
| SIGTERM | a scheduler before it kills, a launcher        | 143       |
| SIGUSR1 | a scheduler's early warning (`--signal=USR1@`) | 138       |

A second SIGINT does not wait, nor does the first where no unit is in flight yet. On the command line an interrupt
always ends the process: one that a library's code swallows, or that waits for a long call, does so after a few seconds.
What is finished is kept then too, as after a kill.
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
        self.is_heeded = False  # somebody looks at it between units; before, nothing is in flight

    def set(self, number: int, _frame: FrameType | None = None) -> None:
        """Remember the signal; SIGINT raises at once where nobody looks at requests yet, and the second time."""
        if number == signal.SIGINT and (self.signal == number or not self.is_heeded):
            raise KeyboardInterrupt
        self.signal = number
        if number == signal.SIGINT:
            _say("finishing what is in flight. Ctrl-C again stops at once.")


@contextmanager
def finishing_first() -> Iterator[StopRequest]:
    """Turn the stopping signals into a request that the block looks at between two units of work.

    Outside the main thread, where Python lets nobody handle signals, they keep their handlers.
    """
    request = StopRequest()
    with _handlers(request.set), _Watch.patient_with(request):
        yield request


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Turn SIGTERM and SIGUSR1 into `StoppedError` in the main thread, as SIGINT is turned into `KeyboardInterrupt`."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else StoppedError(number)

    with _handlers(stop), _Watch.over_interrupts():
        yield


def _say(text: str) -> None:
    os.write(2, f"streamfisher: {text}\n".encode())  # `print` in a handler may meet itself


class _Watch:
    """Sees each SIGINT as it comes, whatever the main thread is doing, and ends a process that does not heed it.

    Python's own handlers run in the main thread between two steps of its code, and what they raise can be lost.
    """

    #: Seconds from an interrupt to the end of the process, if the command has not ended by itself.
    grace = 5.0
    _current: _Watch | None = None

    def __init__(self) -> None:
        self.request: StopRequest | None = None  # who is asked first, and how often it was
        self.asked = 0
        self._left = threading.Event()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    @classmethod
    @contextmanager
    def over_interrupts(cls) -> Iterator[None]:
        """Watch while a command runs, in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        watch, outer = cls(), cls._current
        before = signal.set_wakeup_fd(watch._writer, warn_on_full_buffer=False)
        threading.Thread(target=watch._look, daemon=True, name="interrupts").start()
        cls._current = watch
        try:
            yield
        finally:
            cls._current = outer
            watch._left.set()
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
            os.close(watch._writer)  # ends the thread

    @classmethod
    @contextmanager
    def patient_with(cls, request: StopRequest) -> Iterator[None]:
        """Let a request to stop have the first SIGINT for itself."""
        watch = cls._current
        if watch is None:
            yield
            return
        watch.request, watch.asked = request, 0
        try:
            yield
        finally:
            watch.request = None

    def _look(self) -> None:
        with os.fdopen(self._reader, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] == signal.SIGINT and not self._is_patient() and not self._left.wait(self.grace):
                    _say("interrupted, and something did not let go. The same command goes on where it stopped.")
                    os._exit(128 + signal.SIGINT)

    def _is_patient(self) -> bool:
        self.asked += 1
        return self.request is not None and self.request.is_heeded and self.asked == 1


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
