"""The folder of a run and the facts that all parts of its store share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from streamfisher.config import parse_dtype
from streamfisher.data.batches import make_units
from streamfisher.errors import CorruptRunError, RunError, unreadable
from streamfisher.runtime.durable import LARGEST_JSON, MarkerBatch, read_json, write_marker
from streamfisher.store import codecs
from streamfisher.store.arrays import read_array
from streamfisher.store.chunk_reading import ChunkReader
from streamfisher.store.integrity import check_layout, require_inside
from streamfisher.store.manifest import LARGEST_MANIFEST, Manifest, columns_of
from streamfisher.store.names import node_name
from streamfisher.store.opening import open_array, read_facts
from streamfisher.store.packs import places_of


class RunFolder:
    """What the manifest says, and the arrays that were opened.

    Raises:
        RunError: the folder does not exist or is no run.
        CorruptRunError: its manifest is damaged or of another format version.
    """

    def __init__(self, path: Path):
        self.path = path
        if not self.path.exists():
            raise RunError(f"{self.path} does not exist; make it with `streamfisher run MODEL DATA --out {self.path}`.")
        if not (self.path / "manifest.json").is_file():
            raise RunError(
                f"{self.path} is not a streamfisher run: it has no manifest.json. "
                "Name another folder, or delete this one if it is the remains of a run that never began."
            )
        self.manifest = Manifest.from_dict(read_json(self.path / "manifest.json", LARGEST_MANIFEST))
        layout = self.manifest.layout
        self.parameters: dict[str, int] = {  # numbers of a stored row
            item["name"]: columns_of(item) for item in self.manifest.parameters
        }
        self.columns = {name: column for column, name in enumerate(self.parameters)}  # of arrays (N, K)
        self._items = {item["name"]: item for item in self.manifest.parameters}
        self._names = {node_name(name): name for name in self.parameters}
        self.n_samples: int = self.manifest.data["n_samples"]
        self.chunk_rows: int = layout["chunk_rows"]  # samples of a unit
        self.store_dtype: torch.dtype = parse_dtype(layout["dtype_store"])
        self.row_dtype: torch.dtype = parse_dtype(layout["dtype_row"])
        self.centered: bool = layout["centered"]
        self.units = make_units(self.n_samples, self.chunk_rows)
        self.waves: list[list[str]] = self.manifest.waves
        self._wave_of = {name: index for index, names in reversed([*enumerate(self.waves)]) for name in names}
        self.gram_members: dict[str, list[str]] = self.manifest.gram_members  # Gram key -> parameters it sums over
        self.keep: list[str] = layout.get("keep", ["*"])  # patterns of parameters whose gradients stay
        self.batch_tokens: int = layout.get("batch_tokens", self.manifest.config["batch_tokens"])
        self.hold: str = layout.get("hold", "disk")  # where gradients are until they are reduced
        self.holds: list[str] = layout.get("holds") or [self.hold] * len(self.waves)  # those of each wave
        self.copy: str | None = layout.get("copy")  # where written gradients are held too until they are reduced
        self.unit_buffers: int = layout.get("unit_buffers", 1)  # units whose rows are in memory at a time
        self.packs: dict[str, list[str]] = layout.get("packs", {})  # key -> small parameters side by side in one array
        self.places = places_of(self.parameters, self.packs)
        self.fsync = False  # flush the filesystem before each marker
        self.arrays: dict[str, zarr.Array] = {}
        self._opening = threading.Lock()  # threads that write units open each array once
        self._readers: dict[str, ChunkReader] = {}
        self._batch: MarkerBatch | None = None

    def __str__(self) -> str:
        return str(self.path)

    def representation(self, name: str) -> str:
        """Return how a parameter's gradients are held: 'dense' or 'factors'."""
        return self.manifest.representation(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return tuple(self._items[name]["shape"])

    def chunk_columns(self, name: str) -> int:
        """Return the columns of a chunk of a parameter's rows."""
        return int(self._items[name]["chunk_columns"])

    def wave_of(self, name: str) -> int:
        """Return the wave that captures a parameter."""
        return self._wave_of[name]

    @property
    def numpy_row_dtype(self) -> np.dtype:
        """The dtype in which rows are formed, for numpy."""
        return np.dtype("float64" if self.row_dtype == torch.float64 else "float32")

    @property
    def numpy_read_dtype(self) -> np.dtype:
        """The dtype in which stored rows are read: float64 where they were stored so."""
        return np.dtype("float64" if self.store_dtype == torch.float64 else "float32")

    @cached_property
    def largest_marker(self) -> int:
        """Bytes that the marker of a unit may have, at most: checksums, reasons, and the lengths of factors."""
        names = sum(len(name) for name in self.parameters)
        parameters, samples = len(self.parameters), self.chunk_rows
        return LARGEST_JSON + 16 * names + 1024 * (parameters + 4 * samples) + 512 * parameters * samples

    def rows_of(self, name: str) -> zarr.Array:
        """Return the array that a parameter's rows are in, from column `places[name].first` on."""
        return self.array(self.places[name].array)

    def reader(self, path: str) -> ChunkReader:
        """Return what reads parts of an array without Zarr; it is opened, and held against the manifest, once."""
        if path not in self._readers:
            self.array(path)
            self._readers[path] = ChunkReader(self.path / path, read_facts(self.path / path))
        return self._readers[path]

    def values(self, path: str, rows: slice) -> np.ndarray:
        """Return some rows of an array, all of each; those that are not written read as the fill value.

        Raises:
            ValueError, RuntimeError, OSError: a chunk cannot be read, see `errors.unreadable`.
        """
        reader = self.reader(path)
        return read_array(reader.path, reader.facts, (rows, *(slice(None),) * (len(reader.facts.shape) - 1)))

    def mark(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a marker, durably."""
        self.mark_at(self.path / "done" / f"{name}.json", content)

    def mark_at(self, path: Path, content: Mapping[str, Any]) -> None:
        """Write a marker, durably, or let it wait for the others that are written together."""
        if self._batch is not None:
            self._batch.add(path, dict(content))
        else:
            write_marker(path, dict(content), fsync=self.fsync)

    @contextlib.contextmanager
    def marking_together(self) -> Iterator[None]:
        """Let the markers that this process writes meanwhile become durable some at a time, the last ones at the end.

        Nothing that needs one of them may be done before the end.
        """
        batch = self._batch = MarkerBatch(fsync=self.fsync)
        try:
            yield
        finally:  # what was marked is done, whatever comes next
            self._batch = None
            batch.commit()

    def array(self, path: str) -> zarr.Array:
        """Return an array of the run, opened once and as the manifest has it."""
        with self._opening:
            return self._array(path)

    def _array(self, path: str) -> zarr.Array:
        if path not in self.arrays:
            require_inside(self.path, self.path / path)
            try:
                self.arrays[path] = open_array(self.path / path, "r+")
                self._check(path, self.arrays[path])
            except CorruptRunError:
                self.arrays.pop(path, None)
                raise
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise unreadable(error, f"{self.path / path} is missing or damaged: {error}") from error
        return self.arrays[path]

    def _check(self, path: str, array: zarr.Array) -> None:
        """Refuse an array that is not as the manifest has it."""
        kind, node = path.split("/")
        shape: tuple[int, ...]
        chunks: tuple[int, ...]
        dtype: np.dtype | str
        rows, names = self.chunk_rows, self._names
        if kind == "packed":
            wide_pack = sum(self.parameters[name] for name in self.packs[node])
            shape, chunks = (self.n_samples, wide_pack), (rows, wide_pack)
            dtype = codecs.stored_dtype(self.store_dtype)
        elif kind == "gradients":
            item = self._items[names[node]]
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
            array,
            self.path / path,
            shape,
            chunks,
            dtype,
            longer=kind in ("gradients", "packed", "samples", "mean_parts"),
        )
