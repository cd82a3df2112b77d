"""Files and folders that are a run's own: a run from elsewhere may hold links, FIFOs, devices and sockets.

Through a link, reading would show and writing would destroy what lies outside; a FIFO blocks whoever opens it for ever.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.remote_path import RemotePath, read_only
from streamfisher.runtime.staging import forget_freed, staging_of

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
#: O_NONBLOCK: a FIFO that took a file's place must not block.
_SAFELY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def require_own_files(root: Path) -> None:
    """Refuse a folder that holds anything but files and folders; the folder itself may be a link.

    One look at the names, about a microsecond for each; files that come or go meanwhile do no harm.

    Raises:
        CorruptRunError: it names the first thing that is neither.
    """
    if isinstance(root, RemotePath):  # object stores have nothing else
        return
    for entry in _entries(root):
        if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
            raise _foreign(Path(entry.path))


def _entries(root: Path) -> Iterator[os.DirEntry[str]]:
    folders = [os.fspath(root)]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    yield entry
        except FileNotFoundError:  # deleted meanwhile, by whoever writes the run
            continue
        except OSError as error:
            raise CorruptRunError(f"{folder[:200]} cannot be looked into: {error.strerror}.") from error


def require_own(root: Path, path: Path) -> None:
    """Refuse a path below `root` that passes through a link, or that is neither file nor folder; it need not exist.

    Raises:
        CorruptRunError: it does, or is not below `root`.
    """
    try:
        parts = path.relative_to(root).parts
    except ValueError:
        raise CorruptRunError(f"{path} is not in {root}; nothing is read or written there.") from None
    if ".." in parts:
        raise CorruptRunError(f"{path} is not in {root}; nothing is read or written there.")
    if isinstance(root, RemotePath):
        return
    here = root
    for part in parts:
        here = here / part
        try:
            mode = os.lstat(here).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise _foreign(here)


def remove_tree(root: Path, path: Path) -> None:
    """Delete a folder below `root`, if it is there; never through a link.

    Raises:
        CorruptRunError: the path passes through a link.
    """
    if isinstance(path, RemotePath):
        raise read_only(path)
    require_own(root, path)
    shutil.rmtree(path, ignore_errors=True)
    forget_freed(path)


def open_own(path: Path, flags: int, mode: int = 0o666) -> int:
    """Open a regular file as `os.open` does and return its descriptor.

    Raises:
        CorruptRunError: it is something else; or it is to be written in place and has a name elsewhere too.
        OSError: as `os.open`.
        RunError: it lies below a URL.
    """
    if isinstance(path, RemotePath):
        raise read_only(path)
    writing = flags & (os.O_WRONLY | os.O_RDWR)
    try:
        facts = os.lstat(path)
        if not stat.S_ISREG(facts.st_mode):
            raise _foreign(path)
        if writing and facts.st_nlink > 1:
            raise _shared(path)
    except FileNotFoundError:
        pass  # `os.open` makes it, or says so
    file = os.open(path, flags | _SAFELY, mode)
    facts = os.fstat(file)
    if not stat.S_ISREG(facts.st_mode) or (writing and facts.st_nlink > 1):
        os.close(file)
        raise _foreign(path) if not stat.S_ISREG(facts.st_mode) else _shared(path)
    return file


def read_own(path: Path, largest: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        CorruptRunError: it is something else, or has more than `largest` bytes.
        OSError: it cannot be read.
        RemoteError: it lies below a URL, and the store does not answer.
    """
    if isinstance(path, RemotePath):
        return path.read(largest)
    try:
        descriptor = open_own(path, os.O_RDONLY)
    except FileNotFoundError:
        staging = staging_of(path)
        if staging is None:
            raise
        return staging.read(staging.folder_name(path), largest)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > largest:
            raise CorruptRunError(f"{path} has {size:,} bytes, more than any run of this size.")
        return file.read(size)  # what is appended meanwhile is not asked for


def _shared(path: Path) -> CorruptRunError:
    return CorruptRunError(
        f"{path} has another name elsewhere (a hard link), under which it would be changed too. Nothing is written "
        "there. Delete it, or copy the run so that every file is its own."
    )


def _foreign(path: Path) -> CorruptRunError:
    try:
        kind = _KINDS.get(stat.S_IFMT(os.lstat(path).st_mode), "no regular file")
    except OSError:
        kind = "no regular file"
    return CorruptRunError(
        f"{path} is {kind}; a run has only files and folders of its own. Nothing is read or written there. "
        "Delete it, or take another copy of the run."
    )
