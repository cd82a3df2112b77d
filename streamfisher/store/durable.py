"""Files that exist whole or not at all, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from streamfisher.errors import CorruptRunError


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON to a temporary file, flush it to the disk, and move it into place.

    The name `<path>.partial` is never read; one that a kill left behind is swept by `sweep_partials`.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except Exception:
        with contextlib.suppress(OSError):  # the disk that failed may fail again
            partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of a run.

    Raises:
        CorruptRunError: it is missing or cannot be parsed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptRunError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise CorruptRunError(f"{path} cannot be read: {error}") from error


def sweep_partials(folder: Path) -> int:
    """Delete what interrupted writes left behind (`*.partial`); return how many files that were."""
    count = 0
    for path in folder.rglob("*.partial"):
        path.unlink(missing_ok=True)
        count += 1
    return count
