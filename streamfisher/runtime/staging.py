"""A run that is written below a URL: its files lie in a local folder, and are read from the store once they are freed.

The folder is a run like any other, so that everything that writes runs writes it. Chunks of gradients that are at the
store may be freed here when room is needed; whoever reads one of them gets it from there, held against the same
checksums. What is where stands in a ledger beside the folder, a line for each file that was sent, freed or deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.remote_store import RemoteStore

#: Folders whose chunks may be freed. There are too many metadata of factors to bring them all.
_FREED, _WITH_METADATA = ("gradients/", "packed/", "factors/", "gram/"), "factors/"
_staged: dict[Path, Staging] = {}  # by the folder, of this process


def may_be_freed(name: str) -> bool:
    """Return whether a file of a run is one that is read from the store where it is not here."""
    return name.startswith(_FREED) and ("/c/" in name or (name.startswith(_WITH_METADATA) and name.count("/") == 4))


class Staging:
    """The local folder of a run that is written below a URL.

    Args:
        folder: the run here.
        store: of the run's URL.
        ledger: file of what was sent; lines of an earlier process are read, one that a kill cut short is not.
    """

    def __init__(self, folder: Path, store: RemoteStore, ledger: Path) -> None:
        self.folder, self.store = folder, store
        self.sent: dict[str, tuple[int, int]] = {}  # name -> bytes and time of the file that is at the store
        self.away: dict[str, int] = {}  # name -> bytes of those that are at the store only
        self.made: Callable[[int], None] = lambda size: None  # is told of new bytes, and may wait for room
        self._below: dict[str, set[str]] = {}  # folder -> names of what is away anywhere below it
        self._lock = threading.Lock()
        for line in ledger.read_bytes().splitlines() if ledger.is_file() else ():
            try:
                entry = json.loads(line)
                name, what = str(entry["name"]), entry["facts"]
            except (ValueError, KeyError, TypeError):
                continue
            self._take(name, what)
        self._ledger = ledger.open("ab")
        self._ledger.write(b"\n")  # after what a kill left

    def __enter__(self) -> Staging:
        _staged[self.folder.absolute()] = self
        return self

    def __exit__(self, *error: object) -> None:
        _staged.pop(self.folder.absolute(), None)
        self._ledger.close()

    def note(self, name: str, facts: Any) -> None:
        """Write down what became of a file: bytes and time once it is sent, 'away' or 'gone'."""
        with self._lock:
            self._ledger.write(json.dumps({"name": name, "facts": facts}).encode() + b"\n")
            self._ledger.flush()
            self._take(name, facts)

    def _take(self, name: str, facts: Any) -> None:
        folders = [str(folder) for folder in PurePosixPath(name).parents][:-1]
        if facts == "away":
            self.away[name] = self.sent.get(name, (0, 0))[0]
            for folder in folders:
                self._below.setdefault(folder, set()).add(name)
            return
        if self.away.pop(name, None) is not None:
            for folder in folders:
                self._below[folder].discard(name)
        if facts == "gone":
            self.sent.pop(name, None)
        elif isinstance(facts, list) and len(facts) == 2 and all(isinstance(number, int) for number in facts):
            self.sent[name] = (facts[0], facts[1])

    def free(self, name: str) -> int:
        """Delete a file here that is at the store as it is; return its bytes."""
        path = self.folder / name
        facts = path.stat()
        if self.sent.get(name) != (facts.st_size, facts.st_mtime_ns):
            return 0
        self.note(name, "away")
        os.fsync(self._ledger.fileno())
        path.unlink()
        return facts.st_size

    def read(self, name: str, largest: int) -> bytes:
        """Return the content of a file that was freed.

        Raises:
            FileNotFoundError: none of that name was.
            CorruptRunError: it has more than `largest` bytes.
            RemoteError: the store does not answer, or the file is another one since it was sent.
        """
        size = self.away.get(name)
        if size is None:
            raise FileNotFoundError(str(self.folder / name))
        if size > largest:
            raise CorruptRunError(f"{self.store.url}/{name} has {size:,} bytes, more than any run of this size.")
        return self.store.read_sized(name, size)

    def end(self, name: str) -> bytes:
        """Return the last 4 bytes of a file that was freed."""
        content = self.read(name, 1 << 40) if name.endswith("zarr.json") else None
        return self.store.end_sized(name, self.away[name]) if content is None else content

    def away_below(self, folder: Path) -> list[str]:
        """Return the files below a folder that were freed, relative to it."""
        above = self.folder_name(folder)
        with self._lock:
            return [name.removeprefix(f"{above}/") for name in self._below.get(above, ())]

    def deleted(self, folder: Path) -> None:
        """Take note that a folder was deleted here: what was freed of it is to be deleted at the store too."""
        above = self.folder_name(folder)
        for name in self.away_below(folder):
            with self._lock:
                self._take(f"{above}/{name}", list(self.sent[f"{above}/{name}"]))

    def folder_name(self, path: Path) -> str:
        """Return the name of a path below the folder."""
        return PurePosixPath(path.absolute().relative_to(self.folder.absolute())).as_posix()

    def files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Return the files that are here, without those that are only of this machine."""
        folders = [""]
        while folders:
            folder = folders.pop()
            with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / folder) as entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if name != "stream":
                            folders.append(name)
                    elif name not in ("lock", "lock.ranks") and not name.endswith(".partial"):
                        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                            yield name, entry.stat(follow_symlinks=False)


def forget_freed(path: Path) -> None:
    """Take note that what lies below a path is made anew, where it is staged: nothing older is read in its place."""
    staging = staging_of(path)
    if staging is not None:
        staging.deleted(path)


def staging_of(path: Path) -> Staging | None:
    """Return the staging that a path lies in; `None` for all others."""
    if not _staged:
        return None
    path = path.absolute()
    return next((_staged[folder] for folder in (path, *path.parents) if folder in _staged), None)
