"""The markers of a Gram's tiles, `done/tiles-KEY/ROW-COLUMN.json`: which checksum the part at each place has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.durable import read_json
from streamfisher.store import codecs
from streamfisher.store.forms import TILE, require_form


@dataclass(frozen=True)
class TileChecksums:
    """The CRC-32C of each tile of one Gram, on and above the diagonal, by its place."""

    checksums: Mapping[tuple[int, int, int, int], int]  # first and last row (exclusive), first and last column

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        for top, bottom, left, right in self.checksums:
            yield slice(top, bottom), slice(left, right)

    def accept(self, rows: slice, columns: slice, values: np.ndarray) -> bool:
        """Return whether part of the Gram is what was written; parts that are no tile, nor a mirror image, are."""
        place = (rows.start, rows.stop, columns.start, columns.stop)
        if place in self.checksums:
            return codecs.checksum(values) == self.checksums[place]
        mirrored = self.checksums.get((*place[2:], *place[:2]))
        return mirrored is None or codecs.checksum(values.T) == mirrored


def read_tile_checksums(folder: Path, n_samples: int, size: int) -> TileChecksums:
    """Return the checksums of all tiles of a finished Gram.

    Args:
        folder: of the markers.
        n_samples: rows of the Gram.
        size: rows of a tile.

    Raises:
        CorruptRunError: a marker is missing, damaged, or that of another place.
    """
    edge, there = -(-n_samples // size), sum(1 for _ in folder.glob("*-*.json"))
    if edge * (edge + 1) // 2 > there:  # before anything is made as large as the marker of the Gram says
        raise CorruptRunError(
            f"{folder} has markers of {there} tiles where a Gram of {n_samples} samples has {edge * (edge + 1) // 2}; "
            "`streamfisher gram --rebuild` remakes it."
        )
    ranges = [(start, min(start + size, n_samples)) for start in range(0, n_samples, size)]
    names = {f"{i}-{j}": (*ranges[i], *ranges[j]) for i, j in combinations_with_replacement(range(len(ranges)), 2)}
    checksums = {}
    for name in sorted(names):
        path, place = folder / f"{name}.json", names[name]
        marker = read_json(path)
        require_form(marker, TILE, path)
        if (*marker["rows"], *marker["columns"]) != place:
            raise CorruptRunError(
                f"{path} is not the marker of this tile: it says {marker['rows']}, {marker['columns']}."
            )
        checksums[place] = marker["crc32c"]
    return TileChecksums(checksums)


def gram_checksums(marker: Mapping[str, Any], folder: Path) -> int | list[int]:
    """Return the CRC-32C of a finished Gram, or of each of its tiles, as it was written.

    Args:
        marker: of the Gram.
        folder: of the markers of its tiles.

    Raises:
        CorruptRunError: the marker of a tile is missing or damaged.
    """
    if "tiles" not in marker:
        return int(marker["crc32c"])
    return list(read_tile_checksums(folder, marker["n_samples"], marker["tiles"]).checksums.values())
