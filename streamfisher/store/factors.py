"""Factors of gradients on disk: each tensor of each batch once, positions of all samples one after the other.

    factors/<wave>/<tensor>/<unit>-<batch>    (sum_i T_i, width) in the model's dtype, or (sum_i T_i,) int32 token ids

Which tensors make up which parameter, and how many positions each sample has, is in the marker of the unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import torch

from streamfisher.config import parse_dtype
from streamfisher.data.batches import Unit
from streamfisher.errors import CorruptRunError
from streamfisher.gradients.factors import BatchFactors
from streamfisher.runtime.own_files import remove_tree, require_own
from streamfisher.store import codecs
from streamfisher.store.chunk_reading import ChunkReader
from streamfisher.store.factor_writing import FactorWriting
from streamfisher.store.folder import RunFolder
from streamfisher.store.integrity import chunk_digest
from streamfisher.store.markers import Markers
from streamfisher.store.names import node_name
from streamfisher.store.opening import read_facts


@dataclass(frozen=True)
class FactorSide:
    """One factor of a batch: an array that is read by columns."""

    path: Path
    shape: tuple[int, ...]  # (sum_i T_i, width), or (sum_i T_i,) for ids
    dtype: torch.dtype | None  # of the values; None: ids

    @property
    def width(self) -> int:
        """Return the values per position, 1 for ids."""
        return self.shape[1] if len(self.shape) > 1 else 1

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return columns `start` to `stop` of all positions, float32 or float64; or all ids, int64.

        Raises:
            CorruptRunError: a chunk is missing or fails its checksum.
        """
        if self.shape[0] == 0:
            return (
                np.zeros((0, (self.width if stop is None else stop) - start)) if self.dtype else np.zeros(0, np.int64)
            )
        stored = self.read_stored(start, stop)
        return stored.astype(np.int64) if self.dtype is None else codecs.decode(stored, self.dtype)

    def read_stored(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the stored bits of columns `start` to `stop`, or of the ids.

        Raises:
            CorruptRunError: a chunk is missing or fails its checksum, or the array is of another shape.
        """
        try:
            facts = read_facts(self.path, complete=True)
            if facts.shape != self.shape:
                raise CorruptRunError(f"{self.path} has the shape {facts.shape} where {self.shape} was written.")
            last = facts.shape[-1] if stop is None else min(stop, facts.shape[-1])
            where = (slice(0, facts.shape[0]), slice(start, last)) if len(facts.shape) > 1 else (slice(0, last),)
            stored = np.empty([part.stop - part.start for part in where], dtype=facts.dtype)
            ChunkReader(self.path, facts, complete=True).read_into(where, stored)
            if len(facts.shape) > 1:
                return stored
            ids = stored
            if ids.min() < 0:  # no row would be theirs, as if the gradient were zero
                raise CorruptRunError(
                    f"{self.path} has no token ids in a chunk that is missing; `streamfisher verify` finds what is "
                    "affected."
                )
            return ids
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            if isinstance(error, CorruptRunError):
                raise
            raise CorruptRunError(
                f"{self.path} cannot be read: {error}. `streamfisher verify` finds what is affected."
            ) from error


class FactorValues(Protocol):
    """One factor of a batch, wherever it is."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the values; `None`: ids."""

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return columns `start` to `stop` of all positions, float32 or float64; or all ids, int64."""


@dataclass(frozen=True)
class FactorSegment:
    """One use of a parameter by consecutive samples: `g_i = sum_t L_it^T R_it` over each sample's own positions."""

    start: int  # first sample
    lengths: tuple[int, ...]  # T_i of each sample
    left: FactorValues
    right: FactorValues

    @property
    def offsets(self) -> np.ndarray:
        """Return where each sample's positions begin, and where the last ones end: (n + 1,) int64."""
        return np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])


def segments_of(folder: Path, name: str, unit: int, entries: Sequence[Mapping[str, Any]]) -> list[FactorSegment]:
    """Return the uses of a parameter in a unit, from what the unit's marker says.

    Raises:
        CorruptRunError: the marker does not know the parameter, or contradicts itself.
    """
    found = []
    try:
        for batch, entry in enumerate(entries):
            for left, right in entry["pairs"][name]:
                lengths = tuple(entry["sides"][left]["lengths"])
                sides = []
                for key in (left, right):
                    side = entry["sides"][key]
                    path = folder / node_name(key) / f"{unit:06d}-{batch:04d}"
                    sides.append(FactorSide(path, tuple(side["shape"]), parse_dtype(side["dtype"], key)))
                    if tuple(side["lengths"]) != lengths or side["shape"][0] != sum(lengths):
                        raise CorruptRunError(f"the marker of unit {unit} contradicts itself about {key}.")
                found.append(FactorSegment(int(entry["start"]), lengths, *sides))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptRunError(f"the marker of unit {unit} says nothing usable of the factors of {name}.") from error
    return found


def check_factors(folder: Path, name: str, unit: int, entries: Sequence[Mapping[str, Any]]) -> None:
    """Refuse factors of a parameter in a unit whose chunks are not those that were written there.

    Raises:
        CorruptRunError: it names the tensor.
    """
    for batch, entry in enumerate(entries):
        for key in {key for pair in entry["pairs"][name] for key in pair}:
            path = folder / node_name(key) / f"{unit:06d}-{batch:04d}"
            if entry["sides"][key].get("chunks") not in (None, chunk_digest(path)):
                raise CorruptRunError(
                    f"the chunks of {path} are not those that were written; `streamfisher verify` finds what is "
                    "affected."
                )


def checksum_of(side: FactorSide) -> int:
    """Return the CRC-32C of a tensor's stored bytes.

    Raises:
        CorruptRunError: it cannot be read.
    """
    return codecs.checksum(side.read_stored()) if side.shape[0] else google_crc32c.value(b"")


def delete_factors(folder: Path, keys: Iterable[str]) -> None:
    """Delete tensors of a wave, those that are not there included."""
    for key in keys:
        remove_tree(folder.parent.parent, folder / node_name(key))
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def columns_of_segments(
    segments: Sequence[FactorSegment],
    shape: tuple[int, int],
    start: int,
    stop: int,
    first: int,
    last: int,
    dtype: np.dtype,
) -> np.ndarray:
    """Return columns `start` to `stop` of the rows of samples `first` to `last`: (last - first, stop - start).

    Column `a n + b` of a row is entry (a, b) of `sum_t L_it^T R_it`, an (m, n) matrix.

    Args:
        segments: all uses of the parameter.
        shape: (m, n).
        start: first column.
        stop: one past the last column.
        first: first sample.
        last: one past the last sample.
        dtype: in which products are formed.
    """
    _, width = shape
    top, bottom = start // width, -(-stop // width)  # the matrix rows that the columns lie in
    found = np.zeros((last - first, bottom - top, width), dtype=dtype)
    for segment in segments:
        if segment.start >= last or segment.start + len(segment.lengths) <= first or not sum(segment.lengths):
            continue
        right = segment.right.read().astype(dtype, copy=False)
        by_index = segment.left.dtype is None
        left = segment.left.read() if by_index else segment.left.read(top, bottom).astype(dtype, copy=False)
        offsets = segment.offsets
        for place in range(max(first - segment.start, 0), min(last - segment.start, len(segment.lengths))):
            positions = slice(offsets[place], offsets[place + 1])
            target = found[segment.start + place - first]
            if by_index:
                ids = left[positions]
                inside = (ids >= top) & (ids < bottom)
                np.add.at(target, ids[inside] - top, right[positions][inside])
            else:
                target += left[positions].T @ right[positions]
    return found.reshape(last - first, -1)[:, start - top * width : stop - top * width]


class FactorStore:
    """The factors of a run, and what the markers of its units say of them."""

    def __init__(self, run: RunFolder, markers: Markers) -> None:
        self.run, self.markers = run, markers
        self._seen: dict[tuple[int, int], dict[str, Any]] = {}  # (wave, unit) -> its marker, once read

    def folder(self, wave: int) -> Path:
        """Return the folder of a wave's factors."""
        return self.run.path / "factors" / str(wave)

    def writing(
        self,
        unit: Unit,
        batch: int,
        start: int,
        packed: BatchFactors,
        wave: int = 0,
        ready: Callable[[], None] = lambda: None,
        *,
        direct: bool = False,
    ) -> FactorWriting:
        """Return what is to be done to write the factors of one batch of a unit, in pieces that any thread may do."""
        folder = self.folder(wave)
        require_own(self.run.path, folder)
        codec = self.run.manifest.layout["codec"]
        return FactorWriting(folder, unit.index, batch, start, packed, codec, ready, direct=direct)

    def segments(self, name: str) -> list[FactorSegment]:
        """Return the factors of a parameter, in the order of the samples.

        Raises:
            CorruptRunError: a marker is damaged.
        """
        wave, found = self.run.wave_of(name), []
        for unit in self.run.units:
            found += segments_of(self.folder(wave), name, unit.index, self.entries(unit, wave))
        return found

    def entries(self, unit: Unit, wave: int) -> list[dict[str, Any]]:
        """Return what the marker of a unit says of its batches' factors; empty where it has none or is not done."""
        if (wave, unit.index) not in self._seen:
            if not self.markers.is_done(unit, wave):
                return []
            self._seen[wave, unit.index] = self.markers.of_unit(unit, wave)
        return self._seen[wave, unit.index].get("factors", [])

    def checksums(self, unit: Unit, wave: int, name: str) -> list[tuple[FactorSide, int]]:
        """Return every tensor that a parameter's factors are in, in one unit, with the checksum of its marker.

        Raises:
            CorruptRunError: the marker is damaged.
        """
        expected: list[tuple[FactorSide, int]] = []
        entries = self.markers.of_unit(unit, wave).get("factors", [])
        segments = iter(segments_of(self.folder(wave), name, unit.index, entries))
        for entry in entries:
            for pair in entry["pairs"][name]:
                segment = next(segments)
                for key, side in zip(pair, (segment.left, segment.right), strict=True):
                    if isinstance(side, FactorSide):  # of a run on disk, they all are
                        expected.append((side, entry["sides"][key]["crc32c"]))
        return expected

    def forget(self, unit: Unit, wave: int) -> None:
        """Let go of what was read of a unit's marker, which is about to be another."""
        self._seen.pop((wave, unit.index), None)
