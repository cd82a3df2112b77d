"""That what is read is what was written there: the checksum of a chunk says nothing of where the chunk belongs.

Every chunk ends in the CRC-32C of its own bytes, which Zarr checks. A chunk that is copied over another, or two that
are exchanged, pass that check. So the marker of a unit also holds the CRC-32C of names and last 4 bytes of all its
chunks, which costs 4 bytes of reading per chunk to check.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import google_crc32c
import numpy as np

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.durable import LARGEST_JSON
from streamfisher.runtime.own_files import open_own, require_own
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.runtime.staging import staging_of
from streamfisher.store import codecs
from streamfisher.store.forms import MANIFEST, require_form
from streamfisher.store.opening import LARGEST_CHUNK


def chunk_digest(folder: Path) -> int:
    """Return the CRC-32C of names and last 4 bytes of all chunks below a folder, and of metadata whole; 0 if empty.

    Raises:
        CorruptRunError: there is a link among them.
    """
    digest = google_crc32c.Checksum()
    for name, content in _remote_ends(folder) if isinstance(folder, RemotePath) else _ends(folder):
        digest.update(name.encode() + b"\0" + content)
    return int.from_bytes(digest.digest(), "big")


def _ends(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and last 4 bytes of each chunk below a folder, and metadata whole."""
    staging = staging_of(folder)
    away = {} if staging is None else {folder / name: staging for name in staging.away_below(folder)}
    for path in sorted({*_files(folder), *away}):
        name = path.relative_to(folder).as_posix()
        try:
            descriptor = open_own(path, os.O_RDONLY)
        except FileNotFoundError:
            if path not in away:
                raise
            yield name, away[path].end(away[path].folder_name(path))
            continue
        with os.fdopen(descriptor, "rb") as file:
            if path.name != "zarr.json":
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - 4, 0))
            elif os.fstat(file.fileno()).st_size > LARGEST_JSON:
                raise CorruptRunError(f"{path} is larger than the metadata of any run.")
            yield name, file.read()


def digest_of_ends(ends: Mapping[PurePath, bytes]) -> int:
    """Return what `chunk_digest` of a folder would: for whoever has just written its files.

    Args:
        ends: path below the folder -> last 4 bytes of a chunk, or metadata whole.
    """
    digest = google_crc32c.Checksum()
    for path in sorted(ends):
        digest.update(path.as_posix().encode() + b"\0" + ends[path])
    return int.from_bytes(digest.digest(), "big")


def _remote_ends(folder: RemotePath) -> Iterator[tuple[str, bytes]]:
    """Yield the same of a folder below a URL: the ends of all chunks in one batch of requests."""
    keys = [key for key in folder.store.below(folder.key) if not key.endswith(".partial")]
    chunks = [key for key in keys if key.rpartition("/")[2] != "zarr.json"]
    try:
        ends = dict(zip(chunks, folder.store.ends(chunks), strict=True))
    except FileNotFoundError as error:
        raise CorruptRunError(f"{error} is missing; it was there before.") from error
    for key in keys:
        content = ends[key] if key in ends else folder.store.read(key, LARGEST_JSON)
        yield key.removeprefix(f"{folder.key}/"), content


def _files(folder: Path) -> list[Path]:
    found, folders = [], [os.fspath(folder)]
    while folders:
        try:
            entries = os.scandir(folders.pop())
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        with entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    raise CorruptRunError(
                        f"{entry.path} is a link, or no regular file; a run has none among its chunks."
                    )
                elif not entry.name.endswith(".partial"):
                    found.append(Path(entry.path))
    return found


def digest_of_values(what: str, values: np.ndarray) -> int:
    """Return the CRC-32C of per-sample values of a unit together with what they are."""
    return google_crc32c.value(what.encode() + b"\0" + np.ascontiguousarray(values).tobytes())


def require_inside(run: Path, path: Path) -> None:
    """Refuse a path in a run that is a link or passes through one, or is neither file nor folder.

    Raises:
        CorruptRunError: it names the link.
    """
    require_own(run, path)


def check_layout(
    array: Any, path: Path, shape: tuple[int, ...], chunks: tuple[int, ...] | None, dtype: Any, *, longer: bool = False
) -> None:
    """Refuse an array whose metadata are not those that the manifest leads to.

    Args:
        array: opened.
        path: of it, for the message.
        shape: what it must have.
        chunks: what it must have; `None` means any.
        dtype: what it must have.
        longer: the first axis may be longer, as that of a run that is being grown; what is beyond is never read.

    Raises:
        CorruptRunError: they differ, or its chunks are too large to be read.
    """
    same = tuple(array.shape) == tuple(shape)
    long_enough = len(array.shape) == len(shape) and array.shape[0] >= shape[0] and array.shape[1:] == shape[1:]
    expected = array.chunks if chunks is None else chunks
    if (
        not (same or (longer and long_enough))
        or tuple(array.chunks) != tuple(expected)
        or array.dtype != np.dtype(dtype)
    ):
        raise CorruptRunError(
            f"{path} has the shape {array.shape}, chunks {array.chunks} and dtype {array.dtype}, where {shape}, "
            f"{expected} and {np.dtype(dtype)} were written. `streamfisher verify --repair` restores its metadata."
        )
    if int(np.prod(array.chunks, dtype=np.float64)) * array.dtype.itemsize > LARGEST_CHUNK:
        raise CorruptRunError(f"{path} has chunks of {array.chunks}, more than any run has; it is not read.")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest whose values no run can have, before anything is made as large as they say.

    Raises:
        CorruptRunError: it names the value.
    """
    require_form(manifest, MANIFEST, "manifest.json")
    layout, config = manifest["layout"], manifest["config"]
    n, rows, units = manifest["data"]["n_samples"], layout["chunk_rows"], len(manifest["data"]["chunk_digests"])
    if units != -(-n // rows):
        raise CorruptRunError(f"manifest.json has {units} chunk_digests for {n} samples in chunks of {rows}.")
    itemsize = codecs.stored_dtype_of(layout["dtype_store"]).itemsize
    seen = manifest["probe"].get("parameters", {})
    for item in manifest["parameters"]:
        _check_parameter(item, rows, itemsize, config.get("project"), seen.get(item["name"], {}).get("numel"))
    names = [item["name"] for item in manifest["parameters"]]
    if not names or len(set(names)) < len(names):
        raise CorruptRunError("manifest.json has no parameters, or one of them twice.")
    members = [name for wave in layout.get("waves") or [names] for name in wave]
    summed = [name for group in (layout.get("grams") or {"": names}).values() for name in group]
    for what, found in (("waves", members), ("grams", summed)):
        if sorted(found) != sorted(names):
            raise CorruptRunError(f"manifest.json: layout.{what} do not hold every parameter once.")
    if not all((layout.get("grams") or {"": names}).values()) or not all(layout.get("waves") or [names]):
        raise CorruptRunError("manifest.json: a Gram, or a wave, is of no parameter.")
    holds = layout.get("holds")
    if holds is not None and (len(holds) != len(layout.get("waves", [])) or layout.get("hold", "disk") == "disk"):
        raise CorruptRunError("manifest.json: layout.holds does not say where the gradients of each wave are.")
    _check_packs(
        layout,
        names,
        {item["name"]: item.get("columns", math.prod(item["shape"])) for item in manifest["parameters"]},
        itemsize,
    )
    if not set(layout.get("representation", {})) <= set(names):
        raise CorruptRunError("manifest.json: layout.representation is of parameters that the run does not have.")
    for key, option in (("centered", "store_centered"), ("bitround", "bitround"), ("codec", "codec")):
        stated = config.get(option)
        right = layout[key] in ("raw", "blosc-lz4") if stated == "auto" else layout[key] == stated
        if option in config and not right:
            raise CorruptRunError(
                f"manifest.json contradicts itself: layout.{key} is {layout[key]!r:.40} and the option {option} was "
                f"{config[option]!r:.40}."
            )


def _check_packs(layout: Mapping[str, Any], names: Sequence[str], columns: Mapping[str, int], itemsize: int) -> None:
    """Refuse packs that no run can have."""
    wave_of = {name: wave for wave, members in enumerate(layout.get("waves") or [names]) for name in members}
    packed = [name for members in layout.get("packs", {}).values() for name in members]
    if len(set(packed)) < len(packed) or not set(packed) <= set(names):
        raise CorruptRunError("manifest.json: layout.packs hold a parameter twice, or one that the run does not have.")
    for key, members in layout.get("packs", {}).items():
        held = {layout.get("representation", {}).get(name, "dense") for name in members}
        size = layout["chunk_rows"] * sum(columns[name] for name in members) * itemsize
        if held != {"dense"} or {wave_of[name] for name in members} != {int(key.split("-")[0])} or size > LARGEST_CHUNK:
            raise CorruptRunError(f"manifest.json: no run has the pack {key} of layout.packs.")


def _check_parameter(item: Mapping[str, Any], rows: int, itemsize: int, project: Any, numel: int | None) -> None:
    """Refuse a parameter of another size than a run can have, or than the probe saw."""
    name = reprlib.repr(item["name"])
    if not item["name"]:
        raise CorruptRunError("manifest.json has a parameter without a name.")
    elements = 1
    for size in item["shape"]:
        elements *= size
        if elements > 1 << 62:
            raise CorruptRunError(f"manifest.json: the shape of {name} is larger than that of any array.")
    if numel not in (None, elements):
        raise CorruptRunError(f"manifest.json: {name} has {elements} elements by its shape and {numel} by the probe.")
    columns = item.get("columns", elements)
    if columns > elements or ("columns" in item and project is None):
        raise CorruptRunError(
            f"manifest.json: {name} has {columns} columns of {elements} elements in a run whose option project is "
            f"{reprlib.repr(project)}."
        )
    if rows * item["chunk_columns"] * itemsize > LARGEST_CHUNK:
        raise CorruptRunError(
            f"manifest.json: chunks of {name} have {rows} x {item['chunk_columns']} numbers, more than any run."
        )
