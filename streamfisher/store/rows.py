"""Gradient rows read back, by columns and ranges of samples, however they are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from streamfisher.data.batches import Unit
from streamfisher.errors import CorruptRunError, unreadable
from streamfisher.gradients.factors import matrix_shape
from streamfisher.store import codecs
from streamfisher.store.factors import FactorSide, Segment, check_factors, columns_of_segments, segments_of
from streamfisher.store.integrity import chunk_digest
from streamfisher.store.markers import StorePart, stage_of
from streamfisher.store.names import node_name

#: Bytes of a slab of float64 rows that is formed from factors at a time.
_FACTORED_SLAB = 64 << 20


class RowReader(StorePart):
    """What a `RunStore` does to give back gradients: the interface that the Gram stage uses."""

    _bound: set[tuple[str, int]]  # (parameter, unit) whose chunks are known to be in their places
    _require_kept: Any
    _factor_folder: Any

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

    def columns(
        self, name: str, start: int, stop: int, rows: slice | None = None, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Return columns `start` to `stop` of a parameter's rows: (n, stop - start) float32 or float64.

        Args:
            name: of the parameter; whether it is held as rows or as factors makes no difference.
            start: first column.
            stop: one past the last column.
            rows: consecutive samples; `None` means all N.
            out: an array of that shape and of `numpy_read_dtype` to read into, where the rows are held as rows.

        Raises:
            CorruptRunError: a chunk fails its checksum.
            RunError: the gradients were deleted after they were reduced.
        """
        first, last, _ = (rows or slice(None)).indices(self.n_samples)
        stop = min(stop, self.parameters[name])
        self._require_kept(name)
        if self.representation(name) == "factors":
            segments = self.segments(name)
            shape = matrix_shape(self.shape(name))
            return columns_of_segments(segments, shape, start, stop, first, last, self.numpy_row_dtype)
        self._require_bound(name)
        array = self._array(f"gradients/{node_name(name)}")
        if out is None:
            out = np.empty((last - first, stop - start), dtype=self.numpy_read_dtype)
        try:
            return codecs.read_into(array, slice(first, last), slice(start, stop), self.store_dtype, out)
        except (ValueError, RuntimeError, OSError) as error:
            raise unreadable(
                error,
                f"{self.path}: a chunk of parameter {name} (columns {start} to {stop}) cannot be read: {error}. "
                "Run `streamfisher verify` to find which samples are affected.",
            ) from error

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
            if not self.is_done(unit, wave):
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

    @property
    def numpy_read_dtype(self) -> np.dtype:
        """Return the dtype in which stored rows are read: float64 where they were stored so."""
        return np.dtype("float64" if self.store_dtype == torch.float64 else "float32")

    @property
    def decoding_bytes(self) -> int:
        """Return what an entry takes beside that dtype while it is read: its stored form, where it has one."""
        stored = self.store_dtype.itemsize
        return 0 if stored == self.numpy_read_dtype.itemsize else stored

    @property
    def unit_roundoff(self) -> float:
        """Return the largest relative error that storing put on an entry of a row."""
        bits = self.manifest.layout["bitround"]
        return 2.0 ** -(bits + 1) if bits is not None else float(torch.finfo(self.store_dtype).eps) / 2

    @property
    def norm_tolerance(self) -> float:
        """Return how far a squared row norm may be from the one seen while collecting, relatively."""
        return 4 * self.unit_roundoff + (1e-9 if self.row_dtype == torch.float64 else 1e-4)

    def read_unit(self, name: str, unit: Unit) -> np.ndarray:
        """Return one parameter's stored bits of a unit: (len(unit), P_k) in the stored dtype."""
        self.check_chunks(name, unit)
        return self._array(f"gradients/{node_name(name)}")[unit.start : unit.stop]

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
