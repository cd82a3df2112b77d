"""Gradient rows read back, by columns and ranges of samples, however they are held."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streamfisher.data.batches import Unit
from streamfisher.errors import CorruptRunError, RunError, unreadable
from streamfisher.gradients.factors import matrix_shape
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.store.arrays import values_of
from streamfisher.store.chunk_reading import read_decoded
from streamfisher.store.factors import FactorSegment, FactorSide, FactorStore, check_factors, columns_of_segments
from streamfisher.store.folder import RunFolder
from streamfisher.store.integrity import chunk_digest
from streamfisher.store.kept import KeptGradients
from streamfisher.store.markers import Markers, stage_of
from streamfisher.store.means import MeanStore
from streamfisher.store.pack_cache import PackCache
from streamfisher.store.row_writing import UnitWriting

#: Bytes of a slab of float64 rows that is formed from factors at a time.
_FACTORED_SLAB = 64 << 20


class RowStore:
    """Gradient rows of a run: the `GradientSource` that the Gram stage reads, however they are held."""

    def __init__(
        self,
        run: RunFolder,
        markers: Markers,
        factors: FactorStore,
        kept: KeptGradients,
        means: MeanStore,
    ) -> None:
        self.run, self.markers, self.factors, self.kept, self.means = run, markers, factors, kept, means
        self._packs = PackCache(run)
        self._bound: set[tuple[str, int]] = set()  # (array, unit) whose chunks are known to be in their places

    def __reduce__(self) -> tuple[Callable[..., RowStore], tuple[Path, bool]]:
        return _opened, (self.run.path, self.run.fsync)

    @property
    def n_samples(self) -> int:
        """N, samples that were skipped included."""
        return self.run.n_samples

    @property
    def parameters(self) -> Mapping[str, int]:
        """Numbers of a row of each parameter."""
        return self.run.parameters

    @property
    def numpy_row_dtype(self) -> np.dtype:
        """The dtype in which rows are formed, for numpy."""
        return self.run.numpy_row_dtype

    @property
    def numpy_read_dtype(self) -> np.dtype:
        """The dtype in which stored rows are read: float64 where they were stored so."""
        return self.run.numpy_read_dtype

    def representation(self, name: str) -> str:
        """Return how a parameter's gradients are held: 'dense' or 'factors'."""
        return self.run.representation(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self.run.shape(name)

    def mean(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return the mean gradient that was subtracted from the rows, float64; `None` where rows are uncentered."""
        return self.means.mean(name, start, stop)

    def segments(self, name: str) -> list[FactorSegment]:
        """Return the factors of a parameter, in the order of the samples.

        Raises:
            CorruptRunError: a marker is damaged.
            RunError: the gradients were deleted after they were reduced, or not all units are finished.
        """
        self.kept.require(name)
        self._refuse_unfinished(name, self._require_bound(name))  # they would add nothing, as if they were zero
        return self.factors.segments(name)

    def writing(
        self,
        unit: Unit,
        rows: Mapping[str, Tensor],
        ready: Callable[[], None] = lambda: None,
        *,
        direct: bool = False,
    ) -> UnitWriting:
        """Return what is to be done to write the rows of a unit, in pieces that any thread may do.

        Args:
            unit: the samples.
            rows: parameter -> (len(unit), P_k) on the CPU; not to change before all is written.
            ready: returns when they are there.
            direct: past the page cache.
        """
        return UnitWriting(self.run, unit, rows, ready, direct=direct)

    def chunk_columns(self, name: str) -> int:
        """Return the columns of a parameter that are read together at no extra cost."""
        if self.representation(name) == "dense":
            return self.run.chunk_columns(name)
        _, width = matrix_shape(self.shape(name))
        return width * max(1, _FACTORED_SLAB // (8 * self.run.n_samples * width))

    def files(self, name: str, start: int, stop: int) -> Iterator[Path]:
        """Return the chunks that some columns of a parameter are read from; none where they are at a store.

        Those of packs are left out: they are small, and read once for many parameters.
        """
        place = self.run.places[name]
        if isinstance(self.run.path, RemotePath) or place.pack is not None:
            return
        if self.representation(name) == "factors":
            for segment in self.factors.segments(name):
                for side in (segment.left, segment.right):
                    if isinstance(side, FactorSide):
                        yield from (path for path in (side.path / "c").rglob("*") if path.is_file())
            return
        width = self.run.chunk_columns(name)
        for column in range(start // width, -(-stop // width)):
            for unit in range(len(self.run.units)):
                yield self.run.path / place.array / "c" / str(unit) / str(column)

    def columns(
        self,
        name: str,
        start: int,
        stop: int,
        rows: slice | None = None,
        *,
        out: np.ndarray | None = None,
        unfinished_as_nan: bool = False,
    ) -> np.ndarray:
        """Return columns `start` to `stop` of a parameter's rows: (n, stop - start) float32 or float64.

        Args:
            name: of the parameter; whether it is held as rows or as factors makes no difference.
            start: first column.
            stop: one past the last column.
            rows: consecutive samples; `None` means all N.
            out: an array of that shape and of `numpy_read_dtype` to read into, where the rows are held as rows.
            unfinished_as_nan: give samples of units that are not finished as NaN instead of refusing them.

        Raises:
            CorruptRunError: a chunk fails its checksum, or is missing.
            RunError: the gradients were deleted after they were reduced, or some of the samples have none yet.
        """
        first, last, _ = (rows or slice(None)).indices(self.run.n_samples)
        stop = min(stop, self.run.parameters[name])
        self.kept.require(name)
        unfinished = [unit for unit in self._require_bound(name) if first < unit.stop and unit.start < last]
        if not unfinished_as_nan:
            self._refuse_unfinished(name, unfinished)
        if self.representation(name) == "factors":
            segments, shape = self.factors.segments(name), matrix_shape(self.shape(name))
            found = columns_of_segments(segments, shape, start, stop, first, last, self.numpy_row_dtype)
            return _without(unfinished, found, first)
        if out is None:
            out = np.empty((last - first, stop - start), dtype=self.numpy_read_dtype)
        place = self.run.places[name]
        where = slice(place.first + start, place.first + stop)
        try:
            if place.pack is not None and not unfinished:
                out[...] = self._packs.rows(place.pack, first, last)[:, where]
            else:
                read_decoded(self.run.reader(place.array), slice(first, last), where, self.run.store_dtype, out)
        except (ValueError, RuntimeError, OSError) as error:
            raise unreadable(
                error,
                f"{self.run}: a chunk of parameter {name} (columns {start} to {stop}) cannot be read: {error}. "
                "Run `streamfisher verify` to find which samples are affected.",
            ) from error
        self._refuse_missing(name, out, first, start, unfinished)
        return _without(unfinished, out, first)

    def bytes_of(self, n_samples: int) -> int:
        """Return what the gradients of so many samples take, uncompressed; factors as those of the first unit do."""
        dense = sum(size for name, size in self.run.parameters.items() if self.representation(name) == "dense")
        total = n_samples * dense * self.run.store_dtype.itemsize
        for wave in range(len(self.run.waves)):
            entries = self.factors.entries(self.run.units[0], wave)
            total += int(sum(entry["bytes"] for entry in entries) * n_samples / len(self.run.units[0]))
        return total

    @property
    def decoding_bytes(self) -> int:
        """Return what an entry takes beside that dtype while it is read: its stored form, where it has one."""
        stored = self.run.store_dtype.itemsize
        return 0 if stored == self.numpy_read_dtype.itemsize else stored

    @property
    def unit_roundoff(self) -> float:
        """Return the largest relative error that storing put on an entry of a row."""
        bits = self.run.manifest.layout["bitround"]
        return 2.0 ** -(bits + 1) if bits is not None else float(torch.finfo(self.run.store_dtype).eps) / 2

    @property
    def norm_tolerance(self) -> float:
        """Return how far a squared row norm may be from the one seen while collecting, relatively."""
        return 4 * self.unit_roundoff + (1e-9 if self.run.row_dtype == torch.float64 else 1e-4)

    def read_unit(self, name: str, unit: Unit) -> np.ndarray:
        """Return one parameter's stored bits of a unit: (len(unit), P_k) in the stored dtype."""
        self.check_chunks(name, unit)
        first = self.run.places[name].first
        where = (slice(unit.start, unit.stop), slice(first, first + self.run.parameters[name]))
        return values_of(self.run.rows_of(name), where)

    def _chunks(self, name: str, unit: Unit) -> Path:
        return self.run.path / self.run.places[name].array / "c" / str(unit.index)

    def _require_bound(self, name: str) -> list[Unit]:
        """Refuse rows or factors of a parameter whose chunks are not those that were written there; once per unit.

        Returns:
            The units without a marker.

        Raises:
            CorruptRunError: it names the samples.
        """
        done = self.markers.done_units(stage_of(self.run.wave_of(name)))
        what = self.run.places[name].array
        for unit in self.run.units:
            if (what, unit.index) in self._bound or unit.index not in done:
                continue
            self.check_chunks(name, unit)
            self._bound.add((what, unit.index))
        return [unit for unit in self.run.units if unit.index not in done]

    def _refuse_unfinished(self, name: str, unfinished: Sequence[Unit]) -> None:
        if unfinished:
            first = unfinished[0]
            raise RunError(
                f"{self.run}: {name} has no gradients yet of samples {first.start} to {first.stop - 1}. Run the "
                "command that made the run again; it goes on where it stopped."
            )

    def _refuse_missing(
        self, name: str, read: np.ndarray, first: int, start: int, unfinished: Collection[Unit]
    ) -> None:
        """Refuse rows in which a chunk was missing, as on a disk that vanished after it was looked at.

        Such a chunk reads as NaN everywhere, so one entry of each is looked at.

        Args:
            name: of the parameter.
            read: its rows from sample `first` and column `start` on.
            first: sample.
            start: column.
            unfinished: units that are not asked to be there.
        """
        width, start = self.run.rows_of(name).chunks[1], self.run.places[name].first + start
        columns = sorted({0, *range(-start % width, read.shape[1], width)}) if read.shape[1] else []
        height = self.run.chunk_rows
        units = self.run.units[first // height : -(-(first + len(read)) // height)]
        asked = [unit for unit in units if unit not in unfinished]
        rows = [max(unit.start - first, 0) for unit in asked]
        for unit, corner in zip(asked, np.isnan(read[np.ix_(rows, columns)]), strict=True):
            if corner.any():
                raise CorruptRunError(
                    f"{self.run}: a chunk of {name}, samples {unit.start} to {unit.stop - 1}, is missing. "
                    "`streamfisher verify` finds what is affected."
                )

    def check_chunks(self, name: str, unit: Unit) -> None:
        """Refuse rows or factors of a parameter in one unit whose chunks are not those that were written there.

        Raises:
            CorruptRunError: it names parameter and samples.
        """
        wave = self.run.wave_of(name)
        if self.representation(name) == "factors":
            check_factors(self.factors.folder(wave), name, unit.index, self.factors.entries(unit, wave))
            return
        pack = self.run.places[name].pack
        marker = self.markers.of_unit(unit, wave)
        expected = marker.get("chunks", {}).get(name) if pack is None else marker.get("packs", {}).get(pack, -1)
        if expected is not None and chunk_digest(self._chunks(name, unit)) != expected:
            raise CorruptRunError(
                f"{self.run}: the chunks of {name}, samples {unit.start} to {unit.stop - 1}, are not those that were "
                "written there. `streamfisher verify` finds what is affected."
            )


def _opened(path: Path, fsync: bool) -> RowStore:
    """Open the rows of a run again, in another process."""
    run = RunFolder(path)
    run.fsync = fsync
    markers = Markers(run)
    factors = FactorStore(run, markers)
    return RowStore(run, markers, factors, KeptGradients(run, factors), MeanStore(run))


def _without(unfinished: Sequence[Unit], rows: np.ndarray, first: int) -> np.ndarray:
    """Make rows of units without a marker NaN, in place: factors would give zeros, chunks what nothing vouches for.

    Args:
        unfinished: the units.
        rows: of consecutive samples.
        first: the first of them.
    """
    for unit in unfinished:
        rows[max(unit.start - first, 0) : max(unit.stop - first, 0)] = np.nan
    return rows
