"""One writer per run: advisory locks that the kernel releases when their holders die."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from streamfisher.errors import RunError

#: Seconds to wait for ranks that are just being killed with their launcher.
_PATIENCE = 10.0


class _FileLock:
    """An open file that carries a lock; closing it gives the lock back."""

    def __init__(self, path: Path):
        self.path = path
        self._file: int | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class RunLock(_FileLock):
    """Hold `RUN.zarr/lock` while writing; where several processes write, rank 0 holds it for them.

    `flock` is released by the kernel with the process, so a killed run leaves no stale lock behind. On filesystems that
    do not carry locks between hosts it protects against a second run on the same host only.

    The other ranks hold `RUN.zarr/lock.ranks` (see `RankLock`), and no new run starts while one of them is alive.

    Args:
        run: the run's folder.
        ranks: host and process number of each rank that writes under this lock; `None` means this process alone.

    Raises:
        RunError: another process holds it; the message names host and process.
    """

    def __init__(self, run: Path, ranks: Sequence[Mapping[str, Any]] | None = None):
        super().__init__(run / "lock")
        self.ranks = [dict(rank) for rank in ranks or [{"host": socket.gethostname(), "pid": os.getpid()}]]

    def __enter__(self) -> RunLock:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _PATIENCE
        while not (_take(self._file) and self._no_rank_left()):
            holders = self._holders()
            if len(holders) < 2 or time.monotonic() > deadline:
                os.close(self._file)
                self._file = None
                raise RunError(f"{self.path.parent} is being written by {_words(holders)}; wait for it or stop it.")
            time.sleep(0.1)
        content = {**self.ranks[0], "ranks": self.ranks}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(content).encode(), 0)
        return self

    def _no_rank_left(self) -> bool:
        """Return whether no rank of an earlier launch is alive; they may outlive their rank 0 and their launcher."""
        try:
            file = os.open(self.path.with_name("lock.ranks"), os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            return _take(file)
        finally:
            os.close(file)

    def _holders(self) -> list[dict[str, Any]]:
        try:
            content = json.loads(self.path.read_text())
            return [{"host": rank["host"], "pid": rank["pid"]} for rank in content.get("ranks", [content])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []


class RankLock(_FileLock):
    """What every rank but 0 holds while it writes: a shared lock on `RUN.zarr/lock.ranks`.

    To be entered after rank 0 has its `RunLock`.

    Raises:
        RunError: another run is being started on the folder.
    """

    def __init__(self, run: Path):
        super().__init__(run / "lock.ranks")

    def __enter__(self) -> RankLock:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _take(self._file, shared=True):
            os.close(self._file)
            self._file = None
            raise RunError(f"{self.path.parent} is being taken over by another run; stop one of the two.")
        return self


def _take(file: int, *, shared: bool = False) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _words(holders: Sequence[Mapping[str, Any]]) -> str:
    if not holders:
        return "another process"
    if len({holder["host"] for holder in holders}) == 1:
        several = "process" if len(holders) == 1 else "processes"
        return f"{several} {', '.join(str(holder['pid']) for holder in holders)} on {holders[0]['host']}"
    return ", ".join(f"process {holder['pid']} on {holder['host']}" for holder in holders)
