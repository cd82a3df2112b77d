"""Data, choices of samples and checkpoints that are made to hang, to fill memory, or to end in a traceback.

Each function writes files into a folder and returns in words what it wrote, and the commands that are given them.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from campaign.hostile_configs import DIGITS, MODEL, QUIET, Given
from campaign.hostile_fields import EVILS
from campaign.hostile_watch import Command


def _npy(descr: str, shape: str, data: bytes = b"\0" * 256, order: str = "False") -> bytes:
    """Return a .npy file whose header says what it wants."""
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode("latin1")
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def _saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def _archive(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        if name:
            archive.writestr(name, content)
    return file.getvalue()


_IDS = np.arange(40, dtype=np.int64).reshape(5, 8) % 256
ARRAYS: dict[str, Callable[[], bytes]] = {
    "big-endian": lambda: _saved(_IDS.astype(">i8")),
    "Fortran order": lambda: _saved(np.asfortranarray(_IDS)),
    "uint16": lambda: _saved(_IDS.astype(np.uint16)),
    "uint64": lambda: _saved(_IDS.astype(np.uint64)),
    "uint64 beyond int64": lambda: _saved(_IDS.astype(np.uint64) + np.uint64(2**63)),
    "longdouble": lambda: _saved(_IDS.astype(np.longdouble)),
    "big-endian floats": lambda: _saved(_IDS.astype(">f4")),
    "complex": lambda: _saved(_IDS.astype(complex)),
    "half": lambda: _saved(_IDS.astype(np.float16)),
    "objects": lambda: _saved(np.array([{"a": 1}, print], dtype=object)),
    "strings": lambda: _saved(np.array(["a", "b"])),
    "dates": lambda: _saved(np.array(["2001-01-01"], dtype="M8[D]")),
    "records": lambda: _saved(np.zeros(3, dtype=[("a", "i4"), ("b", "O")])),
    "records of numbers": lambda: _saved(np.zeros(3, dtype=[("a", "i4")])),
    "void": lambda: _saved(np.zeros(3, dtype="V8")),
    "no axis": lambda: _saved(np.int64(3)),
    "no samples": lambda: _saved(np.zeros((0, 4), np.int64)),
    "no tokens": lambda: _saved(np.zeros((4, 0), np.int64)),
    "negative": lambda: _saved(-_IDS),
    "bool": lambda: _saved(_IDS > 3),
    "a terabyte": lambda: _npy("'<i8'", f"({1 << 37},)"),
    "2^62 elements": lambda: _npy("'<i8'", f"({1 << 31}, {1 << 31})"),
    "2^70 elements": lambda: _npy("'<i8'", f"({1 << 70},)"),
    "a negative axis": lambda: _npy("'<i8'", "(-1, 4)"),
    "axes of text": lambda: _npy("'<i8'", "('x',)"),
    "a long header": lambda: _npy("'<i8'", "(" + "1," * 5000 + ")"),
    "a deep header": lambda: _npy("'<i8'", "(" * 5000),
    "a header of code": lambda: _npy("__import__('os').system('true')", "(4,)"),
    "elements of no size": lambda: _npy("'V0'", f"({1 << 40},)"),
    "strings of no size": lambda: _npy("'U0'", f"({1 << 40},)"),
    "elements of 2 GB": lambda: _npy("'V2147483647'", "(9,)"),
    "no version": lambda: b"\x93NUMPY\x09\x00" + b"x" * 100,
    "torn": lambda: _saved(_IDS)[:100],
    "nothing": lambda: b"",
    "a gzip": lambda: b"\x1f\x8b" + b"x" * 100,
}
_SAME = ("big-endian", "Fortran order", "uint16", "uint64")
ARCHIVES: dict[str, Callable[[], bytes]] = {
    "a name that leads out": lambda: _archive("../../outside/precious.npy", ARRAYS["big-endian"]()),
    "a member that is no array": lambda: _archive("input_ids.npy", b"x" * 100),
    "a member of no kind": lambda: _archive("input_ids", b"x" * 100),
    "no members": lambda: _archive("", b""),
    "no zip": lambda: b"PK\x03\x04" + b"\0" * 300,
}
_LINES: dict[str, str] = {
    "ids of 2^63": '{"text": [1, 9223372036854775808]}\n' * 3,
    "ids of 2^70": '{"text": [1, 1180591620717411303424]}\n' * 3,
    "negative ids": '{"text": [1, -5]}\n' * 3,
    "ids of 5,000 digits": f'{{"text": [1, {DIGITS}]}}\n' * 3,
    "deep": '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
    "deep objects": '{"a":' * 100_000 + "\n",
    "lone surrogates": '{"text": "a\\ud800b"}\n' * 3,
    "zeros": '{"text": "\\u0000\\u0000"}\n' * 3,
    "true ids": '{"text": [true, false]}\n' * 3,
    "NaN": '{"text": [NaN, 1]}\n' * 3,
    "keys that act": json.dumps(dict.fromkeys(EVILS, 1)) + "\n",
    "a key of 8 MB": json.dumps({"x" * (8 << 20): 1}) + "\n",
    "a hundred thousand keys": json.dumps(dict.fromkeys(map(str, range(100_000)), 1)) + "\n",
    "a line of 64 MB": '{"text": "' + "x" * (64 << 20) + '"}\n',
    "empty texts": '{"text": ""}\n' * 3,
    "one letter": '{"text": "a"}\n' * 3,
    "no ids": '{"text": []}\n' * 3,
    "not UTF-8": '{"text": "\udcff\udcfe ab"}\n' * 3,
    "a byte order mark": '\ufeff{"text": "abc"}\n' * 3,
    "all good, last torn": '{"text": "abcdef"}\n' * 4 + '{"text": "abc',
    "the field twice": '{"text": 7, "text": "abcdef"}\n' * 4,
}


def data(folder: Path, finished: Path, dice: random.Random) -> Given:
    """Write samples, or the choice of samples of a stored run."""
    which = dice.choice(["npy", "npy", "npz", "jsonl", "jsonl", "chosen"])
    same = ""
    if which == "jsonl":
        name = dice.choice(sorted(_LINES))
        path = folder / "a.jsonl"
        path.write_bytes(_LINES[name].encode("utf-8", "surrogateescape"))
    elif which == "npz" and dice.random() < 0.5:
        name = dice.choice(sorted(ARCHIVES))
        path = folder / "a.npz"
        path.write_bytes(ARCHIVES[name]())
    else:
        name = dice.choice(sorted(ARRAYS))
        path = folder / ("a.npz" if which == "npz" else "a.npy")
        path.write_bytes(ARRAYS[name]())
        if which == "npz":
            member = dice.choice(["input_ids.npy", f"{dice.choice(EVILS)!a}.npy"])
            path.write_bytes(_archive(member, ARRAYS[name]()))
        same = "ids" if which == "npy" and name in _SAME else ""
    if which == "chosen":
        commands = [
            Command(("spectrum", finished, option, path, "--blocks", "none", "--json", "--quiet"))
            for option in ("--samples", "--weights")
        ]
        return f"chosen by {name}", commands, ""
    run = ("run", MODEL, path, "--out", folder / "new.zarr", "--tokenizer", "bytes", "--json", *QUIET)
    commands = [Command((*run, "--blocks", "none", "--max-length", 8))]
    commands.append(Command(("plan", MODEL, path, "--tokenizer", "bytes")))
    return f"{path.name}: {name}", commands, same


def reference_data(folder: Path) -> Command:
    """Return the command whose answer that of harmless arrays must be."""
    np.save(folder / "ids.npy", _IDS)
    run = ("run", MODEL, folder / "ids.npy", "--out", folder / "ids.zarr", "--tokenizer", "bytes", "--json", *QUIET)
    return Command((*run, "--blocks", "none", "--max-length", 8))


def checkpoint(folder: Path) -> Path:
    """Write the checkpoint of a tiny Llama."""
    from factored_models import llama

    llama().save_pretrained(folder / "llama")
    return folder / "llama"


_VALUES: tuple[Any, ...] = (None, True, -1, 0, 0.5, 2**31, 2**63, 2**70, 1e308, "x", "", [], [[]], {}, {"a": []})
_VALUES += ("../../outside", "\ud800", *EVILS[:3])


def _safetensors(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def model(folder: Path, finished: Path, dice: random.Random, *, saved: Path) -> Given:
    """Write a checkpoint whose config.json or weights lie."""
    path = folder / "llama"
    shutil.copytree(saved, path)
    if dice.random() < 0.6:
        text = json.loads((path / "config.json").read_text())
        key = dice.choice([*sorted(text), "architectures", "auto_map", "quantization_config", "rope_scaling"])
        value = dice.choice(_VALUES)
        if key == "auto_map":
            value = {"AutoConfig": "x--y.Z", "AutoModelForCausalLM": "../../outside.x.Y"}
        (path / "config.json").write_text(json.dumps(text | {key: value}))
        what = f"config.json: {key} = {value!a}"[:90]
        if dice.random() < 0.15:
            what = dice.choice(["", "[]", "7", "[" * 100_000, '{"model_type": ' + DIGITS + "}", "\udcff", "null"])
            (path / "config.json").write_bytes(what.encode("utf-8", "surrogateescape"))
            what = f"config.json: {what[:30]!a}"
    else:
        what = _lying_weights(path / "model.safetensors", dice)
    data = "campaign.models:few_ids"
    commands = [Command(("run", path, data, "--out", folder / "new.zarr", *QUIET)), Command(("plan", path, data))]
    return what, commands, ""


def _lying_weights(path: Path, dice: random.Random) -> str:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    name = dice.choice(sorted(key for key in header if key != "__metadata__"))

    def changed(**facts: Any) -> None:
        _safetensors(path, header | {name: header[name] | facts}, rest)

    ways: dict[str, Callable[[], object]] = {
        "a header of 2^60 bytes": lambda: _safetensors(path, header, rest, 1 << 60),
        "a header of no JSON": lambda: _safetensors(path, b"{" * 1000, rest),
        "a deep header": lambda: _safetensors(path, b"[" * 200_000, rest),
        "a header that is no object": lambda: _safetensors(path, [], rest),
        "offsets beyond the file": lambda: changed(data_offsets=[0, 1 << 50]),
        "offsets that turn round": lambda: changed(data_offsets=[8, 0]),
        "another shape": lambda: changed(shape=[1 << 40]),
        "a shape that overflows": lambda: changed(shape=[1 << 62, 4, 0]),
        "another dtype": lambda: changed(dtype="F64"),
        "a dtype that is none": lambda: changed(dtype=EVILS[0]),
        "one tensor less": lambda: _safetensors(path, {key: header[key] for key in header if key != name}, rest),
        "NaN": lambda: path.write_bytes(content[: 8 + size] + b"\xff" * len(rest)),
        "torn": lambda: path.write_bytes(content[: dice.randrange(len(content))]),
        "a pickle": lambda: path.write_bytes(b"\x80\x04\x95" + bytes(200)),
        "nothing": lambda: path.write_bytes(b""),
        "none, and a pickle beside it": lambda: path.rename(path.with_name("pytorch_model.bin")),
        "a terabyte": lambda: _longer(path),
    }
    way = dice.choice(sorted(ways))
    ways[way]()
    return f"weights: {way}"


def _longer(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(1 << 40)
