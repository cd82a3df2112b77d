"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from streamfisher.errors import ConfigError
from streamfisher.runtime.remote_filesystem import is_url
from streamfisher.runtime.remote_path import RemotePath, remote


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with the home folder in place of a leading `~`; as it is where nobody has that name.

    A URL, as `s3://bucket/run.zarr`, becomes a `RemotePath`, which has the methods of paths that reading takes.

    Raises:
        ConfigError: no file can have that name.
        MissingExtraError: what this kind of URL takes is not installed.
        RemoteError: there is no such kind of store.
    """
    if isinstance(path, RemotePath):
        return path
    if is_url(path):
        return remote(os.fspath(path))
    path = Path(path)
    if "\0" in str(path):
        raise ConfigError(f"the path {str(path)!r:.200} holds a null character, which no file's name does.")
    try:
        return path.expanduser()
    except RuntimeError:
        return path
