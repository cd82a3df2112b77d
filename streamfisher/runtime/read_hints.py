"""Files that are read soon: the kernel is told of them, and the disk reads them while the cores are at work."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from streamfisher.errors import StreamfisherError
from streamfisher.runtime.own_files import open_own

#: Bytes of one hint: of a longer one the kernel takes what one of its requests holds, and forgets the rest.
_STEP = 512 << 10
#: Hints wait while the disk's queue is full: threads that give them. A disk that is asked for one file at a time reads
#: at half of its rate (docs/design.md).
_THREADS = 2


class ReadHints:
    """Gives hints from threads of its own. A context manager: those that were not given when it is left are dropped."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="streamfisher-hint")

    def __enter__(self) -> ReadHints:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def give(self, files: Callable[[], Iterable[Path]]) -> None:
        """Begin to read files into the page cache; one that cannot be read is left to whoever wants it.

        Args:
            files: is called in the thread.
        """
        self._pool.submit(_give, files)


def _give(files: Callable[[], Iterable[Path]]) -> None:
    if not hasattr(os, "posix_fadvise"):  # as on macOS
        return
    with contextlib.suppress(OSError, StreamfisherError):  # whoever reads it says so
        for path in files():
            file = open_own(path, os.O_RDONLY)
            try:
                for start in range(0, os.fstat(file).st_size, _STEP):
                    os.posix_fadvise(file, start, _STEP, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)
