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

import shutil
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
from streamfisher.errors import CorruptRunError, RunError, unreadable
from streamfisher.gradients.factors import BatchFactors, matrix_shape
from streamfisher.samples import Unit, make_units
from streamfisher.store import codecs
from streamfisher.store.arrays import CHUNK, write_array
from streamfisher.store.durable import read_json, sweep_partials, write_json, write_marker
from streamfisher.store.factored_rows import columns_of_segments
from streamfisher.store.factors import FactorSide, Segment, check_factors, delete_factors, segments_of, write_factors
from streamfisher.store.grams import GramStore
from streamfisher.store.integrity import check_layout, chunk_digest, digest_of_values, require_inside
from streamfisher.store.layout import MANIFEST_COPY, create_run
from streamfisher.store.manifest import Manifest
from streamfisher.store.names import node_name
from streamfisher.waves import is_kept

#: Bytes of a slab of float64 rows that is formed from factors at a time.
_FACTORED_SLAB = 64 << 20


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


class RunStore(GramStore):
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

    # Units of gradients

    def done_units(self, stage: str = "rows") -> set[int]:
        """Return the indices of the units of `stage` ('rows', 'mean', or `stage_of(wave)`) whose markers exist."""
        prefix = f"{stage}-"
        names = (path.stem[len(prefix) :] for path in (self.path / "done").glob(f"{prefix}*.json"))
        return {int(name) for name in names if len(name) >= 6 and name.isdecimal() and int(name) < len(self.units)}

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
        done = [w for w in range(len(self.waves)) if w != wave and unit.index in self.done_units(stage_of(w))]
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

    def write_mean_part(self, unit: Unit, sums: Mapping[str, np.ndarray], count: int) -> None:
        """Write the float64 sums of a unit's valid rows, then its marker (the mean pass)."""
        for name, total in sums.items():
            self._array(f"mean_parts/{node_name(name)}")[unit.index] = total
        content = {"start": unit.start, "stop": unit.stop, "count": count}
        content["crc32c"] = {name: codecs.checksum(np.asarray(total, dtype=np.float64)) for name, total in sums.items()}
        self._mark(f"mean-{unit.index:06d}", content)

    def finish_mean(self) -> None:
        """Add the parts of the mean pass in the order of the units and write the mean gradient."""
        markers = [self.mean_marker(unit) for unit in self.units]
        count = sum(marker["count"] for marker in markers)
        checksums = {}
        for name, columns in self.parameters.items():
            parts, mean = self._array(f"mean_parts/{node_name(name)}"), self._array(f"mean/{node_name(name)}")
            sums = [google_crc32c.Checksum() for _ in self.units]
            whole = google_crc32c.Checksum()
            for start in range(0, columns, 1 << 20):
                stop = min(start + (1 << 20), columns)
                total = np.zeros(stop - start)
                for unit in self.units:
                    part = parts[unit.index, start:stop]
                    sums[unit.index].update(part.tobytes())
                    total += part
                total /= max(count, 1)
                mean[start:stop] = total
                whole.update(total.tobytes())
            for unit, marker in zip(self.units, markers, strict=True):
                if marker.get("crc32c", {}).get(name) not in (None, _number(sums[unit.index])):
                    raise CorruptRunError(
                        f"{self.path}: the part of the mean of {name} of samples {unit.start} to {unit.stop - 1} is "
                        "not what was written; `streamfisher verify` lets the next `run` compute it again."
                    )
            checksums[name] = _number(whole)
        self._mark("mean", {"count": count, "crc32c": checksums})

    def mean_marker(self, unit: Unit) -> dict[str, Any]:
        """Return the marker of a unit of the mean pass.

        Raises:
            CorruptRunError: it is damaged, or that of another unit.
        """
        path = self.path / "done" / f"mean-{unit.index:06d}.json"
        marker = read_json(path)
        if not isinstance(marker, dict) or (marker.get("start"), marker.get("stop")) != (unit.start, unit.stop):
            raise CorruptRunError(f"{path} is not the marker of samples {unit.start} to {unit.stop - 1}.")
        if not isinstance(marker.get("count"), int):
            raise CorruptRunError(f"{path} does not say how many samples count.")
        return marker

    def wrong_mean_parts(self, unit: Unit) -> dict[str, str]:
        """Return `{parameter: what is wrong}` with the sums of a unit of the mean pass."""
        try:
            expected = self.mean_marker(unit).get("crc32c", {})
        except CorruptRunError as error:
            return {"": str(error)}
        wrong = {}
        for name in self.parameters:
            try:
                found = codecs.checksum(self._array(f"mean_parts/{node_name(name)}")[unit.index])
                if expected.get(name) not in (None, found):
                    wrong[name] = "not what was written"
            except (ValueError, RuntimeError, OSError) as error:
                wrong[name] = f"cannot be read ({error})"
        return wrong

    def check_mean(self, name: str) -> None:
        """Refuse a mean gradient that is not what was written.

        Raises:
            CorruptRunError: it is not, or cannot be read.
        """
        marker = read_json(self.path / "done" / "mean.json")
        found = google_crc32c.Checksum()
        try:
            expected = marker.get("crc32c", {}).get(name)
            array = self._array(f"mean/{node_name(name)}")
            for start in range(0, self.parameters[name], 1 << 20):
                found.update(array[start : start + (1 << 20)].tobytes())
        except (ValueError, RuntimeError, OSError, AttributeError) as error:
            if isinstance(error, CorruptRunError):
                raise
            raise unreadable(error, f"{self.path}: the mean of {name} cannot be read: {error}.") from error
        if expected not in (None, _number(found)):
            raise CorruptRunError(
                f"{self.path}: the mean of {name} is not what was written; `streamfisher verify` lets the next `run` "
                "add it up again."
            )

    # Reading rows (the interface that the Gram stage uses)

    def representation(self, name: str) -> str:
        """Return how a parameter's gradients are held: 'dense' or 'factors'."""
        return self.manifest.representation(name)

    def chunk_columns(self, name: str) -> int:
        """Return the columns of a parameter that are read together at no extra cost."""
        if self.representation(name) == "dense":
            return self._array(f"gradients/{node_name(name)}").chunks[1]
        _, width = matrix_shape(self.shape(name))
        return width * max(1, _FACTORED_SLAB // (8 * self.n_samples * width))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return next(tuple(item["shape"]) for item in self.manifest.parameters if item["name"] == name)

    def columns(self, name: str, start: int, stop: int, rows: slice | None = None) -> np.ndarray:
        """Return columns `start` to `stop` of a parameter's rows: (n, stop - start) float32 or float64.

        Args:
            name: of the parameter; whether it is held as rows or as factors makes no difference.
            start: first column.
            stop: one past the last column.
            rows: consecutive samples; `None` means all N.

        Raises:
            CorruptRunError: a chunk fails its checksum.
            RunError: the gradients were deleted after they were reduced.
        """
        first, last, _ = (rows or slice(None)).indices(self.n_samples)
        self._require_kept(name)
        if self.representation(name) == "factors":
            segments = self.segments(name)
            shape = matrix_shape(self.shape(name))
            return columns_of_segments(segments, shape, start, stop, first, last, self.numpy_row_dtype)
        self._require_bound(name)
        try:
            stored = self._array(f"gradients/{node_name(name)}")[first:last, start:stop]
        except (ValueError, RuntimeError, OSError) as error:
            raise unreadable(
                error,
                f"{self.path}: a chunk of parameter {name} (columns {start} to {stop}) cannot be read: {error}. "
                "Run `streamfisher verify` to find which samples are affected.",
            ) from error
        return codecs.decode(stored, self.store_dtype)

    def segments(self, name: str) -> list[Segment]:
        """Return the factors of a parameter, in the order of the samples.

        Raises:
            CorruptRunError: a marker is damaged.
            RunError: the gradients were deleted after they were reduced.
        """
        self._require_kept(name)
        self._require_bound(name)
        wave, found = self.wave_of(name), []
        for unit in self.units:
            found += segments_of(self._factor_folder(wave), name, unit.index, self.factor_entries(unit, wave))
        return found

    def factor_entries(self, unit: Unit, wave: int) -> list[dict[str, Any]]:
        """Return what the marker of a unit says of its batches' factors; empty where it has none or is not done."""
        if (wave, unit.index) not in self._markers:
            if unit.index not in self.done_units(stage_of(wave)):
                return []
            self._markers[wave, unit.index] = self.marker(unit, wave)
        return self._markers[wave, unit.index].get("factors", [])

    def factor_checksums(self, unit: Unit, wave: int, name: str) -> list[tuple[FactorSide, int]]:
        """Return every tensor that a parameter's factors are in, in one unit, with the checksum of its marker.

        Raises:
            CorruptRunError: the marker is damaged.
        """
        found = []
        entries = self.marker(unit, wave).get("factors", [])
        segments = iter(segments_of(self._factor_folder(wave), name, unit.index, entries))
        for entry in entries:
            for pair in entry["pairs"][name]:
                segment = next(segments)
                for key, side in zip(pair, (segment.left, segment.right), strict=True):
                    found.append((side, entry["sides"][key]["crc32c"]))
        return found

    def bytes_of_rows(self, n_samples: int) -> int:
        """Return what the gradients of so many samples take, uncompressed; factors as those of the first unit do."""
        dense = sum(size for name, size in self.parameters.items() if self.representation(name) == "dense")
        total = n_samples * dense * self.store_dtype.itemsize
        for wave in range(len(self.waves)):
            entries = self.factor_entries(self.units[0], wave)
            total += int(sum(entry["bytes"] for entry in entries) * n_samples / len(self.units[0]))
        return total

    @property
    def numpy_row_dtype(self) -> np.dtype:
        """Return the dtype in which rows are formed, for numpy."""
        return np.dtype("float64" if self.row_dtype == torch.float64 else "float32")

    def mean(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return the mean gradient that was subtracted from the rows, float64; `None` where rows are uncentered."""
        if not self.centered:
            return None
        if name not in self._means:
            self.check_mean(name)
            self._means.add(name)
        return self._array(f"mean/{node_name(name)}")[start:stop]

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
            facts = {"field": name, "crc32c": digest_of_values(name, values)}
            write_array(self.path, f"fields/{node_name(name)}", values, ("sample",), facts)

    def fields(self) -> dict[str, np.ndarray]:
        """Return `{name: (N,) float64}`: per-sample facts to select by: the data's own scalars, `loss`, `n_targets`."""
        found = {name: self.per_sample(name).astype(np.float64) for name in ("loss", "n_targets")}
        for path in sorted((self.path / "fields").glob("*/zarr.json")):
            name, values = self.read_field(path.parent)
            found[name] = values
        return found

    def read_field(self, path: Path) -> tuple[str, np.ndarray]:
        """Return name and values of the field in a folder.

        Raises:
            CorruptRunError: it is not what was written.
        """
        require_inside(self.path, path)
        try:
            array = zarr.open_array(path, mode="r")
            name, size = str(array.attrs["field"]), int(array.shape[0])
            check_layout(array, path, (min(size, self.n_samples),), (min(size, CHUNK),), "float64")
            values = np.asarray(array[: self.n_samples])
            whole = "crc32c" not in array.attrs or digest_of_values(name, values) == array.attrs["crc32c"]
            right = whole and node_name(name) == path.name
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise unreadable(error, f"{path} cannot be read: {error}. The next `run` writes it again.") from error
        if not right:
            raise CorruptRunError(f"{path} is not what was written; the next `run` writes it again.")
        return name, values

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

    def read_unit(self, name: str, unit: Unit) -> np.ndarray:
        """Return one parameter's stored bits of a unit: (len(unit), P_k) in the stored dtype."""
        self.check_chunks(name, unit)
        return self._array(f"gradients/{node_name(name)}")[unit.start : unit.stop]

    def read_sample_values(self, what: str, unit: Unit) -> np.ndarray:
        """Return `loss`, `n_targets`, `valid` or `squared_norm` of the samples of a unit."""
        return self._array(f"samples/{what}")[unit.start : unit.stop]

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

    def per_sample(self, what: str) -> np.ndarray:
        """Return `loss`, `n_targets`, `valid` or `squared_norm` of all samples.

        Raises:
            CorruptRunError: a chunk fails its checksum.
        """
        try:
            values = self._array(f"samples/{what}")[: self.n_samples]
        except (ValueError, RuntimeError, OSError) as error:
            raise unreadable(
                error,
                f"{self.path}: samples/{what} cannot be read: {error}. `streamfisher verify` finds which samples are "
                "affected, and the next `run` computes them again.",
            ) from error
        done = self._done_in_waves()
        for unit in self.units:
            waves = [wave for wave, indices in enumerate(done) if unit.index in indices]
            if waves:
                self.check_sample_values(what, unit, values[unit.start : unit.stop], waves)
        return values

    def check_sample_values(self, what: str, unit: Unit, values: np.ndarray, waves: Sequence[int]) -> None:
        """Refuse per-sample values of a unit that are not what its markers in some waves say.

        Raises:
            CorruptRunError: they are not, or a marker is damaged.
        """
        markers = {
            wave: self.marker(unit, wave) for wave, done in enumerate(self._done_in_waves()) if unit.index in done
        }
        if what == "valid":
            skipped = {int(sample) for marker in markers.values() for sample in marker["skipped"]}
            right = np.array_equal(values, [sample not in skipped for sample in range(unit.start, unit.stop)])
        elif what == "squared_norm":
            known = {wave: marker["samples"][what] for wave, marker in markers.items() if "samples" in marker}
            right = all(self._digests(wave, {what: values})[what] == digest for wave, digest in known.items())
        else:  # each wave has written all of them, and the last one counts
            known = {wave: marker["samples"][what] for wave, marker in markers.items() if "samples" in marker}
            right = not known or digest_of_values(what, values) in known.values()
        if not right:
            raise CorruptRunError(
                f"{self.path}: samples/{what} of samples {unit.start} to {unit.stop - 1} are not what was written. "
                "`streamfisher verify` finds what is affected, and the next `run` computes it again."
            )

    def _done_in_waves(self) -> list[set[int]]:
        return [self.done_units(stage_of(wave)) for wave in range(len(self.waves))]

    def _digests(self, wave: int, values: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Return digests of per-sample values of a unit; of the norms, only those of the wave's parameters."""
        found = dict(values)
        if "squared_norm" in found:
            columns = {name: column for column, name in enumerate(self.parameters)}
            found["squared_norm"] = found["squared_norm"][:, [columns[name] for name in self.waves[wave]]]
        return {what: digest_of_values(what, part) for what, part in found.items()}

    def _chunks(self, name: str, unit: Unit) -> Path:
        return self.path / "gradients" / node_name(name) / "c" / str(unit.index)

    def _require_bound(self, name: str) -> None:
        """Refuse rows or factors of a parameter whose chunks are not those that were written there; once per unit.

        Raises:
            CorruptRunError: it names the samples.
        """
        done = self.done_units(stage_of(self.wave_of(name)))
        for unit in self.units:
            if (name, unit.index) in self._bound or unit.index not in done:
                continue
            self.check_chunks(name, unit)
            self._bound.add((name, unit.index))

    def check_chunks(self, name: str, unit: Unit) -> None:
        """Refuse rows or factors of a parameter in one unit whose chunks are not those that were written there.

        Raises:
            CorruptRunError: it names parameter and samples.
        """
        wave = self.wave_of(name)
        if self.representation(name) == "factors":
            check_factors(self._factor_folder(wave), name, unit.index, self.factor_entries(unit, wave))
            return
        expected = self.marker(unit, wave).get("chunks", {}).get(name)
        if expected is not None and chunk_digest(self._chunks(name, unit)) != expected:
            raise CorruptRunError(
                f"{self.path}: the chunks of {name}, samples {unit.start} to {unit.stop - 1}, are not those that were "
                "written there. `streamfisher verify` finds what is affected."
            )

    def skipped(self) -> dict[int, str]:
        """Return `{sample number: reason}` of the samples that do not count."""
        found: dict[int, str] = {}
        for wave in range(len(self.waves)):
            for index in sorted(self.done_units(stage_of(wave))):
                marker = self.marker(self.units[index], wave)
                found = {int(sample): reason for sample, reason in marker["skipped"].items()} | found
        return found

    # Waves

    def wave_of(self, name: str) -> int:
        """Return the wave that captures a parameter."""
        return next(index for index, names in enumerate(self.waves) if name in names)

    def is_deleted(self, name: str) -> bool:
        """Return whether a parameter's gradients were deleted after they were reduced."""
        return not is_kept(name, self.keep) and self._deleted_path(self.wave_of(name)).is_file()

    def delete_gradients(self, wave: int) -> None:
        """Delete the gradients of a wave that are not to be kept; the marker comes first, so a kill ends it later."""
        passing = [name for name in self.waves[wave] if not is_kept(name, self.keep)]
        if not passing:
            return
        self._mark(f"deleted-{wave}", {"parameters": passing})
        entries = [entry for unit in self.units for entry in self.factor_entries(unit, wave)]
        keep = {key for entry in entries for key in self._kept_keys(entry)}
        for name in passing:
            self._arrays.pop(f"gradients/{node_name(name)}", None)
            for chunks in (self.path / "gradients" / node_name(name)).glob("c*"):
                shutil.rmtree(chunks, ignore_errors=True)
        keys = {key for entry in entries for key in entry["sides"]}
        delete_factors(self._factor_folder(wave), sorted(keys - keep))

    def want_gradients(self, wave: int) -> None:
        """Take back that a wave's gradients were deleted, because they are collected again."""
        self._deleted_path(wave).unlink(missing_ok=True)

    def _kept_keys(self, entry: Mapping[str, Any]) -> set[str]:
        return {
            key for name, uses in entry["pairs"].items() if is_kept(name, self.keep) for pair in uses for key in pair
        }

    def _deleted_path(self, wave: int) -> Path:
        return self.path / "done" / f"deleted-{wave}.json"

    def _factor_folder(self, wave: int) -> Path:
        return self.path / "factors" / str(wave)

    def _require_kept(self, name: str) -> None:
        if self.is_deleted(name):
            raise RunError(
                f"{self.path}: the gradients of {name} were deleted after its Gram was built, to stay within the disk "
                "budget. What needs rows needs a run with --keep-gradients all, or with a pattern that matches it."
            )

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
            except (OSError, KeyError, TypeError):
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
        check_layout(array, self.path / path, shape, chunks, dtype)


def _number(checksum: google_crc32c.Checksum) -> int:
    return int.from_bytes(checksum.digest(), "big")


def stage_of(wave: int) -> str:
    """Return the name of the stage of markers that a wave's units have."""
    return "rows" if wave == 0 else f"rows.{wave}"
