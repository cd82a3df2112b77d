"""Grams of a run that are written tile by tile, each with its marker: `done/tiles-PARAMETER/ROW-COLUMN.json`.

The array is that of any other Gram, `gram/PARAMETER`; its marker `done/gram-PARAMETER.json` says `tiles`, the rows of a
tile, instead of a checksum of the whole, which nobody could compute without holding it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.errors import CorruptRunError
from streamfisher.reduction.moment import stored_moment
from streamfisher.reduction.tiles import FinishedTile, Tile
from streamfisher.runtime.durable import read_json, write_json, write_marker
from streamfisher.runtime.own_files import remove_tree
from streamfisher.solving.tiled_gram import TILE
from streamfisher.store import codecs, forms
from streamfisher.store.arrays import CHUNK
from streamfisher.store.names import node_name
from streamfisher.store.opening import open_array
from streamfisher.store.run_store import RunStore


class StoredTiles:
    """Checks and writes tiles, and knows which are there; picklable for Dask workers.

    Args:
        store: of the run; only while holding its lock.
        settings: what decides the bits of a Gram besides the rows.
        keys: the parameters of each Gram.
        subsampled: parameters whose Gram is of drawn columns, and has other norms than its rows.
        rebuild: build tiles that are finished too, and compare.
        size: rows of a tile.
    """

    def __init__(
        self,
        store: RunStore,
        settings: Mapping[str, Any],
        keys: Mapping[str, Sequence[str]],
        *,
        subsampled: frozenset[str] = frozenset(),
        rebuild: bool = False,
        size: int = TILE,
    ):
        self.store, self.settings, self.keys = store, dict(settings), {key: list(names) for key, names in keys.items()}
        self.subsampled, self.rebuild, self.size = subsampled, rebuild, size

    def todo(self, key: str, tiles: Sequence[Tile]) -> list[Tile]:
        """Return the tiles that are not finished; makes room, or more room where the run has grown."""
        n, folder = self.store.n_samples, self._folder(key)
        (self.store.path / "done" / f"gram-{node_name(key)}.json").unlink(missing_ok=True)
        identity = {"settings": self.settings, "tile": self.size, "parameters": self.keys[key]}
        before = _read(folder / "identity.json", forms.TILES)
        array = self.store.path / "gram" / node_name(key)
        if {name: before.get(name) for name in identity} != identity or not (array / "zarr.json").is_file():
            remove_tree(self.store.path, folder)  # markers first: none may speak of an array that is gone
            folder.mkdir(parents=True)
            self.store.grams.create(key, min(CHUNK, self.size), self.settings)
        # A last unit of rows that was not full has been computed again.
        known = (
            n
            if before.get("n_samples", n) == n
            else before["n_samples"] // self.store.chunk_rows * self.store.chunk_rows
        )
        done = {tile.key for tile in tiles if not self.rebuild and self._stands(key, tile, known)}
        for path in folder.glob("*-*.json"):
            if path.stem not in done:
                path.unlink()
        write_json(folder / "identity.json", identity | {"n_samples": n})
        stored = open_array(array, "r+")
        if stored.shape != (n, n):
            stored.resize((n, n))
        return [tile for tile in tiles if tile.key not in done]

    def write(self, key: str, finished: FinishedTile) -> tuple[float, float] | None:
        """Check a tile against the norms seen while collecting, write it and its mirror image, and mark it.

        Returns:
            For a rebuild, the squared norms of its change and of itself, mirror image included.

        Raises:
            CorruptRunError: stored rows do not have the norms they were collected with.
        """
        tile, values = finished.tile, finished.values
        if tile.row == tile.column:
            self._check_norms(key, tile, values.diagonal())
        array = open_array(self.store.path / "gram" / node_name(key), "r+")
        change = None
        if self.rebuild:
            old, times = array[tile.rows, tile.columns], 1 if tile.row == tile.column else 2
            change = (times * float(np.sum((values - old) ** 2)), times * float(np.vdot(values, values)))
        array[tile.rows, tile.columns] = values
        if tile.row != tile.column:
            array[tile.columns, tile.rows] = values.T
        products = finished.mean_products
        write_marker(
            self._folder(key) / f"{tile.key}.json",
            {
                "rows": [tile.rows.start, tile.rows.stop],
                "columns": [tile.columns.start, tile.columns.stop],
                "crc32c": codecs.checksum(values),
                **({} if products is None else {"mean_products": products.tolist()}),
            },
            fsync=self.store.fsync,
        )
        return change

    def finish(self, key: str, tiles: Sequence[Tile]) -> None:
        """Write what is kept beside the Gram, and mark it as complete."""
        products = None
        if self.store.centered:
            markers = [_read(self._folder(key) / f"{t.key}.json") for t in tiles if t.row == t.column]
            parts = [marker["mean_products"] for marker in markers if marker.get("mean_products")]
            if len(parts) < len(markers):
                raise CorruptRunError(f"{self._folder(key)} lacks products of rows with their mean; run it again.")
            products = np.array([v for part in parts for v in part[:-1]] + [parts[0][-1]])
        moment = stored_moment(self.store, key, self.subsampled)
        self.store.grams.finish_tiles(key, self.size, products, self.settings, moment)

    def _folder(self, key: str) -> Path:
        return self.store.path / "done" / f"tiles-{node_name(key)}"

    def _stands(self, key: str, tile: Tile, known: int) -> bool:
        """Return whether a tile is marked, of the same samples as now, and none of them was computed again since."""
        marker = _read(self._folder(key) / f"{tile.key}.json", forms.TILE)
        same = marker.get("rows") == [tile.rows.start, tile.rows.stop]
        same = same and marker.get("columns") == [tile.columns.start, tile.columns.stop]
        return same and max(tile.rows.stop, tile.columns.stop) <= known

    def _check_norms(self, key: str, tile: Tile, squares: np.ndarray) -> None:
        names = self.keys[key]
        if self.subsampled & set(names):
            return
        columns = [self.store.run.columns[name] for name in names]
        expected = self.store.samples.per_sample("squared_norm")[tile.rows][:, columns].sum(axis=1)
        wrong = tile.rows.start + np.flatnonzero(np.abs(squares - expected) > self.store.rows.norm_tolerance * expected)
        if len(wrong):
            raise CorruptRunError(
                f"{self.store.path}: the stored rows of {key} do not have the norms they were collected with "
                f"(samples {', '.join(map(str, wrong[:8]))}{' and more' if len(wrong) > 8 else ''}). "
                "`streamfisher verify` tells which chunks are affected."
            )


def _read(path: Path, form: forms.Form = forms.TILE) -> dict[str, Any]:
    """Return a marker; a damaged one is none."""
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = read_json(path)
        forms.require_form(found, form, path)
    except CorruptRunError:
        return {}
    return found
