"""`RUN.zarr/log.jsonl`: what happened to a run, when, on which rank, for whoever looks the next morning.

One JSON object per line, appended whole by every process that writes the run:

    {"time": "2025-03-01T02:17:05.113+00:00", "rank": 0, "pid": 4711, "stage": "gradients", "event": "unit", ...}

It is for people, and no result depends on it: a log that cannot be written does not stop the run.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.own_files import open_own
from streamfisher.runtime.remote_path import RemotePath

_open: list[RunLog] = []  # the logs of this process, the innermost last
_lock = threading.Lock()


class RunLog:
    """The log of one stage of work; a context manager that notes start, end, warnings, and what ended it early.

    Args:
        run: the run's folder; the lock is held.
        stage: what is being done: 'collect', 'grams' or 'analysis'.
        rank: of this process.
        facts: of the start, plain JSON values.
    """

    def __init__(self, run: Path, stage: str, rank: int = 0, **facts: Any):
        self.path, self.stage, self.rank, self.facts = run / "log.jsonl", stage, rank, facts
        self._file: int | None = None
        self._show: Any = None
        self._started = time.monotonic()

    def __enter__(self) -> RunLog:
        try:
            self._file = open_own(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except (OSError, CorruptRunError) as error:  # it is not there to stop a run; what ails the disk will
            warnings.warn(f"{self.path} cannot be written: {error}", stacklevel=2)
        with _lock:
            _open.append(self)
        self._show = warnings.showwarning
        warnings.showwarning = self._warned  # type: ignore[assignment]  # takes whatever more there is
        self.write("start", **self.facts)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        if error is None:
            self.write("end", seconds=seconds)
        else:
            frames = traceback.extract_tb(trace)[-3:]
            where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
            name = type(error).__name__
            self.write("failed", seconds=seconds, error=name, message=str(error)[:2000], where=where)
        warnings.showwarning = self._show
        with _lock:
            _open.remove(self)
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def write(self, event: str, *, stage: str | None = None, **facts: Any) -> None:
        """Append one line."""
        if self._file is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "rank": self.rank, "pid": os.getpid(), "stage": stage or self.stage, "event": event}
        data = json.dumps({**line, **facts}, default=str) + "\n"
        try:
            os.write(self._file, data.encode())
        except OSError as error:
            os.close(self._file)
            self._file = None
            warnings.warn(f"{self.path} cannot be written any more: {error}", stacklevel=2)

    def _warned(self, message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        self.write("warning", message=str(message)[:2000], where=f"{Path(filename).name}:{lineno}")
        self._show(message, category, filename, lineno, *more)


def event(name: str, *, stage: str | None = None, **facts: Any) -> None:
    """Append a line to the log that is open in this process; nothing where none is."""
    with _lock:
        log = _open[-1] if _open else None
    if log is not None:
        log.write(name, stage=stage, **facts)


def read_log(run: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Return the lines from `offset` bytes on that are whole and make sense, and where they end."""
    try:
        if isinstance(run, RemotePath):
            data = (run / "log.jsonl").read(1 << 30)[offset:]
        else:
            with os.fdopen(open_own(run / "log.jsonl", os.O_RDONLY), "rb") as file:
                file.seek(offset)
                data = file.read(64 << 20)
    except OSError:
        return [], offset
    whole = data[: data.rfind(b"\n") + 1]
    return list(_parsed(whole)), offset + len(whole)


def _parsed(data: bytes) -> Iterator[dict[str, Any]]:
    for line in data.splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue  # a line that a full disk cut short
        if isinstance(content, dict):
            yield content
