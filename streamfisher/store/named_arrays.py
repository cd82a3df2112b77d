"""What other programs see by name: solved spectra by block and index, and coordinates of samples.

Nothing here is read back: what a spectrum says is kept in `done/spectra`, and these arrays are made of it. Numbers of
samples lie at the root of the run, from where every group inherits them (`xarray.open_datatree`), so they are only
there while every array of the run has as many samples.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.durable import read_json, write_json
from streamfisher.runtime.own_files import read_own, remove_tree, require_own
from streamfisher.store.folder import RunFolder
from streamfisher.store.names import node_name

#: Name of an array -> its dimensions and values.
NamedArrays = Mapping[str, tuple[tuple[str, ...], np.ndarray]]

COORDINATES = ("sample", "sample_j")
_LARGEST_METADATA = 1 << 20
_LARGEST = 2 << 30


class NamedArrayStore:
    """Arrays of a run that are there to be looked at; `done/named.json` says which, with their checksums."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def write_spectrum(self, name: str, arrays: NamedArrays, attributes: Mapping[str, Any]) -> None:
        """Write a spectrum as the group `spectra/NAME`, instead of any that was there.

        Args:
            name: of the group.
            arrays: by block and index, with their coordinates.
            attributes: of the group.
        """
        where = f"spectra/{node_name(name)}"
        self._forget(where)
        require_own(self.run.path, self.run.path / where)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.create_group(self.run.path, path=where, attributes=dict(attributes), overwrite=True)
        for array, (dimensions, values) in arrays.items():
            self._write(f"{where}/{array}", dimensions, values)
        self._mark(where)

    def write_coordinates(self) -> None:
        """Write numbers of samples, for all groups, if all have as many samples."""
        numbers = np.arange(self.run.n_samples)
        if not all(shape == self.run.n_samples for shape in self._lengths()):
            self.clear_coordinates()
            return
        for where in COORDINATES:
            self._forget(where)
            self._write(where, (where,), numbers)
            self._mark(where)

    def clear_coordinates(self) -> None:
        """Remove them: arrays are about to have other lengths, or have."""
        for name in COORDINATES:
            self._forget(name)

    def clear(self) -> None:
        """Remove all: Grams are about to be others."""
        self.clear_coordinates()
        for where in self._marked():
            self._forget(where)

    def damaged(self) -> list[str]:
        """Return which of the arrays and groups are not what was written."""
        try:
            marked = self._marked(strict=True)
        except CorruptRunError:
            return ["done/named.json"]
        return [where for where, digest in marked.items() if self._digest(where) != digest]

    def repair(self) -> None:
        """Remove what is damaged; it is written again with the next report."""
        for where in self.damaged():
            if where == "done/named.json":
                self._marker.unlink(missing_ok=True)
                for name in (*COORDINATES, "spectra"):
                    remove_tree(self.run.path, self.run.path / name)
            else:
                self._forget(where)

    @property
    def _marker(self) -> Path:
        return self.run.path / "done" / "named.json"

    def _marked(self, *, strict: bool = False) -> dict[str, int]:
        try:
            content = read_json(self._marker) if self._marker.is_file() else {"files": {}}
            found = content["files"]
            if not all(self._is_ours(where) for where in found):
                raise CorruptRunError(f"{self._marker} names what no run has.")
            return dict(found)
        except (CorruptRunError, KeyError, TypeError, ValueError, AttributeError) as error:
            if strict:
                raise CorruptRunError(f"{self._marker} is damaged.") from error
            return {}

    def _is_ours(self, where: str) -> bool:
        group, _, name = where.partition("/")
        return where in COORDINATES or (group == "spectra" and bool(name.strip(".")) and "/" not in name)

    def _digest(self, where: str) -> int | None:
        """Return the CRC-32C of names and contents of all files of an array or group; `None` where that fails."""
        found, folder = google_crc32c.Checksum(), self.run.path / where
        try:
            require_own(self.run.path, folder)
            for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
                found.update(path.relative_to(folder).as_posix().encode() + b"\0" + read_own(path, _LARGEST))
        except (CorruptRunError, OSError):
            return None
        return int.from_bytes(found.digest(), "big")

    def _mark(self, where: str) -> None:
        write_json(self._marker, {"files": {**self._marked(), where: self._digest(where)}})

    def _forget(self, where: str) -> None:
        marked = self._marked()
        if where in marked:
            del marked[where]
            write_json(self._marker, {"files": marked})
        remove_tree(self.run.path, self.run.path / where)

    def _write(self, path: str, dimensions: tuple[str, ...], values: np.ndarray) -> None:
        require_own(self.run.path, self.run.path / path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.create_array(self.run.path, name=path, data=values, dimension_names=dimensions, overwrite=True)

    def _lengths(self) -> set[int]:
        """Return how many samples arrays of the run have, by their metadata."""
        found = set()
        for metadata in (*self.run.path.glob("*/*/zarr.json"), *self.run.path.glob("eigenvectors/*/*/zarr.json")):
            try:
                content = json.loads(read_own(metadata, _LARGEST_METADATA))
                names, shape = content.get("dimension_names") or (), content.get("shape", ())
                found |= {size for name, size in zip(names, shape, strict=True) if name in ("sample", "sample_j")}
            except (OSError, ValueError, CorruptRunError, AttributeError, TypeError):
                return {-1}
        return found - {self.run.n_samples} or {self.run.n_samples}
