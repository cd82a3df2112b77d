"""Files that exist whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c

from streamfisher.errors import CorruptRunError

#: Key of the CRC-32C of everything else in a JSON object.
SEAL = "seal"
#: Bytes; no manifest or marker is larger.
_LARGEST = 1 << 30


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Let a file be written under another name, and take the place of `path` once it is whole.

    The name `<path>.<pid>.partial` is never read; one that a kill left behind is swept by `sweep_partials`.

    Yields:
        Where to write.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    except Exception:
        with contextlib.suppress(OSError):  # the disk that failed may fail again
            partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to a temporary file, flush it to the disk, and move it into place.

    An object is sealed: it carries the checksum of its contents, so that no byte of it can change unnoticed.
    """
    if isinstance(content, dict):
        content = {**content, SEAL: _seal(content)}
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a run, without its seal.

    Raises:
        CorruptRunError: it is missing, cannot be parsed, was altered, or is not what a run has.
    """
    try:
        if path.is_symlink():
            raise CorruptRunError(f"{path} is a link; a run has files of its own.")
        if path.stat().st_size > _LARGEST:
            raise CorruptRunError(f"{path} has {path.stat().st_size} bytes, more than any run.")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
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
        path.unlink(missing_ok=True)
        count += 1
    return count
