"""The arrays of a run: gradient rows, what was seen per sample, and Grams, each with its completion marker.

    RUN.zarr/
      manifest.json            what the run is made of
      gradients/<parameter>    (N, P_k)   rows, in the stored dtype
      samples/loss             (N,)       float64
      samples/n_targets        (N,)       int64, target tokens
      samples/valid            (N,)       uint8, 0 where a sample was skipped
      samples/squared_norm     (N, K)     float64, per parameter
      fields/<name>            (N,)       float64, scalars that the data gives with every sample
      mean/<parameter>         (P_k,)     float64, only where rows are stored centered
      mean_parts/<parameter>   (units, P_k) float64 sums of the mean pass
      gram/<parameter>         (N, N)     float64, of the rows as stored
      gram_mean/<parameter>    (N + 1,)   float64, rows times the mean, and the mean's square (centered rows only)
      moment/<parameter>       (P_k + 1, P_k) float64, G^T G and, last, the sum of the rows, where P_k < N
      done/*.json              what is finished, with checksums

Nothing counts as written until its marker exists; a chunk that is missing reads as NaN.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from streamfisher.config import parse_dtype
from streamfisher.errors import CorruptRunError, RunError
from streamfisher.moment import Moment
from streamfisher.samples import Unit, make_units
from streamfisher.store import codecs
from streamfisher.store.durable import read_json, sweep_partials, write_json
from streamfisher.store.layout import create_run, node_name
from streamfisher.store.manifest import Manifest

#: Rows and columns of a chunk of a Gram.
GRAM_CHUNK = 1024


@dataclass(frozen=True)
class UnitRecord:
    """What one unit of samples gave: everything that is written before its marker."""

    unit: Unit
    rows: Mapping[str, Tensor]  # name -> (len(unit), P_k) on the CPU
    losses: np.ndarray  # (len(unit),) float64
    n_targets: np.ndarray  # (len(unit),) int64
    squared_norms: np.ndarray  # (len(unit), K) float64
    skipped: Mapping[int, str]  # sample number -> why its row is zero and does not count


class RunStore:
    """An open run folder. Cheap to open and to pickle (workers open it again by its path)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists():
            raise RunError(f"{self.path} does not exist; make it with `streamfisher run MODEL DATA --out {self.path}`.")
        if not (self.path / "manifest.json").is_file():
            raise RunError(
                f"{self.path} is not a streamfisher run: it has no manifest.json. "
                "Name another folder, or delete this one if it is the remains of a run that never began."
            )
        self.manifest = Manifest.from_dict(read_json(self.path / "manifest.json"))
        self.parameters: dict[str, int] = {
            item["name"]: int(np.prod(item["shape"], dtype=np.int64)) for item in self.manifest.parameters
        }
        self.n_samples: int = self.manifest.data["n_samples"]
        self.chunk_rows: int = self.manifest.layout["chunk_rows"]
        self.store_dtype: torch.dtype = parse_dtype(self.manifest.layout["dtype_store"])
        self.row_dtype: torch.dtype = parse_dtype(self.manifest.layout["dtype_row"])
        self.centered: bool = self.manifest.layout["centered"]
        self.units = make_units(self.n_samples, self.chunk_rows)
        self._arrays: dict[str, zarr.Array] = {}

    def __reduce__(self) -> tuple[type[RunStore], tuple[Path]]:
        return RunStore, (self.path,)

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> RunStore:
        """Lay out an empty run and open it.

        Raises:
            RunError: the folder exists and holds something that is not the remains of an unfinished creation.
        """
        create_run(Path(path), manifest)
        return cls(path)

    # Units of gradient rows

    def done_units(self, stage: str = "rows") -> set[int]:
        """Return the indices of the units of `stage` ('rows' or 'mean') whose markers exist."""
        prefix = f"{stage}-"
        return {int(path.stem[len(prefix) :]) for path in (self.path / "done").glob(f"{prefix}*.json")}

    def todo(self, stage: str = "rows") -> list[Unit]:
        """Return the units of `stage` that are not done yet."""
        done = self.done_units(stage)
        return [unit for unit in self.units if unit.index not in done]

    def write_unit(self, record: UnitRecord) -> None:
        """Write everything of a unit, then its marker."""
        where = slice(record.unit.start, record.unit.stop)
        checksums = {}
        for name in self.parameters:
            stored = codecs.encode(record.rows[name], self.store_dtype)
            self._array(f"gradients/{node_name(name)}")[where] = stored
            checksums[name] = codecs.checksum(stored)
        valid = np.ones(len(record.unit), dtype=np.uint8)
        for sample in record.skipped:
            valid[sample - record.unit.start] = 0
        self._array("samples/loss")[where] = record.losses
        self._array("samples/n_targets")[where] = record.n_targets
        self._array("samples/valid")[where] = valid
        self._array("samples/squared_norm")[where] = record.squared_norms
        self._mark(
            f"rows-{record.unit.index:06d}",
            {
                "start": record.unit.start,
                "stop": record.unit.stop,
                "crc32c": checksums,
                "skipped": {str(sample): reason for sample, reason in record.skipped.items()},
            },
        )

    def write_mean_part(self, unit: Unit, sums: Mapping[str, np.ndarray], count: int) -> None:
        """Write the float64 sums of a unit's valid rows, then its marker (the mean pass)."""
        for name, total in sums.items():
            self._array(f"mean_parts/{node_name(name)}")[unit.index] = total
        self._mark(f"mean-{unit.index:06d}", {"start": unit.start, "stop": unit.stop, "count": count})

    def finish_mean(self) -> None:
        """Add the parts of the mean pass in the order of the units and write the mean gradient."""
        counts = [read_json(self.path / "done" / f"mean-{unit.index:06d}.json")["count"] for unit in self.units]
        for name, columns in self.parameters.items():
            parts, mean = self._array(f"mean_parts/{node_name(name)}"), self._array(f"mean/{node_name(name)}")
            for start in range(0, columns, 1 << 20):
                stop = min(start + (1 << 20), columns)
                total = np.zeros(stop - start)
                for unit in self.units:
                    total += parts[unit.index, start:stop]
                mean[start:stop] = total / max(sum(counts), 1)
        self._mark("mean", {"count": sum(counts)})

    # Reading rows (the interface that the Gram stage uses)

    def chunk_columns(self, name: str) -> int:
        """Return the columns of one stored chunk of a parameter."""
        return self._array(f"gradients/{node_name(name)}").chunks[1]

    def columns(self, name: str, start: int, stop: int, rows: slice | None = None) -> np.ndarray:
        """Return columns `start` to `stop` of a parameter's rows, as stored: (N, stop - start) float32 or float64.

        Args:
            name: of the parameter.
            start: first column.
            stop: one past the last column.
            rows: a range of samples; `None` means all.

        Raises:
            CorruptRunError: a chunk fails its checksum.
        """
        first, last, _ = (rows or slice(None)).indices(self.n_samples)
        try:
            stored = self._array(f"gradients/{node_name(name)}")[first:last, start:stop]
        except (ValueError, RuntimeError, OSError) as error:
            raise CorruptRunError(
                f"{self.path}: a chunk of parameter {name} (columns {start} to {stop}) cannot be read: {error}. "
                "Run `streamfisher verify` to find which samples are affected."
            ) from error
        return codecs.decode(stored, self.store_dtype)

    def mean(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return the mean gradient that was subtracted from the rows, float64; `None` where rows are uncentered."""
        return self._array(f"mean/{node_name(name)}")[start:stop] if self.centered else None

    @property
    def unit_roundoff(self) -> float:
        """Return the largest relative error that storing put on an entry of a row."""
        bits = self.manifest.layout["bitround"]
        return 2.0 ** -(bits + 1) if bits is not None else float(torch.finfo(self.store_dtype).eps) / 2

    @property
    def norm_tolerance(self) -> float:
        """Return how far a squared row norm may be from the one seen while collecting, relatively."""
        return 4 * self.unit_roundoff + (1e-9 if self.row_dtype == torch.float64 else 1e-4)

    def write_fields(self, fields: Mapping[str, np.ndarray]) -> None:
        """Write what the data says of every sample, (N,) float64 each, for selecting samples later."""
        for name, values in fields.items():
            self._write_array(f"fields/{node_name(name)}", values, ("sample",), {"field": name})

    def fields(self) -> dict[str, np.ndarray]:
        """Return `{name: (N,) float64}`: per-sample facts to select by: the data's own scalars, `loss`, `n_targets`."""
        found = {name: self.per_sample(name).astype(np.float64) for name in ("loss", "n_targets")}
        for path in sorted((self.path / "fields").glob("*/zarr.json")):
            array = zarr.open_array(path.parent, mode="r")
            found[str(array.attrs["field"])] = np.asarray(array[: self.n_samples])
        return found

    def require_rows(self) -> None:
        """Refuse to go on while units are missing.

        Raises:
            RunError: the run is not fully collected; the message says how far it is.
        """
        todo = self.todo()
        if todo:
            done = sum(len(unit) for unit in self.units) - sum(len(unit) for unit in todo)
            raise RunError(
                f"{self.path} is not finished: {done} of {self.n_samples} samples have gradients. "
                "Run the command that made it again; it goes on where it stopped."
            )

    def read_unit(self, name: str, unit: Unit) -> np.ndarray:
        """Return one parameter's stored bits of a unit: (len(unit), P_k) in the stored dtype."""
        return self._array(f"gradients/{node_name(name)}")[unit.start : unit.stop]

    def read_sample_values(self, what: str, unit: Unit) -> np.ndarray:
        """Return `loss`, `n_targets`, `valid` or `squared_norm` of the samples of a unit."""
        return self._array(f"samples/{what}")[unit.start : unit.stop]

    def marker(self, unit: Unit) -> dict[str, Any]:
        """Return the marker of a finished unit of rows."""
        return read_json(self.path / "done" / f"rows-{unit.index:06d}.json")

    def forget_unit(self, unit: Unit) -> None:
        """Remove the marker of a unit, so that the next run computes it again."""
        (self.path / "done" / f"rows-{unit.index:06d}.json").unlink(missing_ok=True)

    def per_sample(self, what: str) -> np.ndarray:
        """Return `loss`, `n_targets`, `valid` or `squared_norm` of all samples.

        Raises:
            CorruptRunError: a chunk fails its checksum.
        """
        try:
            return self._array(f"samples/{what}")[: self.n_samples]
        except (ValueError, RuntimeError, OSError) as error:
            raise CorruptRunError(
                f"{self.path}: samples/{what} cannot be read: {error}. `streamfisher verify` finds which samples are "
                "affected, and the next `run` computes them again."
            ) from error

    def skipped(self) -> dict[int, str]:
        """Return `{sample number: reason}` of the samples that do not count."""
        found: dict[int, str] = {}
        for index in sorted(self.done_units()):
            marker = read_json(self.path / "done" / f"rows-{index:06d}.json")
            found |= {int(sample): reason for sample, reason in marker["skipped"].items()}
        return found

    # Grams

    def grams_done(self, settings: Mapping[str, Any]) -> set[str]:
        """Return the parameters whose Gram exists for all samples and was made with `settings`."""
        done = set()
        for name in self.parameters:
            path = self.path / "done" / f"gram-{node_name(name)}.json"
            try:
                marker = read_json(path) if path.is_file() else {}
                if marker and marker["settings"] == dict(settings) and marker["n_samples"] == self.n_samples:
                    done.add(name)
            except (CorruptRunError, KeyError, TypeError):
                continue  # a damaged marker is none: the Gram is built again
        return done

    def grams_of_fewer(self, settings: Mapping[str, Any]) -> dict[str, int]:
        """Return the parameters whose Gram was made before the run grew, with how many of its rows are still those."""
        found = {}
        for name in self.parameters:
            path = self.path / "done" / f"gram-{node_name(name)}.json"
            try:
                marker = read_json(path) if path.is_file() else {}
                if marker and marker["settings"] == dict(settings) and marker["n_samples"] < self.n_samples:
                    # A last unit that was not full has been computed again.
                    found[name] = marker["n_samples"] // self.chunk_rows * self.chunk_rows
            except (CorruptRunError, KeyError, TypeError):
                continue  # built from scratch
        return {name: rows for name, rows in found.items() if rows}

    def has_gram(self, name: str) -> bool:
        """Return whether a parameter's Gram is marked as finished, whatever it was made with."""
        return (self.path / "done" / f"gram-{node_name(name)}.json").is_file()

    def write_gram(
        self, name: str, gram: np.ndarray, mean_products: np.ndarray | None, settings: Mapping[str, Any]
    ) -> None:
        """Write one parameter's Gram, (N, N) float64, then its marker."""
        marker = self.path / "done" / f"gram-{node_name(name)}.json"
        marker.unlink(missing_ok=True)
        self._write_array(f"gram/{node_name(name)}", gram, ("sample", "sample_j"), {"parameter": name, **settings})
        shutil.rmtree(self.path / "done" / f"tiles-{node_name(name)}", ignore_errors=True)
        if mean_products is not None:
            self.write_mean_products(name, mean_products)
        checksum = codecs.checksum(gram)
        self._mark(marker.stem, {"settings": dict(settings), "n_samples": len(gram), "crc32c": checksum})

    def read_gram(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return one parameter's Gram (N, N) float64 and, for centered rows, its products with the mean (N + 1,).

        Raises:
            CorruptRunError: it does not match the checksum it was written with.
        """
        marker = read_json(self.path / "done" / f"gram-{node_name(name)}.json")
        try:
            tiled = "tiles" in marker
            checksum = None if tiled else marker["crc32c"]
            gram = zarr.open_array(self.path / "gram" / node_name(name), mode="r")[...]
            products = None
            if self.centered:
                products = zarr.open_array(self.path / "gram_mean" / node_name(name), mode="r")[...]
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise CorruptRunError(
                f"{self.path}: the Gram of {name} cannot be read: {error}. `streamfisher gram --rebuild` remakes it."
            ) from error
        if tiled:
            self._check_tiles(name, gram)
        elif codecs.checksum(gram) != checksum:
            raise CorruptRunError(
                f"{self.path}: the Gram of {name} is not what was written; `streamfisher gram --rebuild` remakes it."
            )
        return gram, products

    def forget_gram(self, name: str) -> None:
        """Remove the marker of a Gram, and of what is kept beside it, so that it is built again."""
        for kind in ("gram", "moment"):
            (self.path / "done" / f"{kind}-{node_name(name)}.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / "done" / f"tiles-{node_name(name)}", ignore_errors=True)

    def check_gram(self, name: str) -> None:
        """Read a Gram, by tiles where it was written so, and compare checksums.

        Raises:
            CorruptRunError: it is not what was written.
        """
        if "tiles" in read_json(self.path / "done" / f"gram-{node_name(name)}.json"):
            self._check_tiles(name, None)
        else:
            self.read_gram(name)

    def gram_checksums(self, name: str) -> int | list[int]:
        """Return the CRC-32C of a Gram, or of each of its tiles, as it was written."""
        marker = read_json(self.path / "done" / f"gram-{node_name(name)}.json")
        return [tile["crc32c"] for tile in self._tile_markers(name)] if "tiles" in marker else marker["crc32c"]

    def create_gram(self, name: str, chunk: int, settings: Mapping[str, Any]) -> None:
        """Lay out a Gram that is going to be written tile by tile."""
        shape = (self.n_samples, self.n_samples)
        self._create_array(
            f"gram/{node_name(name)}", shape, ("sample", "sample_j"), {"parameter": name, **settings}, chunk
        )

    def write_mean_products(self, name: str, products: np.ndarray) -> None:
        """Write the products of centered rows with the mean, and of the mean with itself: (N + 1,)."""
        self._write_array(f"gram_mean/{node_name(name)}", products, ("sample_and_mean",), {"parameter": name})

    def _tile_markers(self, name: str) -> list[dict[str, Any]]:
        folder = self.path / "done" / f"tiles-{node_name(name)}"
        return [read_json(path) for path in sorted(folder.glob("*-*.json"))]

    def _check_tiles(self, name: str, gram: np.ndarray | None) -> None:
        """Compare the tiles of a Gram, held in memory or read one at a time, with their checksums."""
        for marker in self._tile_markers(name):
            rows, columns = slice(*marker["rows"]), slice(*marker["columns"])
            tile = self.gram_tile(name, rows, columns) if gram is None else gram[rows, columns]
            mirrored = self.gram_tile(name, columns, rows) if gram is None else gram[columns, rows]
            if codecs.checksum(tile) != marker["crc32c"] or not np.array_equal(tile, mirrored.T):
                raise CorruptRunError(
                    f"{self.path}: the Gram of {name} is not what was written between samples {rows.start} to "
                    f"{rows.stop - 1} and {columns.start} to {columns.stop - 1}; `streamfisher gram --rebuild` "
                    "remakes it."
                )

    def gram_tile(self, name: str, rows: slice, columns: slice) -> np.ndarray:
        """Return part of a finished Gram, float64, without reading the rest.

        Raises:
            CorruptRunError: a chunk of it is missing or fails its checksum.
        """
        try:  # opened each time: a rebuild makes the array anew
            part = zarr.open_array(self.path / "gram" / node_name(name), mode="r")[rows, columns]
        except (ValueError, RuntimeError, OSError) as error:
            raise CorruptRunError(
                f"{self.path}: the Gram of {name} cannot be read: {error}. `streamfisher gram --rebuild` remakes it."
            ) from error
        return part

    def gram_mean_products(self, name: str) -> np.ndarray | None:
        """Return the products of a parameter's rows with their mean, (N + 1,), where rows are stored centered."""
        return self._array(f"gram_mean/{node_name(name)}")[...] if self.centered else None

    def write_moment(self, name: str, moment: Moment) -> None:
        """Write the second moment and, as a last row, the sum of a parameter's rows: (P + 1, P); then the marker."""
        values = np.vstack([moment.second, moment.total])
        (self.path / "done" / f"moment-{node_name(name)}.json").unlink(missing_ok=True)
        self._write_array(f"moment/{node_name(name)}", values, ("row", f"element of {name}"), {"parameter": name})
        facts = {"n_samples": self.n_samples, "count": moment.count, "crc32c": codecs.checksum(values)}
        self._mark(f"moment-{node_name(name)}", facts)

    def read_moment(self, name: str) -> Moment | None:
        """Return the second moment of a parameter's valid rows; `None` where there is none for all samples.

        Raises:
            CorruptRunError: it does not match the checksum it was written with.
        """
        path = self.path / "done" / f"moment-{node_name(name)}.json"
        marker = read_json(path) if path.is_file() else {}
        if marker.get("n_samples") != self.n_samples:
            return None
        try:
            values = zarr.open_array(self.path / "moment" / node_name(name), mode="r")[...]
            count, checksum = marker["count"], marker["crc32c"]
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise CorruptRunError(
                f"{self.path}: the moment of {name} cannot be read: {error}. `streamfisher gram --rebuild` remakes it."
            ) from error
        if codecs.checksum(values) != checksum:
            raise CorruptRunError(
                f"{self.path}: the moment of {name} is not what was written; `streamfisher gram --rebuild` remakes it."
            )
        return Moment(values[:-1], values[-1], count, self.mean(name, 0, values.shape[1]))

    def sweep(self) -> int:
        """Delete what interrupted writes left behind; only while holding the lock."""
        return sweep_partials(self.path)

    def bytes_on_disk(self) -> int:
        """Return the size of all files of the run."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def _mark(self, name: str, content: Mapping[str, Any]) -> None:
        write_json(self.path / "done" / f"{name}.json", dict(content))

    def _array(self, path: str) -> zarr.Array:
        if path not in self._arrays:
            try:
                self._arrays[path] = zarr.open_array(self.path / path, mode="r+")
            except (FileNotFoundError, ValueError, KeyError) as error:
                raise CorruptRunError(f"{self.path / path} is missing or damaged: {error}") from error
        return self._arrays[path]

    def _write_array(
        self, path: str, values: np.ndarray, dimensions: Sequence[str], attributes: Mapping[str, Any]
    ) -> None:
        self._create_array(path, values.shape, dimensions, attributes)[...] = values

    def _create_array(
        self,
        path: str,
        shape: tuple[int, ...],
        dimensions: Sequence[str],
        attributes: Mapping[str, Any],
        chunk: int = GRAM_CHUNK,
    ) -> zarr.Array:
        self._arrays.pop(path, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            return zarr.create_array(
                self.path,
                name=path,
                shape=shape,
                chunks=tuple(min(size, chunk) for size in shape),
                dtype="float64",
                fill_value=float("nan"),
                compressors=codecs.compressors("zstd", torch.float64),
                dimension_names=tuple(dimensions),
                attributes=dict(attributes),
                config={"write_empty_chunks": True},
                overwrite=True,
            )
