"""What was solved once, kept in a run: one sealed file for each thing that was asked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.durable import read_json, write_json
from streamfisher.runtime.own_files import require_own
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.store.folder import RunFolder
from streamfisher.store.grams import GramStore

#: Bytes of one file, at most: eigenvalues of some thousand blocks.
_LARGEST = 512 << 20
#: So many are kept; growth curves of a dozen sizes under each block structure are far fewer.
_MOST = 256


class SpectrumStore:
    """Solved spectra of a run, `done/spectra/KEY.json`; whatever ails one, it is solved again."""

    def __init__(self, run: RunFolder, grams: GramStore) -> None:
        self.run, self.grams = run, grams

    @property
    def folder(self) -> Path:
        """Return where they are."""
        return self.run.path / "done" / "spectra"

    def read(self, key: str) -> Any:
        """Return what was kept under a key; `None` where there is nothing, or it is damaged."""
        path = self.folder / f"{key}.json"
        try:
            require_own(self.run.path, path)
            return read_json(path, _LARGEST) if path.is_file() else None
        except (CorruptRunError, OSError):
            return None

    def write(self, key: str, content: Mapping[str, Any]) -> bool:
        """Keep something under a key; return whether that could be done."""
        path = self.folder / f"{key}.json"
        with contextlib.suppress(OSError, CorruptRunError):  # it is solved again when it is asked for
            if isinstance(self.run.path, RemotePath) or not os.access(self.run.path / "done", os.W_OK):
                return False
            require_own(self.run.path, path)
            self.folder.mkdir(exist_ok=True)
            if path.exists() or sum(1 for _ in self.folder.iterdir()) < _MOST:
                write_json(path, dict(content))
                return True
        return False

    def damaged(self) -> list[Path]:
        """Return the files that are not what was written."""
        found = []
        for path in sorted(self.folder.glob("*.json")):
            try:
                read_json(path, _LARGEST)
            except CorruptRunError:
                found.append(path)
        return found

    def gram_facts(self, key: str) -> Any:
        """Return what the bytes of a Gram are known by, and those of what is kept beside it.

        Raises:
            CorruptRunError: its chunks are not those that were written there.
        """
        return self.grams.bound_marker(key)
