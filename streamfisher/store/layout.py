"""Where everything of a run lies, and how wide its chunks are."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
import zarr

from streamfisher.config import parse_dtype
from streamfisher.data.batches import make_units
from streamfisher.errors import ConfigError, CorruptRunError, RunError
from streamfisher.runtime.durable import write_json, write_marker
from streamfisher.runtime.own_files import require_own_files
from streamfisher.store import codecs
from streamfisher.store.config_file import CONFIG_FILE, write_config
from streamfisher.store.manifest import Manifest, columns_of
from streamfisher.store.names import node_name
from streamfisher.store.opening import LARGEST_CHUNK

#: Columns of one product of the Gram; chunk widths are multiples of it.
PANEL = 4096
#: Columns of one N x N sum, at most: enough products to outweigh its addition to the others, and few enough that a
#: single wide parameter keeps many workers busy. A wider chunk is several of them, which one task sums.
FOLD = 16 * PANEL
#: What a damaged manifest is restored from.
MANIFEST_COPY = "manifest.copy.json"
#: What may lie in a run's folder before its manifest does.
OWN_NAMES = {"zarr.json", "gradients", "packed", "samples", "mean", "mean_parts", "gram", "gram_mean", "moment", "done"}
OWN_NAMES |= {MANIFEST_COPY, CONFIG_FILE, "factors", "fields", "lock", "lock.ranks", "log.jsonl"}
_CHUNK_BYTES = 16 << 20
#: Bytes of a full-height slab of one chunk column, which is what the reduction reads at a time.
_SLAB_BYTES = 256 << 20
#: The same where a memory budget below `_AMPLE` is given: a slab that does not fit is read in parts, each decoding all.
_SMALL_SLAB_BYTES = 64 << 20
_AMPLE = 8 << 30


def chunk_columns(
    n_columns: int, n_samples: int, chunk_rows: int, itemsize: int, memory_budget: int | None = None
) -> int:
    """Return the columns of one chunk: about 16 MiB, full-height slabs of one under 256 MiB.

    A multiple of `PANEL`, and of `FOLD` where it is wider (or all columns, when they are fewer), so that neither
    products nor sums split a chunk.

    Args:
        n_columns: of the parameter.
        n_samples: N.
        chunk_rows: samples of a unit.
        itemsize: bytes of a stored number.
        memory_budget: bytes, where one was given; below 8 GiB slabs are of 64 MiB at most.
    """
    slab = _SLAB_BYTES if memory_budget is None or memory_budget >= _AMPLE else _SMALL_SLAB_BYTES
    width = min(_CHUNK_BYTES // (chunk_rows * itemsize), slab // (n_samples * 4))
    step = FOLD if width >= FOLD else PANEL
    return min(n_columns, max(PANEL, width // step * step))


def create_run(path: Path, manifest: Manifest) -> None:
    """Lay out an empty run; the manifest is written last, so that a kill leaves nothing that passes for a run.

    Raises:
        RunError: the folder exists and holds something that is not the remains of an unfinished creation.
        ConfigError: its chunks would be larger than any that are read.
    """
    check_free(path)
    _check_chunks(manifest)
    path.mkdir(parents=True, exist_ok=True)
    (path / "done").mkdir(exist_ok=True)
    root = codecs.quiet_open(path, mode="a", zarr_format=3)
    root.attrs.update({"format": manifest.format, "format_version": manifest.format_version})
    _create_row_arrays(root, manifest)
    layout = manifest.layout
    _create_sample_arrays(root, manifest)
    if layout["centered"]:
        _create_mean_arrays(root, manifest)
    root.require_group("gram")
    write_config(path, manifest)
    write_json(path / MANIFEST_COPY, manifest.to_dict())
    write_marker(path / "manifest.json", manifest.to_dict(), fsync=bool(manifest.config.get("fsync")))


def create_row_arrays(path: Path, manifest: Manifest) -> None:
    """Lay out the arrays of rows of a run that is there, instead of any that were."""
    _create_row_arrays(codecs.quiet_open(path, mode="a", zarr_format=3), manifest)


def _create_row_arrays(root: zarr.Group, manifest: Manifest) -> None:
    n, layout = manifest.data["n_samples"], manifest.layout
    dtype = parse_dtype(layout["dtype_store"])
    columns = {item["name"]: columns_of(item) for item in manifest.parameters}
    packs: dict[str, list[str]] = layout.get("packs", {})

    def create(group: zarr.Group, node: str, width: int, chunk: int, what: str, attributes: dict[str, Any]) -> None:
        group.create_array(
            node,
            shape=(n, width),
            chunks=(layout["chunk_rows"], chunk),
            dtype=codecs.stored_dtype(dtype),
            fill_value=codecs.fill_value(dtype),
            filters=codecs.filters(layout["bitround"]),
            compressors=codecs.compressors(layout["codec"], dtype),
            dimension_names=("sample", f"element of {what}"),
            attributes=attributes | {"logical_dtype": layout["dtype_store"], "centered": layout["centered"]},
            config={"write_empty_chunks": True},
            overwrite=True,
        )

    gradients = root.require_group("gradients")
    if layout.get("hold", "disk") != "disk":
        return  # held in memory, rows are never written
    packed = {name for names in packs.values() for name in names}
    for item in manifest.parameters:
        name = item["name"]
        if manifest.representation(name) == "dense" and name not in packed:
            facts = {"parameter": name, "parameter_shape": item["shape"]}
            create(gradients, node_name(name), columns[name], item["chunk_columns"], name, facts)
    for key, names in packs.items():
        width = sum(columns[name] for name in names)
        edges = list(itertools.accumulate((columns[name] for name in names), initial=0))
        facts = {"parameters": names, "edges": edges}
        create(root.require_group("packed"), key, width, width, f"pack {key}", facts)


def _check_chunks(manifest: Manifest) -> None:
    rows = manifest.layout["chunk_rows"]
    itemsize = parse_dtype(manifest.layout["dtype_store"]).itemsize
    widest = max(manifest.parameters, key=lambda item: item["chunk_columns"])
    most = LARGEST_CHUNK // (widest["chunk_columns"] * itemsize)
    if rows > most:
        raise ConfigError(
            f"chunk_size={rows}: chunks of {widest['name']} would have {rows} x {widest['chunk_columns']} numbers. "
            f"Take at most {most}."
        )


def check_free(path: Path) -> None:
    """Refuse a path that holds something which is not a run.

    Raises:
        RunError: it is a file, or a folder with other contents.
    """
    if path.is_file():
        raise RunError(f"{path} is a file; --out names a folder that does not exist yet, or a run.")
    if path.is_dir() and any(path.iterdir()):
        require_own_files(path)
        entries = (entry.name for entry in path.iterdir() if not entry.name.endswith(".partial"))
        foreign = sorted(name for name in entries if name not in OWN_NAMES)
        if not foreign and (path / "zarr.json").exists() and not (path / "done").is_dir():
            foreign = ["another Zarr hierarchy"]
        if foreign:
            names = ", ".join(foreign[:3])
            raise RunError(f"{path} exists and is not a streamfisher run (it holds {names}); name another folder.")
        if not (path / "manifest.json").is_file() and any((path / "done").glob("*.json")):
            raise CorruptRunError(
                f"{path} is a run that has lost its manifest.json. `streamfisher verify --repair {path}` restores it; "
                "or delete the folder."
            )


def _create_sample_arrays(root: zarr.Group, manifest: Manifest) -> None:
    n, rows = manifest.data["n_samples"], manifest.layout["chunk_rows"]
    k = len(manifest.parameters)
    group = root.require_group("samples")
    for name, dtype, fill, shape in (
        ("loss", "float64", float("nan"), (n,)),
        ("n_targets", "int64", -1, (n,)),
        ("valid", "uint8", 255, (n,)),
        ("squared_norm", "float64", float("nan"), (n, k)),
    ):
        group.create_array(
            name,
            shape=shape,
            chunks=(rows, *shape[1:]),
            dtype=dtype,
            fill_value=fill,
            compressors=codecs.compressors("zstd", torch.float64),
            dimension_names=("sample", "parameter")[: len(shape)],
            config={"write_empty_chunks": True},
            overwrite=True,
        )
    group["squared_norm"].attrs["parameters"] = [item["name"] for item in manifest.parameters]


def _create_mean_arrays(root: zarr.Group, manifest: Manifest) -> None:
    n_units = len(make_units(manifest.data["n_samples"], manifest.layout["chunk_rows"]))
    for item in manifest.parameters:
        columns = columns_of(item)
        for group, shape, dimensions in (
            ("mean", (columns,), (f"element of {item['name']}",)),
            ("mean_parts", (n_units, columns), ("unit", f"element of {item['name']}")),
        ):
            root.require_group(group).create_array(
                node_name(item["name"]),
                shape=shape,
                chunks=(1,) * (len(shape) - 1) + (min(columns, 1 << 20),),
                dtype="float64",
                fill_value=float("nan"),
                compressors=codecs.compressors("zstd", torch.float64),
                dimension_names=dimensions,
                config={"write_empty_chunks": True},
                overwrite=True,
            )
