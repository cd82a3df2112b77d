"""One writer per run: advisory locks that the kernel releases when their holders die, and a heartbeat for other hosts.

Some filesystems do not carry `flock` between hosts. So the holder also renews a counter in the lock file, and whoever
gets the lock on another host watches that counter before believing it: clocks of two hosts need not agree.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from streamfisher.errors import RunError
from streamfisher.runtime.own_files import open_own, read_own
from streamfisher.runtime.remote_path import RemotePath, read_only

#: Seconds to wait for ranks that are just being killed with their launcher.
_PATIENCE = 10.0
#: Seconds between two heartbeats; without one for so long, as seen from here, a holder on another host is dead.
_BEAT, _STALE = 30.0, 120.0
#: Seconds since the last heartbeat, by both hosts' clocks, after which it need not be watched.
_LONG_AGO = 1800.0
#: Bytes of a lock file, with a record of every rank.
_LARGEST = 16 << 20


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

    `flock` is released by the kernel with the process, so a killed run leaves no stale lock behind on its own host, nor
    where the filesystem carries locks between hosts. Elsewhere the heartbeat tells the living from the dead.

    The other ranks hold `RUN.zarr/lock.ranks` (see `RankLock`), and no new run starts while one of them is alive.

    Args:
        run: the run's folder.
        ranks: host and process number of each rank that writes under this lock; `None` means this process alone.
        on_lost: called with a message, from another thread, when a run on another host has taken the lock over because
            it did not see this one's heartbeats. Leaving the lock raises that message.

    Raises:
        RunError: another process holds it; the message names host and process.
    """

    def __init__(
        self,
        run: Path,
        ranks: Sequence[Mapping[str, Any]] | None = None,
        *,
        on_lost: Callable[[str], None] | None = None,
    ):
        if isinstance(run, RemotePath):
            raise read_only(run)
        super().__init__(run / "lock")
        self.ranks = [dict(rank) for rank in ranks or [{"host": socket.gethostname(), "pid": os.getpid()}]]
        self.lost: str | None = None
        self._on_lost = on_lost
        self._record = {**self.ranks[0], "ranks": self.ranks, "boot": _boot(), "token": uuid.uuid4().hex, "beat": 0}
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="streamfisher-lock", daemon=True)

    def __enter__(self) -> RunLock:
        self._file = open_own(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            deadline = time.monotonic() + _PATIENCE
            while not (_take(self._file) and self._no_rank_left()):
                holders = _holders(self._read())
                if len(holders) < 2 or time.monotonic() > deadline:
                    raise self._held(holders)
                time.sleep(0.1)
            self._wait_for_another_host()
            self._write()
        except BaseException:
            os.close(self._file)
            self._file = None
            raise
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._heart.is_alive():
            self._left.set()
            self._heart.join()
            self._look_whether_lost()
            try:
                if self.lost is None:
                    self._write(released=True)
            except OSError as problem:  # the next run on another host has to watch it for a while
                warnings.warn(f"{self.path} could not be marked as free: {problem}", stacklevel=2)
        super().__exit__(kind, error, traceback)
        if self.lost is not None and error is None:
            raise RunError(self.lost)

    def _held(self, holders: Sequence[Mapping[str, Any]]) -> RunError:
        return RunError(f"{self.path.parent} is being written by {_words(holders)}; wait for it or stop it.")

    def _wait_for_another_host(self) -> None:
        """Return when whoever the lock file names does not live; the lock itself is ours already.

        Raises:
            RunError: it does.
        """
        found = self._read()
        if "beat" not in found or found.get("released"):
            return
        if found.get("boot") == _boot():  # our kernel gave us the lock, so the holder is dead, if it knows of locks
            here = [rank["pid"] for rank in _holders(found) if rank["host"] == socket.gethostname()]
            if self._file is not None and not _locks_work(self._file) and any(psutil.pid_exists(pid) for pid in here):
                raise self._held(_holders(found))
            return
        age = time.time() - found["time"]
        if age < _LONG_AGO:
            who = _words(_holders(found))
            warnings.warn(f"{self.path.parent} may be written by {who}; watching for {_STALE:.0f} s.", stacklevel=3)
        deadline = time.monotonic() + (_STALE if age < _LONG_AGO else 0.0)
        while time.monotonic() < deadline:
            time.sleep(min(1.0, _STALE / 10))
            again = self._read()
            if again.get("released"):
                return
            if again and (again.get("token"), again.get("beat")) != (found["token"], found["beat"]):
                raise self._held(_holders(again))
        who = _words(_holders(found))
        warnings.warn(f"{self.path.parent}: the lock of {who} is not renewed any more; taking it over.", stacklevel=3)

    def _beat_on(self) -> None:
        pause = min(2.0, _BEAT)  # a run that started at the same moment elsewhere is seen soon
        while not self._left.wait(pause):
            pause = _BEAT
            self._look_whether_lost()
            if self.lost is not None:
                if self._on_lost is not None:
                    self._on_lost(self.lost)
                return
            try:
                self._write()
            except OSError:  # the next beat tries again; what ails the disk will stop the run itself
                continue

    def _look_whether_lost(self) -> None:
        found = self._read()
        if self.lost is None and found.get("token", self._record["token"]) != self._record["token"]:
            self.lost = (
                f"{self.path.parent} was taken over by {_words(_holders(found))}, which saw no sign of life of this "
                "run. Let only one of the two go on, and then look it over with `streamfisher verify`."
            )

    def _write(self, *, released: bool = False) -> None:
        """Renew the record in place, over all of what was there, so that a reader always finds one whole record."""
        if self._file is None:
            return
        self._record |= {"beat": self._record["beat"] + 1, "time": int(time.time()), "released": released}
        text = json.dumps(self._record).ljust(os.fstat(self._file).st_size)
        os.pwrite(self._file, text.encode(), 0)
        os.fsync(self._file)  # other hosts are to see it now

    def _read(self) -> dict[str, Any]:
        """Return what the lock file says; nothing where that makes no sense. Opened anew, as NFS asks for."""
        try:
            content = json.loads(read_own(self.path, _LARGEST))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict):
            return {}
        whole = {"time": int, "beat": int, "token": str}
        damaged = "beat" in content and not all(isinstance(content.get(key), kind) for key, kind in whole.items())
        return {} if damaged else content

    def _no_rank_left(self) -> bool:
        """Return whether no rank of an earlier launch is alive; they may outlive their rank 0 and their launcher."""
        try:
            file = open_own(self.path.with_name("lock.ranks"), os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            return _take(file)
        finally:
            os.close(file)


class RankLock(_FileLock):
    """What every rank but 0 holds while it writes: a shared lock on `RUN.zarr/lock.ranks`.

    To be entered after rank 0 has its `RunLock`.

    Raises:
        RunError: another run is being started on the folder.
    """

    def __init__(self, run: Path):
        super().__init__(run / "lock.ranks")

    def __enter__(self) -> RankLock:
        self._file = open_own(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _take(self._file, shared=True):
            os.close(self._file)
            self._file = None
            raise RunError(f"{self.path.parent} is being taken over by another run; stop one of the two.")
        return self


def _take(file: int, *, shared: bool = False) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:  # a filesystem without locks leaves it to the heartbeat
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _locks_work(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _boot() -> str:
    """Return what all processes under one kernel have in common, whatever host name their container has."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _holders(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    try:
        return [{"host": str(rank["host"]), "pid": int(rank["pid"])} for rank in content.get("ranks", [content])]
    except (KeyError, TypeError, ValueError, OverflowError):
        return []


def _words(holders: Sequence[Mapping[str, Any]]) -> str:
    if not holders:
        return "another process"
    if len({holder["host"] for holder in holders}) == 1:
        several = "process" if len(holders) == 1 else "processes"
        return f"{several} {', '.join(str(holder['pid']) for holder in holders)} on {holders[0]['host']}"
    return ", ".join(f"process {holder['pid']} on {holder['host']}" for holder in holders)
