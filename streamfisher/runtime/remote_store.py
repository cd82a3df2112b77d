"""The objects below a URL: listed once and read when they are asked for, through fsspec.

Object stores have no folders, links or devices, and no calls are cheap: a request takes some tens of milliseconds. So
names and sizes come from listings, which are kept, small files that are read one after the other come along with the
first of them, and everything that can goes in one batch. What is seen is the state of when it was first looked at.
"""

from __future__ import annotations

import contextlib
import functools
import posixpath
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from streamfisher.errors import CorruptRunError, RemoteError, first_line
from streamfisher.runtime.remote_filesystem import answering, filesystem_of

#: Folders that are listed with all that is below them: how deep they lie, by the first part of their names.
_WHOLE = dict.fromkeys(("done", "gram", "gram_mean", "moment", "samples", "fields", "mean"), 1)
_WHOLE |= dict.fromkeys(("gradients", "mean_parts", "eigenvectors"), 2) | {"factors": 3}
#: Bytes of a file that is read along with others of its kind, how many are, and bytes that are kept in all.
_SMALL, _ALONG, _KEPT = 64 << 10, 512, 64 << 20
#: Bytes that are read before they are asked for, at most, and how many files at a time.
_AHEAD, _AT_A_TIME = 64 << 20, 16
#: Bytes of a CRC-32C, at the end of every chunk.
_END = 4


class RemoteStore:
    """What lies below a URL.

    Args:
        url: of the folder, without a slash at the end.

    Raises:
        MissingExtraError: fsspec, or what this kind of store takes, is not installed.
        RemoteError: there is no such kind of store.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.filesystem, self.root = filesystem_of(self.url)
        self._lock = threading.RLock()
        self._folders: dict[str, dict[str, int | None]] = {}  # folder -> name -> bytes, or None: a folder
        self._whole: set[str] = set()  # folders that are listed with all that is below them
        self._small: dict[str, bytes] = {}
        self._ends: dict[str, bytes] = {}  # key -> its last bytes
        self._expected: dict[str, Future[bytes] | None] = {}  # what is read ahead, in the order of being asked for

    def sizes(self, folder: str) -> dict[str, int | None]:
        """Return the names in a folder with their bytes; `None` is a folder. Empty where there is no such folder."""
        with self._lock:
            if folder not in self._folders and not self._covered(folder):
                whole = _whole_above(folder)
                if whole is None:
                    self._list(folder)
                else:
                    self._list_whole(whole)
            return self._folders.get(folder, {})

    def size(self, key: str) -> int | None:
        """Return the bytes of a file; `None` where there is none of that name."""
        folder, name = posixpath.split(key)
        return self.sizes(folder).get(name)

    def is_folder(self, key: str) -> bool:
        """Return whether anything is below that name."""
        folder, name = posixpath.split(key)
        return bool(self.sizes("")) if not key else self.sizes(folder).get(name, 0) is None

    def below(self, folder: str) -> list[str]:
        """Return all files below a folder, by the parts of their names."""
        with self._lock:
            if not self._covered(folder):
                self._list_whole(_whole_above(folder) or folder)
            found: list[str] = []
            folders = [folder]
            while folders:
                here = folders.pop()
                for name, size in self._folders.get(here, {}).items():
                    (folders if size is None else found).append(posixpath.join(here, name))
        return sorted(found, key=lambda key: key.split("/"))

    def read(self, key: str, largest: int) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: there is none of that name.
            IsADirectoryError: it is a folder.
            CorruptRunError: it has more than `largest` bytes.
            RemoteError: the store does not answer, or the file is another one since it was listed.
        """
        size = self.size(key)
        if size is None:
            kind = IsADirectoryError if self.is_folder(key) else FileNotFoundError
            raise kind(f"{self.url}/{key}")
        if size > largest:
            raise CorruptRunError(f"{self.url}/{key} has {size:,} bytes, more than any run of this size.")
        if key in self._expected:
            return self._read_expected(key, size)
        if size > _SMALL or (not key.endswith(".json") and not key.startswith("samples/")):
            return self._read(key, size)
        with self._lock:
            if key not in self._small:
                self._read_along(key)
            return self._small[key] if key in self._small else self._read(key, size)

    def read_sized(self, key: str, size: int) -> bytes:
        """Return the content of a file whose bytes are known without a listing."""
        return self._read(key, size)

    def end_sized(self, key: str, size: int) -> bytes:
        """Return the last 4 bytes of such a file."""
        with answering(self._url(key)):
            content: bytes = self.filesystem.cat_file(self._place(key), start=max(size - _END, 0), end=size)
        self._require_size(key, min(size, _END), content)
        return content

    def expect(self, keys: Iterable[str]) -> None:
        """Read files ahead from the first one that is asked for on, in this order; each once."""
        with self._lock:
            self._expected = {key: None for key in keys if self.size(key) is not None}

    def ends(self, keys: Sequence[str]) -> list[bytes]:
        """Return the last 4 bytes of chunks, which are their checksums.

        Those of all chunks of an array come at once: whoever looks at one unit looks at the others.

        Raises:
            FileNotFoundError: there is none of that name.
            RemoteError: the store does not answer, or a file is another one since it was listed.
        """
        with self._lock:
            missing = {other for key in keys if key not in self._ends for other in (key, *self._of_array(key))}
            sizes = {key: self.size(key) or 0 for key in sorted(missing - self._ends.keys())}
            starts = [max(size - _END, 0) for size in sizes.values()]
            for key, content in zip(sizes, self._ranges(list(sizes), starts, list(sizes.values())), strict=True):
                if isinstance(content, bytes):
                    self._require_size(key, min(sizes[key], _END), content)
                    self._ends[key] = content
                elif key in keys:
                    with answering(self._url(key)):
                        raise content
            return [self._ends[key] for key in keys]

    def forget(self) -> None:
        """Look at everything anew from now on."""
        with self._lock:
            for known in (self._folders, self._whole, self._small, self._ends, self._expected):
                known.clear()

    def _of_array(self, key: str) -> list[str]:
        array, chunk, _ = key.partition("/c/")
        return self.below(f"{array}/c") if chunk else []

    def _read_expected(self, key: str, size: int) -> bytes:
        """Return the content of a file that was to be read ahead, and let those after it be read meanwhile."""
        with self._lock:
            ahead, future = 0, None
            for other in list(self._expected):
                ahead += self.size(other) or 0
                if ahead > _AHEAD and other != key:
                    break
                if self._expected[other] is None:
                    self._expected[other] = _readers().submit(self._read, other, self.size(other) or 0)
            future = self._expected.pop(key, None)
        return self._read(key, size) if future is None else future.result()

    def _covered(self, folder: str) -> bool:
        return any(folder == whole or _is_below(folder, whole) for whole in self._whole)

    def _list(self, folder: str) -> None:
        found: list[dict[str, Any]] = []
        with answering(self._url(folder)), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = self._there(lambda path: self.filesystem.ls(path, detail=True), folder)
        place = self._place(folder)
        names = {facts["name"].rstrip("/"): facts for facts in found}
        names.pop(place.rstrip("/"), None)  # a file of that name, or an object that stands for the folder
        self._folders[folder] = {
            posixpath.basename(name): None if facts["type"] == "directory" else int(facts["size"] or 0)
            for name, facts in names.items()
        }

    def _list_whole(self, folder: str) -> None:
        found: dict[str, dict[str, Any]] = {}
        with answering(self._url(folder)), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = self._there(lambda path: self.filesystem.find(path, detail=True), folder)
        start = self._place("").rstrip("/") + "/"
        self._folders.setdefault(folder, {})
        for name, facts in found.items():
            key = name.removeprefix(start)
            if not name.startswith(start) or name.endswith("/") or not _is_below(key, folder):
                continue
            size: int | None = int(facts["size"] or 0)
            while key != folder:
                key, last = posixpath.split(key)
                self._folders.setdefault(key, {})[last] = size
                size = None
        self._whole.add(folder)

    def _there(self, look: Any, folder: str) -> Any:
        try:
            return look(self._place(folder))
        except FileNotFoundError as error:
            if "bucket" in str(error) and "exist" in str(error):  # what S3 says; of a folder there is only its name
                raise RemoteError(f"{self.url}: {first_line(error)}. Make it first, or name another.") from error
            raise

    def _read(self, key: str, size: int) -> bytes:
        if not size:
            return b""
        with answering(self._url(key)):
            content: bytes = self.filesystem.cat_file(self._place(key), start=0, end=size + 1)  # or it is longer by now
        self._require_size(key, size, content)
        self._ends[key] = content[-_END:]
        return content

    def _read_along(self, key: str) -> None:
        """Read a small file and those of its kind: markers of a stage, metadata of a group's arrays, chunks of one."""
        folder, name = posixpath.split(key)
        if name == "zarr.json" and folder.count("/") == 1:
            group = posixpath.dirname(folder)
            keys = [f"{group}/{node}/{name}" for node in self.sizes(group) if f"{group}/{node}" in self._folders]
        elif "/c/" in key:
            keys = self._of_array(key)
        else:
            kind = name.split("-")[0] + "-"
            keys = [posixpath.join(folder, other) for other in self.sizes(folder) if other.startswith(kind)]
        sizes = {other: size for other in keys if (size := self.size(other)) and size <= _SMALL}
        others = [other for other in sizes if other != key and other not in self._small]
        wanted = [key, *others][:_ALONG] if sizes.get(key) else []
        while wanted and sum(map(len, self._small.values())) + sum(sizes[other] for other in wanted) > _KEPT:
            wanted.pop()
        found = self._ranges(wanted, [0] * len(wanted), [sizes[other] for other in wanted])
        for other, content in zip(wanted, found, strict=True):
            if isinstance(content, bytes) and len(content) == sizes[other]:  # else whoever asks for it is told
                self._small[other] = content

    def _ranges(self, keys: Sequence[str], starts: Sequence[int], stops: Sequence[int]) -> list[Any]:
        """Return a part of each file in one batch, or what kept it from being read."""
        if not keys:
            return []
        places = [self._place(key) for key in keys]
        with answering(self._url(keys[0])):
            found = self.filesystem.cat_ranges(places, list(starts), list(stops), on_error="return")
        return [b"" if start == stop else one for one, start, stop in zip(found, starts, stops, strict=True)]

    def _url(self, key: str) -> str:
        return f"{self.url}/{key}" if key else self.url

    def _place(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    def _require_size(self, key: str, size: int, content: bytes) -> None:
        if len(content) != size:
            raise RemoteError(
                f"{self.url}/{key} gave {len(content):,} bytes where {size:,} were listed: it was written anew, or the "
                "connection broke. Open the run again."
            )


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="streamfisher-ahead")


def _whole_above(folder: str) -> str | None:
    """Return the folder that is listed whole and that `folder` is, or is in; `None` where there is none."""
    parts = folder.split("/")
    depth = _WHOLE.get(parts[0])
    return "/".join(parts[:depth]) if depth is not None and len(parts) >= depth else None


def _is_below(key: str, folder: str) -> bool:
    return not folder or key.startswith(f"{folder}/")
