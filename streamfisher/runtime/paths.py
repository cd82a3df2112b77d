"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder in place of a leading `~`; as it is where nobody has that name."""
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        return path
