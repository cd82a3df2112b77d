"""Files that exist whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.own_files import read_own

#: Key of the CRC-32C of everything else in a JSON object.
SEAL = "seal"
#: Bytes; markers that do not grow with the run are smaller by far. Parsed, a byte may take twenty.
LARGEST_JSON = 16 << 20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Let a file be written under another name, and take the place of `path` once it is whole.

    The name `<path>.<random>.partial` is new, and is never read; one that a kill left behind is swept by
    `sweep_partials`.

    Yields:
        Where to write.
    """
    partial = _new_partial(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the disk that failed may fail again
            partial.unlink(missing_ok=True)
        raise


def _new_partial(path: Path) -> Path:
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))  # nobody else's
    return partial


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to a temporary file, flush it to the disk, and move it into place.

    An object is sealed: it carries the checksum of its contents, so that no byte of it can change unnoticed.
    """
    with replacing(path) as partial:
        _write_sealed(partial, content)
        sync_path(partial)
    sync_path(path.parent)


def _write_sealed(path: Path, content: Any) -> None:
    if isinstance(content, dict):
        content = {**content, SEAL: _seal(content)}
    path.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def sync_path(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_filesystem(folder: Path) -> None:
    """Return when all that was written to the filesystem of `folder`, files and folders, is on the disk.

    Raises:
        OSError: the disk failed.
    """
    file = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(file):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(file)


def write_marker(path: Path, content: Any, *, fsync: bool) -> None:
    """Write a marker; with `fsync`, once everything that it stands for is on the disk."""
    if fsync:
        sync_filesystem(path.parent)
    write_json(path, content)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a marker of a batch its name."""
    partial.replace(path)


class MarkerBatch:
    """Markers that become durable together: a disk flushes many files at once about as fast as one.

    Until `commit` none of them exists; what they stand for must be written when they are added. Threads may share one.

    Args:
        fsync: at each commit, flush all that they stand for first.
    """

    #: So many are committed at once, and none waits for longer than so many seconds, unless nothing is added.
    MOST, SECONDS = 128, 2.0

    def __init__(self, *, fsync: bool) -> None:
        self.fsync = fsync
        self._lock = threading.Lock()
        self._waiting: dict[Path, Path] = {}  # marker -> where it is written
        self._since = 0.0

    def add(self, path: Path, content: Any) -> None:
        """Write a marker that will take its place at the next commit."""
        partial = _new_partial(path)
        _write_sealed(partial, content)
        with self._lock:
            if not self._waiting:
                self._since = time.monotonic()
            old = self._waiting.pop(path, None)
            if old is not None:
                old.unlink()
            self._waiting[path] = partial
            if len(self._waiting) >= self.MOST or time.monotonic() - self._since > self.SECONDS:
                self._commit()

    def commit(self) -> None:
        """Return when all markers that were added are in their place, and on the disk."""
        with self._lock:
            self._commit()

    def _commit(self) -> None:
        if not self._waiting:
            return
        folders = {path.parent for path in self._waiting}
        if self.fsync:
            for folder in folders:
                sync_filesystem(folder)
        else:
            with ThreadPoolExecutor(min(len(self._waiting), 16)) as threads:  # the journal takes them together
                list(threads.map(sync_path, self._waiting.values()))
        for path, partial in self._waiting.items():
            put_in_place(partial, path)
        self._waiting.clear()
        for folder in folders:
            sync_path(folder)


def read_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """Return the content of a JSON file of a run, without its seal.

    Args:
        path: of the file.
        largest: bytes that it may have.

    Raises:
        CorruptRunError: it is missing, cannot be parsed, was altered, or is not what a run has.
    """
    try:
        content = json.loads(read_own(path, largest).decode("utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        raise CorruptRunError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptRunError(f"{path} cannot be read: {error}") from error
    if isinstance(content, dict) and SEAL in content:
        seal = content.pop(SEAL)
        if seal != _seal(content):
            raise CorruptRunError(f"{path} is not what was written: its checksum differs.")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _seal(content: dict[str, Any]) -> int:
    return google_crc32c.value(json.dumps(content, sort_keys=True, allow_nan=False).encode())


def sweep_partials(folder: Path) -> int:
    """Delete what interrupted writes left behind (`*.partial`); return how many files that were."""
    count = 0
    for path in folder.rglob("*.partial"):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)  # a link itself, never what it leads to
            count += 1
    return count
