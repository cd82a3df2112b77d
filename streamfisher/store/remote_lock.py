"""One writer of a run on an object store: a lock that needs nothing of the store but conditional puts.

    writers/000001.json, writers/000002.json, ...

Each writer's turn has a number and an object, which is made with the condition that there is none of that name (on S3
`If-None-Match: *`); of two that try, one succeeds. The highest number holds the lock. It renews its object, which
nobody else writes, every half minute, and marks it as released in the end. Whoever comes after a released turn, or
after one that shows no sign of life, makes the next number. So a lock is taken over without comparing or replacing
what is there (`If-Match`, which fewer stores have). A holder that was taken for dead finds a higher number, and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import psutil

from streamfisher.errors import RemoteError, RunError, first_line
from streamfisher.runtime.remote_filesystem import answering, filesystem_of

#: Folder of the turns, below the run's URL.
TURNS = "writers"
#: Seconds between two signs of life; without one for so long, as seen from here, a writer is dead.
_BEAT, _STALE = 30.0, 120.0
#: Seconds since the last sign of life, by both hosts' clocks, after which it need not be watched.
_LONG_AGO = 1800.0


class RemoteLock:
    """Held while a run below a URL is written.

    Args:
        url: of the run.
        locked: take the lock; without it nothing keeps two writers apart.

    Raises:
        RunError: another process writes the run, and the message names it; or the store has no conditional puts.
        RemoteError: the store does not answer.
    """

    def __init__(self, url: str, *, locked: bool = True) -> None:
        self.url, self.locked = url.rstrip("/"), locked
        self.lost: str | None = None  # in words, once another process has taken the lock over
        self.before: str | None = None  # token of the writer before this one
        self.token = uuid.uuid4().hex
        self._record: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}
        self._record |= {"token": self.token, "beat": 0, "released": False}
        self._turn = 0
        self._seen = time.time()  # when it was looked whether this is still the last turn
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat_on, name="streamfisher-remote-lock", daemon=True)

    def __enter__(self) -> RemoteLock:
        self.filesystem, self.root = filesystem_of(self.url)
        last = self._last()
        if last:
            found = self._read(last)
            self.before = found.get("token")
            if self.locked and not self._is_over(found):
                self._watch(last, found)
        if not self.locked:
            return self
        self._turn = last + 1
        try:
            self._create(self._turn)
        except FileExistsError:
            raise self._held(self._read(self._turn)) from None
        if self._last() != self._turn:  # whoever was there meanwhile has left its turn behind
            self._remove(self._turn)
            raise self._held(self._read(self._last()))
        self._require_conditions()
        for turn in self._turns():
            if turn < self._turn:
                self._remove(turn)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.locked:
            return
        self._left.set()
        self._heart.join()
        try:
            self._look_whether_lost()
            if self.lost is None:
                self._renew(released=True)
        except RemoteError as problem:  # the next writer has to watch it for a while
            warnings.warn(f"the lock of {self.url} could not be given back: {problem}", stacklevel=2)
        if self.lost is not None and error is None:
            raise RunError(self.lost)

    def check(self) -> None:
        """Refuse to go on once another process has taken the lock over; look, where it was not looked for long.

        Raises:
            RunError: it has; the message names it.
            RemoteError: the store does not answer.
        """
        if self.locked and time.time() - self._seen > 2 * _BEAT:  # as after this machine has slept
            self._look_whether_lost()
        if self.lost is not None:
            raise RunError(self.lost)

    def _is_over(self, found: Mapping[str, Any]) -> bool:
        """Return whether a writer has left, or is known to be dead."""
        if found.get("released") or not found:
            return True
        if _is_here(found):
            return not psutil.pid_exists(_whole(found.get("pid")))
        return time.time() - _whole(found.get("time")) > _LONG_AGO

    def _watch(self, turn: int, found: Mapping[str, Any]) -> None:
        """Return once a writer on another host has shown no sign of life for long enough.

        Raises:
            RunError: it lives.
        """
        if time.time() - _whole(found.get("time")) < _STALE / 2 or _is_here(found):
            raise self._held(found)
        warnings.warn(f"{self.url} may be written by {_words(found)}; watching for {_STALE:.0f} s.", stacklevel=4)
        deadline = time.monotonic() + _STALE
        while time.monotonic() < deadline:
            time.sleep(min(5.0, _STALE / 10))
            if self._last() != turn:
                raise self._held(self._read(self._last()))
            again = self._read(turn)
            if again.get("released"):
                return
            if again.get("beat") != found.get("beat"):
                raise self._held(again)
        warnings.warn(f"{self.url}: {_words(found)} shows no sign of life; taking its turn over.", stacklevel=4)

    def _require_conditions(self) -> None:
        """Refuse a store that lets a second writer make what is there."""
        try:
            self._create(self._turn)
        except FileExistsError:
            return
        self._remove(self._turn)
        raise self._without_conditions("a second put of the same name was not refused")

    def _without_conditions(self, why: str) -> RunError:
        return RunError(
            f"{self.url}: the store has no conditional puts ({why}), so nothing would keep two runs from writing at "
            "once. Write to another store; or see to it yourself, with --no-lock."
        )

    def _held(self, found: Mapping[str, Any]) -> RunError:
        age = max(time.time() - _whole(found.get("time")), 0.0)
        return RunError(
            f"{self.url} is being written by {_words(found)}, which gave a sign of life {age:.0f} s ago; wait for it "
            f"or stop it. Should it be dead, the same command takes over {_STALE:.0f} s after the last one."
        )

    def _beat_on(self) -> None:
        while not self._left.wait(_BEAT):
            with contextlib.suppress(RemoteError):  # the next beat tries again; the upload says what ails the store
                self._look_whether_lost()
                if self.lost is not None:
                    return
                self._renew()

    def _look_whether_lost(self) -> None:
        last = self._last()
        self._seen = time.time()
        if last != self._turn and self.lost is None:
            who = _words(self._read(last)) if last else "somebody who deleted it"
            self.lost = (
                f"{self.url} was taken over by {who}, which saw no sign of life of this run. Let only one of the two "
                "go on, and then look it over with `streamfisher verify`."
            )

    def _create(self, turn: int) -> None:
        """Make the object of a turn.

        Raises:
            FileExistsError: it is there.
        """
        self._record |= {"time": int(time.time())}
        place = self._place(turn)
        try:
            with answering(f"{self.url}/{TURNS}"):
                self.filesystem.pipe_file(place, json.dumps(self._record).encode(), mode="create")
        except RemoteError as error:
            if isinstance(error.__cause__, TypeError | NotImplementedError | ValueError):
                raise self._without_conditions(first_line(error.__cause__)) from error
            raise

    def _renew(self, *, released: bool = False) -> None:
        self._record |= {"beat": self._record["beat"] + 1, "time": int(time.time()), "released": released}
        with answering(f"{self.url}/{TURNS}"):
            self.filesystem.pipe_file(self._place(self._turn), json.dumps(self._record).encode())

    def _remove(self, turn: int) -> None:
        with answering(f"{self.url}/{TURNS}"), contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(self._place(turn))

    def _turns(self) -> list[int]:
        with answering(f"{self.url}/{TURNS}"):
            try:
                self.filesystem.invalidate_cache()
                found = self.filesystem.ls(f"{self.root}/{TURNS}", detail=False)
            except FileNotFoundError:
                return []
        stems = (posixpath.basename(name).removesuffix(".json") for name in found)
        return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdecimal() and len(stem) < 12)

    def _last(self) -> int:
        return max(self._turns(), default=0)

    def _read(self, turn: int) -> dict[str, Any]:
        """Return what the object of a turn says; nothing where it is gone or makes no sense."""
        try:
            with answering(f"{self.url}/{TURNS}"):
                content = json.loads(self.filesystem.cat_file(self._place(turn), start=0, end=1 << 16))
        except (FileNotFoundError, RemoteError) as error:
            if isinstance(error, RemoteError) and not isinstance(error.__cause__, ValueError):
                raise
            return {}
        return content if isinstance(content, dict) else {}

    def _place(self, turn: int) -> str:
        return f"{self.root}/{TURNS}/{turn:06d}.json"


def _words(found: Mapping[str, Any]) -> str:
    if not {"pid", "host"} <= found.keys():
        return "another process"
    return f"process {_whole(found['pid'])} on {str(found['host'])[:100]}"


def _is_here(found: Mapping[str, Any]) -> bool:
    """Return whether a writer ran under this very kernel, whatever host name containers have."""
    return found.get("host") == socket.gethostname() and found.get("boot") == _boot()


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 62 else 0


def _boot() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123
            return file.read().strip()
    except OSError:
        return socket.gethostname()
