"""Files written past the page cache, where the filesystem offers that.

A copy in the page cache costs a core that could have computed: pages are found, filled, and make others go. `O_DIRECT`
(open(2)) hands aligned memory to the disk instead, where the disk is as fast as what is written comes.
docs/design.md has the figures.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from pathlib import Path
from types import TracebackType

import numpy as np

from streamfisher.config import DirectIo
from streamfisher.runtime.memory import working_memory

#: Bytes; memory, offsets and lengths are multiples of it. No disk asks for more than a page.
_ALIGNED = 4096
#: Bytes that one call writes, and that each thread which writes keeps for that.
BUFFER = 2 << 20
#: Files of fewer bytes go through the page cache in any case: those of a few pages are a matter of their names.
LEAST_DIRECT = 1 << 20
#: What a filesystem that has no direct I/O says of it.
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)

_of_thread = threading.local()


def _buffer_of_thread() -> mmap.mmap:
    if not hasattr(_of_thread, "buffer"):
        _of_thread.buffer = mmap.mmap(-1, BUFFER)
    buffer: mmap.mmap = _of_thread.buffer
    return buffer


class CacheShare:
    """What the page cache is given of what one pass writes.

    Args:
        asked: always past it: nothing; never: all; auto: what a disk that is behind does not take in time, at most half
            of the memory that is free now, shared by the ranks of this machine.
    """

    def __init__(self, asked: DirectIo) -> None:
        self._asked = asked
        self._left = working_memory(None) if asked == "auto" else 0

    def is_past(self, size: int, *, behind: bool) -> bool:
        """Return whether bytes that are about to be written are to go past the cache.

        Args:
            size: how many.
            behind: what came before them is not written yet.
        """
        if self._asked != "auto":
            return self._asked == "always"
        if not behind or size > self._left:
            return True
        self._left -= size
        return False


class DirectFile:
    """A file that is written from its start, past the page cache. A context manager.

    Its last bytes are there once it was left without an error. A thread has one open at a time.

    Args:
        path: of a file that is there, empty.

    Raises:
        OSError: EINVAL or EOPNOTSUPP, the filesystem has no direct I/O; some say so at the first write only.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW)
        self._memory = _buffer_of_thread()
        self._buffer = np.frombuffer(self._memory, dtype=np.uint8)
        self._filled = 0  # bytes of the buffer
        self._written = 0  # bytes of the file

    def write(self, piece: memoryview) -> None:
        """Append bytes.

        Raises:
            OSError: the disk failed.
        """
        values = np.frombuffer(piece, dtype=np.uint8)
        while len(values):
            part = values[: BUFFER - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            values = values[len(part) :]
            if self._filled == BUFFER:
                self._flush(BUFFER)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._filled:
                size = self._written + self._filled
                self._flush(-(-self._filled // _ALIGNED) * _ALIGNED)
                os.ftruncate(self._file, size)
        finally:
            os.close(self._file)

    def _flush(self, size: int) -> None:
        """Write the first bytes of the buffer; a disk that takes a part of them is asked again from there."""
        done = 0
        while done < size:
            written = os.pwrite(self._file, memoryview(self._memory)[done:size], self._written + done)
            done += written // _ALIGNED * _ALIGNED
            if written < _ALIGNED:
                raise OSError(errno.EIO, "The disk took less than a page of what was written")
        self._written += size
        self._filled = 0


def is_refused(error: OSError) -> bool:
    """Return whether an error says that the filesystem has no direct I/O."""
    return error.errno in _REFUSED
