"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from streamfisher.errors import ConfigError


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder in place of a leading `~`; as it is where nobody has that name.

    Raises:
        ConfigError: no file can have that name.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"the path {str(path)!r:.200} holds a null character, which no file's name does.")
    try:
        return path.expanduser()
    except RuntimeError:
        return path
