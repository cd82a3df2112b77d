"""Paths below a URL, with the part of `pathlib.Path` that reading a run takes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from streamfisher.errors import RunError
from streamfisher.runtime.remote_store import RemoteStore

# To the type checker, whatever reads a run reads it from a `Path`. At run time nothing of `Path` is here that is not
# written below, so that no name of a store is ever looked for on the local disk.
_Base: Any = Path if TYPE_CHECKING else object


class RemotePath(_Base):
    """A file or folder below a URL; paths that are made of it share what was listed.

    Args:
        store: of the URL.
        key: parts of the name, with slashes; the URL itself is empty.
    """

    def __init__(self, store: RemoteStore, key: str = "") -> None:
        self.store, self.key = store, key

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.store, f"{self.key}/{name}" if self.key else name)

    def __str__(self) -> str:
        return f"{self.store.url}/{self.key}" if self.key else self.store.url

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: Any) -> bool:
        return self.parts < other.parts

    def __reduce__(self) -> tuple[Callable[..., RemotePath], tuple[str, str]]:
        return _opened_again, (self.store.url, self.key)

    @property
    def parts(self) -> tuple[str, ...]:
        """Return what is between the slashes."""
        return tuple(part for part in str(self).split("/") if part)

    @property
    def name(self) -> str:
        """Return the last part."""
        return self.parts[-1]

    @property
    def stem(self) -> str:
        """Return the last part without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """Return the ending of the last part."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """Return the folder that this is in; of the URL, itself: nothing above it is looked at."""
        return RemotePath(self.store, self.key.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Return another name in the same folder."""
        return self.parent / name

    def relative_to(self, other: Any) -> PurePosixPath:
        """Return the parts after those of `other`.

        Raises:
            ValueError: it is not below it.
        """
        if not isinstance(other, RemotePath) or other.store.url != self.store.url:
            raise ValueError(f"{self} is not below {other}")
        return PurePosixPath(self.key).relative_to(other.key)

    def exists(self) -> bool:
        """Return whether there is a file or folder of that name."""
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        """Return whether there is a file of that name."""
        return bool(self.key) and self.store.size(self.key) is not None

    def is_dir(self) -> bool:
        """Return whether anything is below that name."""
        return self.store.is_folder(self.key)

    def stat(self) -> os.stat_result:
        """Return the size; the same numbers for as long as the listing stands.

        Raises:
            FileNotFoundError: there is no file of that name.
        """
        size = self.store.size(self.key)
        if size is None:
            raise FileNotFoundError(str(self))
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, size, 0, 0, 0))

    def iterdir(self) -> Iterator[RemotePath]:
        """Return what is in the folder."""
        return (self / name for name in self.store.sizes(self.key))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Return what is below, by a pattern for each part of the name."""
        first, _, rest = pattern.partition("/")
        for name in self.store.sizes(self.key):
            if fnmatchcase(name, first):
                yield from (self / name).glob(rest) if rest else [self / name]

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """Return the files at any depth below whose last part fits a pattern."""
        for key in self.store.below(self.key):
            if fnmatchcase(key.rpartition("/")[2], pattern):
                yield RemotePath(self.store, key)

    def read(self, largest: int) -> bytes:
        """Return the content, of at most so many bytes; see `RemoteStore.read`."""
        return self.store.read(self.key, largest)

    def unlink(self, missing_ok: bool = False) -> None:
        """Refuse to delete.

        Raises:
            RunError: always.
        """
        raise read_only(self)


def read_only(path: RemotePath) -> RunError:
    """Return the error of whoever would write below a URL."""
    return RunError(
        f"{path.store.url} is open for reading only. Give results a local file with --out, or copy the run to a local "
        "folder and change it there."
    )


def remote(url: str) -> RemotePath | Path:
    """Return the path of a URL; that of a local folder where the URL is `file://`."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return RemotePath(RemoteStore(url))


def _opened_again(url: str, key: str) -> RemotePath:
    return RemotePath(RemoteStore(url), key)
