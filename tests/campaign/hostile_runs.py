"""Runs from elsewhere: what is no file of theirs, what unpacks to gigabytes, and metadata that ask for them.

Each function changes a copy of a finished run and says in words what it did.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import stat
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
from campaign.corruption_campaign import kind_of

from streamfisher.runtime import write_json
from streamfisher.runtime.durable import SEAL

Make = Callable[[Path, Path, random.Random], str]  # (run, folder of the canaries, dice) -> what was done

#: Where a run may have a file or folder that this one has not.
_ABSENT = ["lock.ranks", "report.html", "spectrum.png", "fields/x/zarr.json", "x.partial", "done/tiles-first.weight"]
_ABSENT += ["done/x.json", "done/results/x.json", "factors/0/x/zarr.json", "done/deleted-0.json"]


def place(run: Path, dice: random.Random, *, folder: bool = False) -> Path:
    """Return a place of a run, every part of it equally often."""
    paths = [path for path in sorted(run.rglob("*")) if path.is_dir() == folder]
    by_kind: dict[str, list[Path]] = {}
    for path in paths:
        name = str(path.relative_to(run))
        by_kind.setdefault(kind_of(name) if path.parent != run else name, []).append(path)
    if not folder:
        by_kind["absent"] = [run / name for name in _ABSENT]
    chosen = dice.choice(by_kind[dice.choice(sorted(by_kind))])
    chosen.parent.mkdir(parents=True, exist_ok=True)
    return chosen


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def link(run: Path, outside: Path, dice: random.Random) -> str:
    """Lay a link in the place of a file, to a canary or to the file itself, now outside."""
    path = place(run, dice)
    target = outside / "precious"
    if path.exists() and dice.random() < 0.5:
        target = outside / "moved"
        shutil.move(path, target)
    _remove(path)
    if dice.random() < 0.15:
        target = Path(dice.choice(["/dev/zero", "/proc/self/environ", str(path), "/nowhere", "../outside/precious"]))
    path.symlink_to(target)
    return f"{path.relative_to(run)} -> {target.name}"


def folder_link(run: Path, outside: Path, dice: random.Random) -> str:
    """Lay a link in the place of a folder."""
    path = place(run, dice, folder=True)
    target = outside
    if dice.random() < 0.5:
        target = outside / "moved"
        shutil.move(path, target)
    _remove(path)
    if dice.random() < 0.15:
        target = Path(dice.choice(["/proc/self", "/dev", str(run), "..", "/nowhere"]))
    path.symlink_to(target, target_is_directory=True)
    return f"{path.relative_to(run)} -> {target.name}"


def hard_link(run: Path, outside: Path, dice: random.Random) -> str:
    """Make a file of the run another name of one outside, mostly with the contents that the run needs."""
    path = run / dice.choice(["lock", "log.jsonl"]) if dice.random() < 0.25 else place(run, dice)
    target = outside / "precious"
    if path.exists() and dice.random() < 0.8:
        target = outside / "linked"
        shutil.copy(path, target)
    _remove(path)
    os.link(target, path)
    return f"{path.relative_to(run)} is {target.name}"


def fifo(run: Path, outside: Path, dice: random.Random) -> str:
    """Lay a FIFO there."""
    path = place(run, dice)
    _remove(path)
    os.mkfifo(path)
    return str(path.relative_to(run))


def device(run: Path, outside: Path, dice: random.Random) -> str:
    """Lay a device there that never ends, or, where none may be made, a FIFO."""
    path = place(run, dice)
    _remove(path)
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, dice.choice([3, 5, 7])))  # null, zero, full
    except PermissionError:
        os.mkfifo(path)
    return str(path.relative_to(run))


def unix_socket(run: Path, outside: Path, dice: random.Random) -> str:
    """Lay a socket there."""
    path = place(run, dice)
    _remove(path)
    before = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)
    return str(path.relative_to(run))


def sealed(data: bytes) -> bytes:
    """Return a chunk with its right checksum."""
    return data + struct.pack("<I", google_crc32c.value(data))


@cache
def zstd_bomb(says: int | None, blocks: int = 1 << 16) -> bytes:
    """Return a Zstandard frame of `blocks` times 128 kB of zeros that says it holds `says` bytes (RFC 8878)."""
    size = b"" if says is None else says.to_bytes(8, "little")
    head = b"\x28\xb5\x2f\xfd" + bytes([0xC0 if size else 0]) + b"\x58" + size
    block = ((1 << 17) << 3) | (1 << 1)  # 128 kB of one byte
    return head + (block.to_bytes(3, "little") + b"\0") * (blocks - 1) + (block | 1).to_bytes(3, "little") + b"\0"


@cache
def gzip_bomb() -> bytes:
    """Return 8 GB of zeros as members of 64 MB."""
    pack = zlib.compressobj(9, zlib.DEFLATED, 31)
    member = b"".join(pack.compress(bytes(1 << 20)) for _ in range(64)) + pack.flush()
    return member * 128


def _blosc(says: int) -> bytes:
    data = bytearray(numcodecs.Blosc(cname="lz4", clevel=9).encode(np.zeros(1 << 22, np.uint8)))
    data[4:8] = says.to_bytes(4, "little")
    return bytes(data)


def chunk_bomb(run: Path, outside: Path, dice: random.Random) -> str:
    """Put a chunk that unpacks to gigabytes, or is said to have a terabyte, in the place of one, or of any file."""
    chunks = [path for path in sorted(run.rglob("c/**/*")) if path.is_file()]
    by_kind: dict[str, list[Path]] = {}
    for chunk in chunks:
        by_kind.setdefault(kind_of(str(chunk.relative_to(run))), []).append(chunk)
    path = dice.choice(by_kind[dice.choice(sorted(by_kind))])
    size = _size_of(_array_of(path))
    bombs: dict[str, Callable[[], bytes]] = {
        "zstd of 8 GB": lambda: zstd_bomb(8 << 30),
        "zstd of 8 GB that says the right size": lambda: zstd_bomb(size),
        "zstd of 8 GB that says nothing": lambda: zstd_bomb(None),
        "gzip of 8 GB": gzip_bomb,
        "blosc that says 2 GB": lambda: _blosc((1 << 31) - 1),
        "blosc that says the right size": lambda: _blosc(size),
        "random bytes": lambda: dice.randbytes(dice.choice([0, 1, 3, 20, 5000])),
        "a terabyte of nothing": lambda: b"",
    }
    name = dice.choice(sorted(bombs))
    if name == "a terabyte of nothing":
        path = dice.choice([path, place(run, dice)])
        with path.open("ab") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes(sealed(bombs[name]()) if dice.random() < 0.9 else bombs[name]())
    return f"{path.relative_to(run)}: {name}"


def _array_of(chunk: Path) -> dict[str, Any]:
    folder = next(folder for folder in chunk.parents if (folder / "zarr.json").is_file())
    return json.loads((folder / "zarr.json").read_text())


def _size_of(array: dict[str, Any]) -> int:
    sizes = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "uint16": 2, "uint8": 1}
    kind = array["data_type"]  # of texts, whose entries have no size of their own, a name or an object
    itemsize = sizes.get(kind, 8) if isinstance(kind, str) else 8
    return itemsize * int(np.prod(array["chunk_grid"]["configuration"]["chunk_shape"]))


_GZIP = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip", "configuration": {"level": 9}}]
_HUGE = (-1, 0, 1, 2**31, 2**40, 2**63, 2**70, 1e308, "8", None, True)


def _metadata(content: dict[str, Any], dice: random.Random) -> tuple[str, dict[str, Any]]:
    """Return in words and as keys what metadata of an array are made to say."""
    shape = content.get("shape") or [8]
    huge = [dice.choice(_HUGE) for _ in shape]
    grid = {"name": "regular", "configuration": {"chunk_shape": huge}}
    options: dict[str, dict[str, Any]] = {
        f"shape {huge}": {"shape": huge},
        f"chunks {huge}": {"chunk_grid": grid},
        f"shape and chunks {huge}": {"shape": huge, "chunk_grid": grid},
        "one axis more": {"shape": [*shape, 2**40]},
        "strings of any length": {"data_type": "string", "codecs": [{"name": "vlen-utf8"}], "fill_value": ""},
        "bytes of any length": {"data_type": "variable_length_bytes", "codecs": [{"name": "vlen-bytes"}]},
        "gzip": {"codecs": _GZIP},
        "a codec of no name": {"codecs": [{"name": "../../outside"}]},
        "codecs without end": {"codecs": content.get("codecs", _GZIP) * 50_000},
        "pickles": {"codecs": [{"name": "numcodecs.pickle"}], "data_type": {"name": "object", "configuration": {}}},
        "fill value": {"fill_value": dice.choice([7.0, 1e999, "NaN", "0x7fc00000", None, [1], 2**70])},
        "a dtype that is none": {"data_type": dice.choice(["object", "float7", 7, None, "r99999999999"])},
        "attributes": {"attributes": {"parameter": "x" * (1 << 22), "crc32c": -1, "field": ["x"]}},
        "no attributes": {"attributes": dice.choice([None, [], 7, "x"])},
        "names of dimensions": {"dimension_names": dice.choice([["x"] * 10_000, 7, [None, 2]])},
        "another format": {"zarr_format": dice.choice([2, 4, "3", None, 2**70])},
        "consolidated": {"consolidated_metadata": {"kind": "inline", "metadata": {"../../outside": content}}},
        "a group": {"node_type": "group"},
    }
    return (name := dice.choice(sorted(options))), options[name]


def metadata_bomb(run: Path, outside: Path, dice: random.Random) -> str:
    """Let the metadata of an array or group ask for more than any has."""
    paths = [path for path in sorted(run.rglob("zarr.json")) if path.is_file()]
    by_kind: dict[str, list[Path]] = {}
    for path in paths:
        by_kind.setdefault(path.relative_to(run).parts[0], []).append(path)
    path = dice.choice(by_kind[dice.choice(sorted(by_kind))])
    content = json.loads(path.read_text())
    name, changes = _metadata(content, dice)
    path.write_text(json.dumps(content | changes))
    if name == "gzip":
        for chunk in path.parent.glob("c/**/*"):
            if chunk.is_file():
                chunk.write_bytes(gzip_bomb())
    return f"{path.relative_to(run)}: {name}"


def json_bomb(run: Path, outside: Path, dice: random.Random) -> str:
    """Let a JSON file of the run be as large or as deep as it can be, sealed where that can be done."""
    paths = [path for path in sorted(run.rglob("*")) if path.suffix in (".json", ".jsonl") or path.name == "lock"]
    by_kind: dict[str, list[Path]] = {}
    for path in filter(Path.is_file, paths):
        by_kind.setdefault(kind_of(str(path.relative_to(run))), []).append(path)
    path = dice.choice(by_kind[dice.choice(sorted(by_kind))])
    text = path.read_text()
    raw: dict[str, Callable[[], str]] = {
        "deep lists": lambda: "[" * 200_000 + "]" * 200_000,
        "deep objects": lambda: '{"a":' * 100_000 + "1" + "}" * 100_000,
        "a number of 5,000 digits": lambda: '{"start": ' + "9" * 5000 + "}",
        "an exponent": lambda: '{"time": 1e999999, "beat": 1, "token": "x", "pid": 1e999, "host": "x"}',
        "a byte that is none": lambda: '{"a": "\x00\ufffe"}',
        "surrogates": lambda: '{"a": "\\ud800", "\\udfff": 1}',
        "NaN": lambda: '{"a": NaN, "b": Infinity}',
        "nothing": lambda: "",
        "a million lines": lambda: '{"event": "warning", "rank": 0}\n' * 1_000_000,
        "one line of 60 MB": lambda: '{"event": "' + "x" * (60 << 20) + '"}\n',
        "a terabyte": lambda: "",
    }
    large: dict[str, Callable[[], Any]] = {
        "a string of 15 MB": lambda: "x" * (15 << 20),
        "a million numbers": lambda: [0] * 1_000_000,
        "a hundred thousand keys": lambda: {str(number): number for number in range(100_000)},
        "lists within lists": lambda: [[[[]] * 100] * 100] * 20,
    }
    name = dice.choice([*sorted(raw), *sorted(large)])
    if name == "a terabyte":
        with path.open("ab") as file:
            file.truncate(1 << 40)
    elif name in raw:
        path.write_text(raw[name](), encoding="utf-8")
    else:
        content = _parsed(text)
        key = dice.choice(sorted(content) or ["more"])
        write_sealed(path, content | {key: large[name]()})
        name = f"{key}: {name}"
    return f"{path.relative_to(run)}: {name}"


def _parsed(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as streamfisher does, with the seal that it must have; metadata have none."""
    content = {key: value for key, value in content.items() if key != SEAL}
    if path.name == "zarr.json":
        path.write_text(json.dumps(content))
        return
    write_json(path, content)


MAKERS: dict[str, Make] = {
    "link to a file": link,
    "link to a folder": folder_link,
    "hard link": hard_link,
    "FIFO": fifo,
    "device": device,
    "socket": unix_socket,
    "bomb in a chunk": chunk_bomb,
    "bomb in metadata": metadata_bomb,
    "bomb in JSON": json_bomb,
}
