"""The Grams of a run: one for each Gram key, a parameter by default, or a group of them; each with its marker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import CorruptRunError, unreadable
from streamfisher.runtime.durable import read_json, write_marker
from streamfisher.runtime.own_files import remove_tree
from streamfisher.store import codecs
from streamfisher.store.arrays import CHUNK, create_array, values_of, write_array
from streamfisher.store.folder import RunFolder
from streamfisher.store.integrity import check_layout, chunk_digest, require_inside
from streamfisher.store.moments import MomentStore
from streamfisher.store.names import node_name
from streamfisher.store.opening import open_array


class GramStore:
    """The Grams of a run, whole or tile by tile, and the products of centered rows with their mean."""

    def __init__(self, run: RunFolder, moments: MomentStore) -> None:
        self.run, self.moments = run, moments

    def done(self, settings: Mapping[str, Any]) -> set[str]:
        """Return the keys whose Gram exists for all samples and was made with `settings`."""
        done = set()
        for key in self.run.gram_members:
            marker = self.marker(key)
            if marker and marker.get("settings") == dict(settings) and marker.get("n_samples") == self.run.n_samples:
                done.add(key)
        return done

    def of_fewer(self, settings: Mapping[str, Any]) -> dict[str, int]:
        """Return the keys whose Gram was made before the run grew, with how many of its rows are still those."""
        found = {}
        for key in self.run.gram_members:
            marker = self.marker(key)
            n_samples = marker.get("n_samples")
            if (
                marker.get("settings") == dict(settings)
                and isinstance(n_samples, int)
                and n_samples < self.run.n_samples
            ):
                # A last unit that was not full has been computed again.
                found[key] = n_samples // self.run.chunk_rows * self.run.chunk_rows
        return {key: rows for key, rows in found.items() if rows}

    def has(self, key: str) -> bool:
        """Return whether a Gram is marked as finished, whatever it was made with."""
        return self._marker_path(key).is_file()

    def write(self, key: str, gram: np.ndarray, mean_products: np.ndarray | None, settings: Mapping[str, Any]) -> None:
        """Write one Gram, (N, N) float64, then its marker."""
        self.forget(key)
        node, facts = node_name(key), self._facts(key)
        write_array(self.run.path, f"gram/{node}", gram, ("sample", "sample_j"), {**facts, **settings})
        if mean_products is not None:
            self.write_mean_products(key, mean_products)
        content = {"settings": dict(settings), "n_samples": len(gram), "crc32c": codecs.checksum(gram)}
        content["files"] = chunk_digest(self.run.path / "gram" / node)
        if mean_products is not None:
            content["mean_crc32c"] = codecs.checksum(mean_products)
        write_marker(self._marker_path(key), content, fsync=self.run.fsync)

    def read(self, key: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return one Gram (N, N) float64 and, for centered rows, its products with the mean (N + 1,).

        Raises:
            CorruptRunError: it does not match the checksum it was written with.
        """
        marker = read_json(self._marker_path(key))
        try:
            n, tiled = marker["n_samples"], "tiles" in marker
            checksum = None if tiled else marker["crc32c"]
            gram = self._read_sum(f"gram/{node_name(key)}", (n, n), tiled=tiled)
            products = self._read_sum(f"gram_mean/{node_name(key)}", (n + 1,)) if self.run.centered else None
            known = products is None or marker.get("mean_crc32c") in (None, codecs.checksum(products))
            known = known and marker.get("files") in (None, chunk_digest(self.run.path / "gram" / node_name(key)))
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise unreadable(
                error,
                f"{self.run}: the Gram of {key} cannot be read: {error}. `streamfisher gram --rebuild` remakes it.",
            ) from error
        if tiled:
            self.check_tiles(key, gram)
        elif codecs.checksum(gram) != checksum or not known:
            raise CorruptRunError(
                f"{self.run}: the Gram of {key} is not what was written; `streamfisher gram --rebuild` remakes it."
            )
        return gram, products

    def _read_sum(self, path: str, shape: tuple[int, ...], *, tiled: bool = False) -> np.ndarray:
        """Return a float64 array of a Gram, once its shape is known to be that of at most N samples."""
        require_inside(self.run.path, self.run.path / path)
        array = open_array(self.run.path / path)
        if shape[0] > self.run.n_samples + 1:
            raise CorruptRunError(
                f"{self.run.path / path} is of {shape[0]} samples and the run has {self.run.n_samples}."
            )
        chunks = None if tiled else tuple(min(size, CHUNK) for size in shape)
        check_layout(array, self.run.path / path, shape, chunks, "float64")
        return values_of(array)

    def forget(self, key: str) -> None:
        """Remove the marker of a Gram, and of what is kept beside it, so that it is built again."""
        for kind in ("gram", "moment"):
            (self.run.path / "done" / f"{kind}-{node_name(key)}.json").unlink(missing_ok=True)
        remove_tree(self.run.path, self.tile_folder(key))

    def check(self, key: str) -> None:
        """Read a Gram, by tiles where it was written so, and compare checksums.

        Raises:
            CorruptRunError: it is not what was written.
        """
        if "tiles" in read_json(self._marker_path(key)):
            self.check_tiles(key, None)
        else:
            self.read(key)
        self.moments.read(key)

    def checksums(self, key: str) -> int | list[int]:
        """Return the CRC-32C of a Gram, or of each of its tiles, as it was written."""
        marker = read_json(self._marker_path(key))
        return [tile["crc32c"] for tile in self._tile_markers(key)] if "tiles" in marker else marker["crc32c"]

    def keys_of(self, parameters: Sequence[str]) -> list[str]:
        """Return the Gram keys that any of these parameters is part of."""
        wanted = set(parameters)
        return [key for key, members in self.run.gram_members.items() if wanted.intersection(members)]

    def _marker_path(self, key: str) -> Path:
        return self.run.path / "done" / f"gram-{node_name(key)}.json"

    def marker(self, key: str) -> dict[str, Any]:
        """Return what the marker says; a damaged marker is none: the Gram is built again."""
        path = self._marker_path(key)
        try:
            marker = read_json(path) if path.is_file() else {}
        except CorruptRunError:
            return {}
        return marker if isinstance(marker, dict) else {}

    def create(self, key: str, chunk: int, settings: Mapping[str, Any]) -> None:
        """Lay out a Gram that is going to be written tile by tile."""
        shape = (self.run.n_samples, self.run.n_samples)
        facts = {**self._facts(key), **settings}
        create_array(self.run.path, f"gram/{node_name(key)}", shape, ("sample", "sample_j"), facts, chunk)

    def write_mean_products(self, key: str, products: np.ndarray) -> None:
        """Write the products of centered rows with the mean, and of the mean with itself: (N + 1,)."""
        write_array(self.run.path, f"gram_mean/{node_name(key)}", products, ("sample_and_mean",), self._facts(key))

    def mean_products(self, key: str) -> np.ndarray | None:
        """Return the products of the rows of a Gram with their mean, (N + 1,), where rows are stored centered.

        Raises:
            CorruptRunError: they cannot be read.
        """
        if not self.run.centered:
            return None
        path = self.run.path / "gram_mean" / node_name(key)
        require_inside(self.run.path, path)
        try:
            return values_of(open_array(path))
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise unreadable(error, f"{path} cannot be read: {error}.") from error

    def tile(self, key: str, rows: slice, columns: slice) -> np.ndarray:
        """Return part of a finished Gram, float64, without reading the rest.

        Raises:
            CorruptRunError: a chunk of it is missing or fails its checksum.
        """
        path = self.run.path / "gram" / node_name(key)
        require_inside(self.run.path, path)
        try:  # opened each time: a rebuild makes the array anew
            return values_of(open_array(path), (rows, columns))
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise unreadable(
                error,
                f"{self.run}: the Gram of {key} cannot be read: {error}. `streamfisher gram --rebuild` remakes it.",
            ) from error

    def check_tiles(self, key: str, gram: np.ndarray | None) -> None:
        """Compare the tiles of a Gram, held in memory or read one at a time, with their checksums.

        Raises:
            CorruptRunError: a tile, or its mirror image, is not what was written.
        """
        for marker in self._tile_markers(key):
            rows, columns = slice(*marker["rows"]), slice(*marker["columns"])
            tile = self.tile(key, rows, columns) if gram is None else gram[rows, columns]
            mirrored = self.tile(key, columns, rows) if gram is None else gram[columns, rows]
            if codecs.checksum(tile) != marker["crc32c"] or not np.array_equal(tile, mirrored.T):
                raise CorruptRunError(
                    f"{self.run}: the Gram of {key} is not what was written between samples {rows.start} to "
                    f"{rows.stop - 1} and {columns.start} to {columns.stop - 1}; `streamfisher gram --rebuild` "
                    "remakes it."
                )

    def _tile_markers(self, key: str) -> list[dict[str, Any]]:
        return [read_json(path) for path in sorted(self.tile_folder(key).glob("*-*.json"))]

    def tile_folder(self, key: str) -> Path:
        """Return the folder of the markers of a Gram's tiles."""
        return self.run.path / "done" / f"tiles-{node_name(key)}"

    def _facts(self, key: str) -> dict[str, Any]:
        members = self.run.gram_members[key]
        return {"parameter": key, **({"parameters": members} if members != [key] else {})}
