"""The Grams of a run: one for each Gram key, a parameter by default, or a group of them; each with its marker."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from streamfisher.errors import CorruptRunError, unreadable
from streamfisher.runtime.durable import read_json
from streamfisher.runtime.own_files import remove_tree
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.store import codecs
from streamfisher.store.arrays import CHUNK, create_array, read_array, write_array
from streamfisher.store.folder import RunFolder
from streamfisher.store.forms import GRAM, require_form
from streamfisher.store.gram_tiles import TileChecksums, gram_checksums, read_tile_checksums
from streamfisher.store.integrity import check_layout, chunk_digest, require_inside
from streamfisher.store.moments import Moment, MomentStore
from streamfisher.store.names import node_name
from streamfisher.store.opening import read_facts

#: Bytes of rows that are read at a time to check a Gram of an older run.
_BAND = 64 << 20


@dataclass(frozen=True)
class _Bound:
    """A Gram whose chunks are known to be where they were written."""

    version: tuple[int, int]  # of its marker's file
    marker: Mapping[str, Any]
    tiles: TileChecksums | None  # where it was written tile by tile


def _version(path: Path) -> tuple[int, int, int] | None:
    """Return what tells a file from what takes its place; `None` where it cannot be looked at."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


class GramStore:
    """The Grams of a run, whole or tile by tile, and the products of centered rows with their mean."""

    def __init__(self, run: RunFolder, moments: MomentStore) -> None:
        self.run, self.moments = run, moments
        self._bound: dict[str, _Bound] = {}  # Grams that were read in parts
        self._markers: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {}  # with the version of their files

    def done(self, settings: Mapping[str, Any]) -> set[str]:
        """Return the keys whose Gram exists for all samples, with its moment, and was made with `settings`."""
        done = set()
        for key in self.run.gram_members:
            marker = self.marker(key)
            same = marker.get("settings") == dict(settings) and marker.get("n_samples") == self.run.n_samples
            if same and ("moment_crc32c" not in marker or self.moments.has(key)):
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

    def write(
        self,
        key: str,
        gram: np.ndarray,
        mean_products: np.ndarray | None,
        settings: Mapping[str, Any],
        moment: Moment | None = None,
        *,
        single: bool = True,
    ) -> None:
        """Write one Gram, (N, N) float64, and what is kept beside it, then its marker.

        Args:
            key: of the Gram.
            gram: itself.
            mean_products: of its rows with their mean, (N + 1,), where they are centered.
            settings: it was made with.
            moment: kept beside it.
            single: float32 products are in it.
        """
        self.forget(key)
        facts = {**self._facts(key), **settings}
        files = write_array(self.run.path, f"gram/{node_name(key)}", gram, ("sample", "sample_j"), facts)
        content = {"settings": dict(settings), "n_samples": len(gram), "crc32c": codecs.checksum(gram)}
        self._mark(key, content | {"float32_products": single}, files, mean_products, moment)

    def finish_tiles(
        self,
        key: str,
        size: int,
        mean_products: np.ndarray | None,
        settings: Mapping[str, Any],
        moment: Moment | None = None,
    ) -> None:
        """Write what is kept beside a Gram whose tiles of `size` rows are all there, then its marker."""
        content = {"settings": dict(settings), "n_samples": self.run.n_samples, "tiles": size}
        self._mark(key, content, chunk_digest(self.run.path / "gram" / node_name(key)), mean_products, moment)

    def _mark(
        self,
        key: str,
        content: dict[str, Any],
        files: int,
        mean_products: np.ndarray | None,
        moment: Moment | None,
    ) -> None:
        """Write the marker of a Gram, last: a stop before leaves the Gram undone, with all that is kept beside it."""
        node = node_name(key)
        if mean_products is not None:
            write_array(self.run.path, f"gram_mean/{node}", mean_products, ("sample_and_mean",), self._facts(key))
            content["mean_crc32c"] = codecs.checksum(mean_products)
        if moment is not None:
            content["moment_crc32c"] = self.moments.write(key, moment)
        content |= {"parameter": key, "files": files}
        self.run.mark_at(self._marker_path(key), content)

    def read(self, key: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return one Gram (N, N) float64 and, for centered rows, its products with the mean (N + 1,).

        Raises:
            CorruptRunError: it does not match the checksum it was written with.
        """
        marker = self._finished(key)
        gram = self._part(key, marker, slice(None), slice(None))
        if "tiles" in marker:  # first, as they say where
            self._check_tiles(key, marker, self._tile_checksums(key, marker), gram)
        elif codecs.checksum(gram) != marker["crc32c"]:
            raise self._altered(key)
        self._check_files(key, marker)
        return gram, self.mean_products(key)

    @contextlib.contextmanager
    def _readable(self, key: str) -> Iterator[None]:
        """Let what goes wrong while a Gram is read be said as that."""
        try:
            yield
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise unreadable(
                error,
                f"{self.run}: the Gram of {key} cannot be read: {error}. `streamfisher gram --rebuild` remakes it.",
            ) from error

    def _altered(self, key: str, rows: slice | None = None, columns: slice | None = None) -> CorruptRunError:
        where = ""
        if rows is not None and columns is not None:
            where = f" between samples {rows.start} to {rows.stop - 1} and {columns.start} to {columns.stop - 1}"
        return CorruptRunError(
            f"{self.run}: the Gram of {key} is not what was written{where}; `streamfisher gram --rebuild` remakes it."
        )

    def _values(
        self,
        group: str,
        key: str,
        shape: tuple[int, ...],
        where: tuple[slice, ...] | None = None,
        *,
        tiled: bool = False,
    ) -> np.ndarray:
        """Return part of a float64 array of a Gram, once it is known to be its own, and of at most N samples."""
        path = self.run.path / group / node_name(key)
        require_inside(self.run.path, path)
        facts = read_facts(path)  # each time: a rebuild makes the array anew
        if shape[0] > self.run.n_samples + 1:
            raise CorruptRunError(f"{path} is of {shape[0]} samples and the run has {self.run.n_samples}.")
        chunks = None if tiled else tuple(min(size, CHUNK) for size in shape)
        check_layout(facts, path, shape, chunks, "float64")
        own, found = self._facts(key), facts.attributes
        if found.get("parameter", key) != key or found.get("parameters") != own.get("parameters"):
            raise CorruptRunError(f"{path} has the metadata of another Gram, or of other parameters.")
        return read_array(path, facts, where)

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
        marker = self._finished(key)
        if "tiles" in marker:
            self._check_tiles(key, marker, self._tile_checksums(key, marker))
            self._check_files(key, marker)
            self.mean_products(key)
        else:
            self.read(key)
        self.moment(key)

    def checksums(self, key: str) -> int | list[int]:
        """Return the CRC-32C of a Gram, or of each of its tiles, as it was written."""
        return gram_checksums(self._finished(key), self.tile_folder(key))

    def read_ahead(self, keys: Iterable[str]) -> None:
        """Let Grams that are going to be read in this order come before they are asked for, where they are far away."""
        if isinstance(self.run.path, RemotePath):
            store = self.run.path.store
            store.expect(chunk for key in keys for chunk in store.below(f"gram/{node_name(key)}/c"))

    def keys_of(self, parameters: Sequence[str]) -> list[str]:
        """Return the Gram keys that any of these parameters is part of."""
        wanted = set(parameters)
        return [key for key, members in self.run.gram_members.items() if wanted.intersection(members)]

    def _marker_path(self, key: str) -> Path:
        return self.run.path / "done" / f"gram-{node_name(key)}.json"

    def marker(self, key: str) -> dict[str, Any]:
        """Return what the marker says; one that is damaged, or another's, is none: the Gram is built again."""
        path = self._marker_path(key)
        try:
            return self._finished(key) if path.is_file() else {}
        except CorruptRunError:
            return {}

    def create(self, key: str, chunk: int, settings: Mapping[str, Any]) -> None:
        """Lay out a Gram that is going to be written tile by tile."""
        shape = (self.run.n_samples, self.run.n_samples)
        facts = {**self._facts(key), **settings}
        create_array(self.run.path, f"gram/{node_name(key)}", shape, ("sample", "sample_j"), facts, chunk)

    def mean_products(self, key: str) -> np.ndarray | None:
        """Return the products of the rows of a Gram with their mean, (N + 1,), where rows are stored centered.

        Raises:
            CorruptRunError: they are missing, or not what was written.
        """
        if not self.run.centered:
            return None
        marker = self._finished(key)
        with self._readable(key):
            products = self._values("gram_mean", key, (marker["n_samples"] + 1,))
        if marker.get("mean_crc32c") not in (None, codecs.checksum(products)):
            raise CorruptRunError(
                f"{self.run}: the products of {key} with the mean are not what was written; "
                "`streamfisher gram --rebuild` remakes them."
            )
        return products

    def moment(self, key: str) -> Moment | None:
        """Return the second moment that is kept beside a Gram of all samples; `None` where there is none.

        Raises:
            CorruptRunError: it is missing, or not what was written.
        """
        marker = self._finished(key)
        of_all = marker.get("n_samples") == self.run.n_samples
        return self.moments.read(key, marker.get("moment_crc32c") if of_all else None)

    def bound_marker(self, key: str) -> dict[str, Any]:
        """Return the marker of a Gram, with the checksums of its tiles, once its chunks are known to be those written.

        Raises:
            CorruptRunError: they are not.
        """
        marker = dict(self._bind(key).marker)
        return marker | {"checksums": gram_checksums(marker, self.tile_folder(key))}

    def tile(self, key: str, rows: slice, columns: slice) -> np.ndarray:
        """Return part of a finished Gram, float64, without reading the rest.

        Raises:
            CorruptRunError: a chunk of it is missing, altered, or another's.
        """
        bound = self._bind(key)
        values = self._part(key, bound.marker, rows, columns)
        n = bound.marker["n_samples"]
        rows, columns = (slice(*side.indices(n)[:2]) for side in (rows, columns))
        if bound.tiles is not None and not bound.tiles.accept(rows, columns, values):
            raise self._altered(key, rows, columns)
        return values

    def _part(self, key: str, marker: Mapping[str, Any], rows: slice, columns: slice) -> np.ndarray:
        with self._readable(key):
            shape = (marker["n_samples"], marker["n_samples"])
            return self._values("gram", key, shape, (rows, columns), tiled="tiles" in marker)

    def _bind(self, key: str) -> _Bound:
        """Return the marker of a Gram that is going to be read in parts, whose chunks are where they were written.

        That is checked once for each marker: chunks are 4 bytes each to read. Markers of older runs do not say it of
        their chunks; there the whole Gram is read once.
        """
        path = self._marker_path(key)
        with self._readable(key):
            facts = path.stat()
        version = (facts.st_ino, facts.st_mtime_ns)
        bound = self._bound.get(key)
        if bound is not None and bound.version == version:
            return bound
        marker = self._finished(key)
        tiles = self._tile_checksums(key, marker) if "tiles" in marker else None
        if "files" in marker:
            self._check_files(key, marker)
        elif tiles is not None:
            self._check_tiles(key, marker, tiles)
        else:
            self._check_bands(key, marker)
        self._bound[key] = _Bound(version, marker, tiles)
        return self._bound[key]

    def _check_files(self, key: str, marker: Mapping[str, Any]) -> None:
        """Refuse a Gram whose chunks are not those that were written there; older markers do not say which."""
        with self._readable(key):
            right = marker.get("files") in (None, chunk_digest(self.run.path / "gram" / node_name(key)))
        if not right:
            raise self._altered(key)

    def _check_bands(self, key: str, marker: Mapping[str, Any]) -> None:
        """Compare a whole Gram with its checksum, some rows at a time."""
        found, n = google_crc32c.Checksum(), marker["n_samples"]
        rows = min(CHUNK, max(_BAND // (8 * max(n, 1)), 64))
        for start in range(0, n, rows):
            found.update(self._part(key, marker, slice(start, start + rows), slice(n)).tobytes())
        if int.from_bytes(found.digest(), "big") != marker["crc32c"]:
            raise self._altered(key)

    def _check_tiles(
        self, key: str, marker: Mapping[str, Any], tiles: TileChecksums, gram: np.ndarray | None = None
    ) -> None:
        """Compare the tiles of a Gram, held in memory or read one at a time, with their checksums.

        Raises:
            CorruptRunError: a tile, or its mirror image, is not what was written.
        """
        for rows, columns in tiles:
            for place in [(rows, columns), (columns, rows)][: 1 if rows == columns else 2]:
                tile = self._part(key, marker, *place) if gram is None else gram[place]
                if not tiles.accept(*place, tile):
                    raise self._altered(key, rows, columns)

    def _tile_checksums(self, key: str, marker: Mapping[str, Any]) -> TileChecksums:
        return read_tile_checksums(self.tile_folder(key), marker["n_samples"], marker["tiles"])

    def _finished(self, key: str) -> dict[str, Any]:
        """Return the marker of a Gram that is going to be read.

        Raises:
            CorruptRunError: it is missing, damaged, or that of another Gram.
        """
        path = self._marker_path(key)
        version = _version(path)
        known = self._markers.get(key)
        if known is not None and known[0] == version:
            return known[1]
        marker = read_json(path)
        require_form(marker, GRAM, path)
        other = marker.get("parameter", key) != key or marker["n_samples"] > self.run.n_samples
        if other or ("tiles" in marker) == ("crc32c" in marker):
            raise CorruptRunError(
                f"{path} is not the marker of the Gram of {key}; `streamfisher gram --rebuild` remakes it."
            )
        if version is not None:
            self._markers[key] = version, marker
        return marker

    def tile_folder(self, key: str) -> Path:
        """Return the folder of the markers of a Gram's tiles."""
        return self.run.path / "done" / f"tiles-{node_name(key)}"

    def _facts(self, key: str) -> dict[str, Any]:
        members = self.run.gram_members[key]
        return {"parameter": key, **({"parameters": members} if members != [key] else {})}
