"""Rows of a pack, read once for all parameters that are in it."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np

from streamfisher.store.chunk_reading import read_decoded
from streamfisher.store.folder import RunFolder

#: Packs that are kept: workers that reduce neighbouring parameters may be at work on two.
_KEPT = 2


class PackCache:
    """The packs that were read last; one thread reads, and those that want the same pack wait for it."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._lock = threading.Lock()
        self._read: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()

    def rows(self, key: str, first: int, last: int) -> np.ndarray:
        """Return the rows of samples `first` to `last` of all parameters of a pack, not to be changed.

        Args:
            key: of the pack.
            first: sample.
            last: one past the last sample.

        Raises:
            ValueError, RuntimeError, OSError: a chunk cannot be read, see `errors.unreadable`.
        """
        asked = (key, first, last)
        with self._lock:
            found = self._read.get(asked)
            if found is None:
                reader = self.run.reader(f"packed/{key}")
                found = np.empty((last - first, reader.facts.shape[1]), dtype=self.run.numpy_read_dtype)
                everything = slice(0, reader.facts.shape[1])
                read_decoded(reader, slice(first, last), everything, self.run.store_dtype, found)
                found.flags.writeable = False
                while len(self._read) >= _KEPT:
                    self._read.popitem(last=False)
                self._read[asked] = found
            self._read.move_to_end(asked)
            return found
