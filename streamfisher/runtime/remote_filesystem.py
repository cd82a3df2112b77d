"""Stores that fsspec knows, by their URLs: how they are opened, and what is said where they do not answer."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from streamfisher.errors import MissingExtraError, RemoteError, StreamfisherError, first_line, no_memory, require

#: A scheme, or a chain of them as in `simplecache::s3://bucket/run.zarr`.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
#: What kinds of store take beside fsspec; the extra brings the first.
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_url(path: object) -> bool:
    """Return whether text names a place on a store of fsspec, as `s3://bucket/run.zarr` does."""
    return isinstance(path, str) and _URL.match(path) is not None


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return the filesystem of a URL, and the path in it without a slash at the end.

    Raises:
        MissingExtraError: fsspec, or what this kind of store takes, is not installed.
        RemoteError: there is no such kind of store.
    """
    require("fsspec", "remote", f"open {url}")
    from fsspec.core import url_to_fs

    scheme = re.split("://|::", url)[0]
    try:
        filesystem, root = url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        command = "'streamfisher[remote]'" if package == "s3fs" else package or "the package that it names"
        raise MissingExtraError(
            f"{url} cannot be opened: {first_line(error)}. Install it with: pip install {command}"
        ) from error
    except Exception as error:  # every kind of store has errors of its own
        raise RemoteError(f"{url} cannot be opened: {first_line(error)}.") from error
    return filesystem, root.rstrip("/")


@contextlib.contextmanager
def answering(url: str) -> Iterator[None]:
    """Say what a store did not do as that, and never as damage of a run.

    Files that are not there, or are there already, remain what they are.

    Args:
        url: of what is asked for.

    Raises:
        RemoteError: the store does not answer, or refuses access.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, StreamfisherError):
        raise
    except PermissionError as error:
        raise RemoteError(
            f"{url}: the store refuses access ({first_line(error)}). Give credentials that have the right to it."
        ) from error
    except Exception as error:  # every kind of store has errors of its own
        if no_memory(error):
            raise
        if "credentials" in f"{type(error).__name__} {error}".lower():
            raise RemoteError(
                f"{url}: {first_line(error)}. Set them as for other programs (for S3: AWS_PROFILE, or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; FSSPEC_S3_ANON=true for a public bucket)."
            ) from error
        raise RemoteError(
            f"{url}: the store does not answer ({type(error).__name__}: {first_line(error)}). What is stored there is "
            "as it was; try again."
        ) from error
