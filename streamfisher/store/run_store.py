"""The arrays of a run: gradient rows, what was seen per sample, and Grams, each with its completion marker.

    RUN.zarr/
      manifest.json            what the run is made of
      gradients/<parameter>    (N, P_k)   rows, in the stored dtype
      factors/<wave>/...                  what rows are products of, see `factors.py`
      samples/loss             (N,)       float64
      samples/n_targets        (N,)       int64, target tokens
      samples/valid            (N,)       uint8, 0 where a sample was skipped
      samples/squared_norm     (N, K)     float64, per parameter
      fields/<name>            (N,)       float64, scalars that the data gives with every sample
      mean/<parameter>         (P_k,)     float64, only where rows are stored centered
      mean_parts/<parameter>   (units, P_k) float64 sums of the mean pass
      gram/<key>               (N, N)     float64, of the rows as stored; a key is a parameter, or a group of them
      gram_mean/<key>          (N + 1,)   float64, rows times the mean, and the mean's square (centered rows only)
      moment/<parameter>       (P_k + 1, P_k) float64, G^T G and, last, the sum of the rows, where P_k < N
      done/*.json              what is finished, with checksums

Nothing counts as written until its marker exists; a chunk that is missing reads as NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
import zarr
from torch import Tensor

from streamfisher.config import parse_dtype
from streamfisher.data.batches import Unit, make_units
from streamfisher.errors import CorruptRunError, RunError, unreadable
from streamfisher.gradients.factors import BatchFactors
from streamfisher.runtime.durable import read_json, sweep_partials, write_json, write_marker
from streamfisher.store import codecs
from streamfisher.store.factors import write_factors
from streamfisher.store.grams import GramStore
from streamfisher.store.integrity import check_layout, chunk_digest, require_inside
from streamfisher.store.layout import MANIFEST_COPY, create_run
from streamfisher.store.manifest import Manifest, columns_of
from streamfisher.store.markers import stage_of
from streamfisher.store.means import MeanStore
from streamfisher.store.names import node_name
from streamfisher.store.rows import RowReader
from streamfisher.store.sample_values import SampleValues
from streamfisher.store.waves import WaveState


@dataclass(frozen=True)
class UnitRecord:
    """What one unit of samples gave: everything that is written before its marker."""

    unit: Unit
    rows: Mapping[str, Tensor]  # name -> (len(unit), P_k) on the CPU, of parameters that are held as rows
    losses: np.ndarray  # (len(unit),) float64
    n_targets: np.ndarray  # (len(unit),) int64
    squared_norms: Mapping[str, np.ndarray]  # name -> (len(unit),) float64, of all parameters of the pass
    skipped: Mapping[int, str]  # sample number -> why its row is zero and does not count
    factors: Sequence[Mapping[str, Any]] = ()  # what `write_factors` returned for each batch
    wave: int = 0


class RunStore(RowReader, SampleValues, WaveState, MeanStore, GramStore):
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
        self.parameters: dict[str, int] = {  # numbers of a stored row
            item["name"]: columns_of(item) for item in self.manifest.parameters
        }
        self.n_samples: int = self.manifest.data["n_samples"]
        self.chunk_rows: int = self.manifest.layout["chunk_rows"]
        self.store_dtype: torch.dtype = parse_dtype(self.manifest.layout["dtype_store"])
        self.row_dtype: torch.dtype = parse_dtype(self.manifest.layout["dtype_row"])
        self.centered: bool = self.manifest.layout["centered"]
        self.units = make_units(self.n_samples, self.chunk_rows)
        self.waves = self.manifest.waves
        self.gram_members = self.manifest.gram_members
        self.keep: list[str] = self.manifest.layout.get("keep", ["*"])
        self.batch_tokens: int = self.manifest.layout.get("batch_tokens", self.manifest.config["batch_tokens"])
        self.fsync = False  # flush the filesystem before each marker
        self._markers: dict[tuple[int, int], dict[str, Any]] = {}  # (wave, unit) -> its marker, once read
        self._means: set[str] = set()  # parameters whose mean is known to be what was written
        self._bound: set[tuple[str, int]] = set()  # (parameter, unit) whose chunks are known to be in their places
        self._arrays: dict[str, zarr.Array] = {}

    def __reduce__(self) -> tuple[type[RunStore], tuple[Path], dict[str, bool]]:
        return RunStore, (self.path,), {"fsync": self.fsync}

    @classmethod
    def create(cls, path: str | Path, manifest: Manifest) -> RunStore:
        """Lay out an empty run and open it.

        Raises:
            RunError: the folder exists and holds something that is not the remains of an unfinished creation.
        """
        create_run(Path(path), manifest)
        return cls(path)

    def done_units(self, stage: str = "rows") -> set[int]:
        """Return the indices of the units of `stage` ('rows', 'mean', or `stage_of(wave)`) whose markers exist."""
        prefix = f"{stage}-"
        names = (path.stem[len(prefix) :] for path in (self.path / "done").glob(f"{prefix}*.json"))
        return {int(name) for name in names if len(name) >= 6 and name.isdecimal() and int(name) < len(self.units)}

    def is_done(self, unit: Unit, wave: int = 0) -> bool:
        """Return whether one unit has its marker in a wave: one look, where `done_units` lists the folder."""
        return (self.path / "done" / f"{stage_of(wave)}-{unit.index:06d}.json").is_file()

    def todo(self, stage: str = "rows") -> list[Unit]:
        """Return the units of `stage` that are not done yet."""
        done = self.done_units(stage)
        return [unit for unit in self.units if unit.index not in done]

    def finished_units(self) -> set[int]:
        """Return the indices of the units that are done in every wave."""
        return set.intersection(*(self.done_units(stage_of(wave)) for wave in range(len(self.waves))))

    @property
    def is_collected(self) -> bool:
        """Return whether every unit is done in every wave."""
        return len(self.finished_units()) == len(self.units)

    def write_factors(self, unit: Unit, batch: int, start: int, packed: BatchFactors, wave: int = 0) -> dict[str, Any]:
        """Write the factors of one batch of a unit; return what belongs into the unit's record."""
        folder = self._factor_folder(wave)
        return write_factors(folder, unit.index, batch, start, packed, self.manifest.layout["codec"])

    def write_unit(self, record: UnitRecord) -> None:
        """Write everything of a unit in one wave, then its marker."""
        wave = record.wave
        where = slice(record.unit.start, record.unit.stop)
        checksums, chunks = {}, {}
        for name, rows in record.rows.items():
            stored = codecs.encode(rows, self.store_dtype)
            self._array(f"gradients/{node_name(name)}")[where] = stored
            checksums[name] = codecs.checksum(stored)
            chunks[name] = chunk_digest(self._chunks(name, record.unit))
        valid = np.ones(len(record.unit), dtype=np.uint8)
        for sample in record.skipped:
            valid[sample - record.unit.start] = 0
        norms = np.full((len(record.unit), len(self.parameters)), np.nan)
        if len(self.waves) > 1:
            valid, norms = self._of_other_waves(record.unit, wave, valid, norms)
        columns = {name: column for column, name in enumerate(self.parameters)}
        for name, values in record.squared_norms.items():
            norms[:, columns[name]] = values
        self._array("samples/loss")[where] = record.losses
        self._array("samples/n_targets")[where] = record.n_targets
        self._array("samples/valid")[where] = valid
        self._array("samples/squared_norm")[where] = norms
        content = {
            "start": record.unit.start,
            "stop": record.unit.stop,
            "wave": wave,
            "crc32c": checksums,
            "chunks": chunks,
            "samples": self._digests(
                wave, {"loss": record.losses, "n_targets": record.n_targets, "squared_norm": norms}
            ),
            "skipped": {str(sample): reason for sample, reason in record.skipped.items()},
        }
        if record.factors:
            content["factors"] = list(record.factors)
        self._markers.pop((wave, record.unit.index), None)
        self._mark(f"{stage_of(wave)}-{record.unit.index:06d}", content)

    def _of_other_waves(
        self, unit: Unit, wave: int, valid: np.ndarray, norms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Put what other waves have found beside this one's: norms of their parameters, and samples they skipped."""
        where = slice(unit.start, unit.stop)
        done = [w for w in range(len(self.waves)) if w != wave and self.is_done(unit, w)]
        try:
            found = self._array("samples/squared_norm")[where]
        except (ValueError, RuntimeError, OSError):  # damaged, and now written anew
            found = norms
        columns = {name: column for column, name in enumerate(self.parameters)}
        for other in done:
            places = [columns[name] for name in self.waves[other]]
            norms[:, places] = found[:, places]
            for sample in self.marker(unit, other)["skipped"]:
                valid[int(sample) - unit.start] = 0
        return valid, norms

    def require_rows(self) -> None:
        """Refuse to go on while units are missing.

        Raises:
            RunError: the run is not fully collected; the message says how far it is.
        """
        for wave in range(len(self.waves)):
            todo = self.todo(stage_of(wave))
            if todo:
                done = self.n_samples - sum(len(unit) for unit in todo)
                where = f" in wave {wave + 1} of {len(self.waves)}" if len(self.waves) > 1 else ""
                raise RunError(
                    f"{self.path} is not finished: {done} of {self.n_samples} samples have gradients{where}. "
                    "Run the command that made it again; it goes on where it stopped."
                )

    def marker(self, unit: Unit, wave: int = 0) -> dict[str, Any]:
        """Return the marker of a finished unit in one wave.

        Raises:
            CorruptRunError: it is damaged, or that of another unit.
        """
        path = self.path / "done" / f"{stage_of(wave)}-{unit.index:06d}.json"
        marker = read_json(path)
        if not isinstance(marker, dict) or (marker.get("start"), marker.get("stop")) != (unit.start, unit.stop):
            raise CorruptRunError(f"{path} is not the marker of samples {unit.start} to {unit.stop - 1}.")
        if marker.get("wave", wave) != wave or not isinstance(marker.get("skipped"), dict):
            raise CorruptRunError(f"{path} is not the marker of wave {wave}.")
        return marker

    def forget_unit(self, unit: Unit, wave: int | None = None) -> None:
        """Remove the markers of a unit, in one wave or in all, so that the next run computes it again."""
        for index in range(len(self.waves)) if wave is None else (wave,):
            (self.path / "done" / f"{stage_of(index)}-{unit.index:06d}.json").unlink(missing_ok=True)
            self._markers.pop((index, unit.index), None)

    def sweep(self) -> int:
        """Delete what interrupted writes left behind and renew the manifest's copy; only while holding the lock."""
        copy = self.path / MANIFEST_COPY
        try:
            current = copy.is_file() and read_json(copy) == self.manifest.to_dict()
        except CorruptRunError:
            current = False
        if not current:
            write_json(copy, self.manifest.to_dict())
        return sweep_partials(self.path)

    def bytes_on_disk(self) -> int:
        """Return the size of all files of the run."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def mark_result(self, path: Path) -> None:
        """Note the checksum of a file of results in the run, so that it can be verified."""
        (self.path / "done" / "results").mkdir(exist_ok=True)
        write_json(
            self.path / "done" / "results" / f"{path.name}.json", {"crc32c": google_crc32c.value(path.read_bytes())}
        )

    def wrong_results(self) -> list[str]:
        """Return the files of results that are missing or not what was written."""
        found = []
        for marker in sorted((self.path / "done" / "results").glob("*.json")):
            path = self.path / marker.stem
            try:
                right = read_json(marker)["crc32c"] == google_crc32c.value(path.read_bytes())
            except (OSError, KeyError, TypeError, CorruptRunError):
                right = False
            if not right:
                found.append(path.name)
        return found

    def _mark(self, name: str, content: Mapping[str, Any]) -> None:
        write_marker(self.path / "done" / f"{name}.json", dict(content), fsync=self.fsync)

    def _array(self, path: str) -> zarr.Array:
        if path not in self._arrays:
            require_inside(self.path, self.path / path)
            try:
                self._arrays[path] = zarr.open_array(self.path / path, mode="r+")
                self._check_array(path, self._arrays[path])
            except CorruptRunError:
                self._arrays.pop(path, None)
                raise
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise unreadable(error, f"{self.path / path} is missing or damaged: {error}") from error
        return self._arrays[path]

    def _check_array(self, path: str, array: zarr.Array) -> None:
        """Refuse an array that is not as the manifest has it."""
        kind, node = path.split("/")
        rows, names = self.chunk_rows, {node_name(name): name for name in self.parameters}
        if kind == "gradients":
            item = next(item for item in self.manifest.parameters if item["name"] == names[node])
            shape, chunks = (self.n_samples, self.parameters[names[node]]), (rows, item["chunk_columns"])
            dtype = codecs.stored_dtype(self.store_dtype)
        elif kind == "samples":
            wide = (len(self.parameters),) if node == "squared_norm" else ()
            shape, chunks = (self.n_samples, *wide), (rows, *wide)
            dtype = {"n_targets": "int64", "valid": "uint8"}.get(node, "float64")
        else:
            first = (len(self.units),) if kind == "mean_parts" else ()
            shape = (*first, self.parameters[names[node]])
            chunks, dtype = (*(1 for _ in first), min(shape[-1], 1 << 20)), "float64"
        check_layout(
            array, self.path / path, shape, chunks, dtype, longer=kind in ("gradients", "samples", "mean_parts")
        )
