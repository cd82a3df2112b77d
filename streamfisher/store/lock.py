"""One writer per run: an advisory lock that the kernel releases when its holder dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from streamfisher.errors import RunError


class RunLock:
    """Hold `RUN.zarr/lock` while writing.

    `flock` is released by the kernel with the process, so a killed run leaves no stale lock behind. On filesystems that
    do not carry locks between hosts it protects against a second run on the same host only.

    Raises:
        RunError: another process holds it; the message names host and process.
    """

    def __init__(self, run: Path):
        self.path = run / "lock"
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._holder()
            os.close(self._file)
            self._file = None
            raise RunError(f"{self.path.parent} is being written by {holder}; wait for it or stop it.") from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _holder(self) -> str:
        try:
            holder = json.loads(self.path.read_text())
            return f"process {holder['pid']} on {holder['host']}"
        except (OSError, ValueError, KeyError):
            return "another process"
