"""Parts of a stored Gram: of one that is written tile by tile, or that is not to be read whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from streamfisher.errors import CorruptRunError, unreadable
from streamfisher.store import codecs
from streamfisher.store.arrays import create_array, write_array
from streamfisher.runtime.durable import read_json
from streamfisher.store.integrity import require_inside
from streamfisher.store.names import node_name
from streamfisher.store.part import StorePart


class GramParts(StorePart):
    """What a `RunStore` does with parts of Grams."""

    def create_gram(self, key: str, chunk: int, settings: Mapping[str, Any]) -> None:
        """Lay out a Gram that is going to be written tile by tile."""
        shape = (self.n_samples, self.n_samples)
        facts = {**self._facts(key), **settings}
        create_array(self.path, f"gram/{node_name(key)}", shape, ("sample", "sample_j"), facts, chunk)

    def write_mean_products(self, key: str, products: np.ndarray) -> None:
        """Write the products of centered rows with the mean, and of the mean with itself: (N + 1,)."""
        write_array(self.path, f"gram_mean/{node_name(key)}", products, ("sample_and_mean",), self._facts(key))

    def gram_mean_products(self, key: str) -> np.ndarray | None:
        """Return the products of the rows of a Gram with their mean, (N + 1,), where rows are stored centered.

        Raises:
            CorruptRunError: they cannot be read.
        """
        if not self.centered:
            return None
        path = self.path / "gram_mean" / node_name(key)
        require_inside(self.path, path)
        try:
            return zarr.open_array(path, mode="r")[...]
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise unreadable(error, f"{path} cannot be read: {error}.") from error

    def gram_tile(self, key: str, rows: slice, columns: slice) -> np.ndarray:
        """Return part of a finished Gram, float64, without reading the rest.

        Raises:
            CorruptRunError: a chunk of it is missing or fails its checksum.
        """
        path = self.path / "gram" / node_name(key)
        require_inside(self.path, path)
        try:  # opened each time: a rebuild makes the array anew
            return zarr.open_array(path, mode="r")[rows, columns]
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise unreadable(
                error,
                f"{self.path}: the Gram of {key} cannot be read: {error}. `streamfisher gram --rebuild` remakes it.",
            ) from error

    def check_tiles(self, key: str, gram: np.ndarray | None) -> None:
        """Compare the tiles of a Gram, held in memory or read one at a time, with their checksums.

        Raises:
            CorruptRunError: a tile, or its mirror image, is not what was written.
        """
        for marker in self._tile_markers(key):
            rows, columns = slice(*marker["rows"]), slice(*marker["columns"])
            tile = self.gram_tile(key, rows, columns) if gram is None else gram[rows, columns]
            mirrored = self.gram_tile(key, columns, rows) if gram is None else gram[columns, rows]
            if codecs.checksum(tile) != marker["crc32c"] or not np.array_equal(tile, mirrored.T):
                raise CorruptRunError(
                    f"{self.path}: the Gram of {key} is not what was written between samples {rows.start} to "
                    f"{rows.stop - 1} and {columns.start} to {columns.stop - 1}; `streamfisher gram --rebuild` "
                    "remakes it."
                )

    def _tile_markers(self, key: str) -> list[dict[str, Any]]:
        return [read_json(path) for path in sorted(self._tile_folder(key).glob("*-*.json"))]

    def _tile_folder(self, key: str) -> Path:
        return self.path / "done" / f"tiles-{node_name(key)}"

    def _facts(self, key: str) -> dict[str, Any]:
        members = self.gram_members[key]
        return {"parameter": key, **({"parameters": members} if members != [key] else {})}
