"""The text of the demo: Python's own standard library, as bytes, with the split made by file.

Every machine that can run the demo already has this text, so nothing is downloaded. What is read is chosen so that two
builds of the same CPython version agree: files that are generated when the interpreter is built, and packages that
distributions ship separately or strip, are left out.

Everything is decided by hashes of relative paths, never by the order of a directory or by a random generator. A file
that one distribution has patched therefore changes its own windows and leaves all others where they were.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from streamfisher.errors import DataError

Split = Literal["train", "validation"]

SKIPPED_FOLDERS = frozenset(
    {
        *("__pycache__", "site-packages", "dist-packages"),  # not the standard library
        *("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "distutils", "lib2to3"),  # often stripped
        *("encodings", "pydoc_data"),  # generated tables and topics: 2 MB that is not source code
    }
)
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # written by the build or the site

VALIDATION_SHARE = 0.1  # of the files, on average


def stdlib_root() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def split_of(path: str) -> Split:
    """Return the split that a file belongs to, from its relative POSIX path alone.

    The answer is the same on every machine and for every Python version, so a file that the demo model was trained
    on never turns up in a validation sample elsewhere.
    """
    share = int.from_bytes(hashlib.sha1(path.encode()).digest()[:4], "big") / 2**32
    return "validation" if share < VALIDATION_SHARE else "train"


def source_files(split: Split, root: Path | None = None) -> list[tuple[str, Path]]:
    """Return `(relative POSIX path, file)` of every source of one split, sorted by relative path.

    Args:
        split: `train` or `validation`.
        root: the folder of a standard library; None for that of the running interpreter.

    Returns:
        Top-level modules and everything inside top-level packages, without `SKIPPED_FOLDERS`.

    Raises:
        DataError: `split` is unknown, or the folder holds no sources at all.
    """
    if split not in ("train", "validation"):
        raise DataError(f"split={split!r} is unknown. Use 'train' or 'validation'.")
    root = stdlib_root() if root is None else root
    packages = [init.parent for init in root.glob("*/__init__.py")]
    found = [*root.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))]
    files = sorted((file.relative_to(root).as_posix(), file) for file in found)
    files = [(path, file) for path, file in files if _is_wanted(path)]
    if not files:
        raise DataError(
            f"The demo reads the standard library's sources, and {root} holds 0 of them (is it zipped or stripped?). "
            "Use a Python that ships its .py files, or run streamfisher on your own text."
        )
    return [(path, file) for path, file in files if split_of(path) == split]


def split_text(split: Split, root: Path | None = None) -> bytes:
    """Return all sources of one split as one string of bytes, joined by newlines, in the order of `source_files`."""
    return b"\n".join(file.read_bytes() for _, file in source_files(split, root))


def demo_samples(
    n: int, length: int = 128, split: Split = "validation", root: Path | None = None
) -> list[dict[str, Tensor]]:
    """Return `n` sequences of `length` bytes of standard-library source, the same ones every time.

    Each file is cut into whole windows that do not overlap (what is left at its end is dropped); the windows of all
    files are ordered by the SHA-256 of `path:offset`, and the first `n` are taken. So `demo_samples(64)` is the
    beginning of `demo_samples(256)`, and consecutive sequences come from unrelated places.

    Args:
        n: number of sequences, at least 1.
        length: bytes per sequence, at least 2 (a loss needs a next byte); the demo model takes at most 128.
        split: `validation` for text the demo model has not seen, or `train`.
        root: the folder of a standard library; None for that of the running interpreter.

    Returns:
        A list of `{"input_ids": (length,) int64}`, values 0 to 255.

    Raises:
        DataError: a number is out of range, or there are no or too few sources.
    """
    if n < 1:
        raise DataError(f"n={n} sequences were asked for. Ask for at least 1.")
    if length < 2:
        raise DataError(f"length={length} leaves no next byte to predict. Use at least 2.")
    windows: list[tuple[bytes, bytes]] = []
    for path, file in source_files(split, root):
        text = file.read_bytes()
        for offset in range(0, len(text) - length + 1, length):
            windows.append((hashlib.sha256(f"{path}:{offset}".encode()).digest(), text[offset : offset + length]))
    if len(windows) < n:
        raise DataError(
            f"{n} sequences of {length} bytes were asked for, and the {split} sources under {root or stdlib_root()} "
            f"give {len(windows)}. Ask for fewer or shorter sequences."
        )
    windows.sort()
    return [{"input_ids": torch.tensor(list(text), dtype=torch.int64)} for _, text in windows[:n]]


def _is_wanted(path: str) -> bool:
    *folders, name = path.split("/")
    return SKIPPED_FOLDERS.isdisjoint(folders) and not name.startswith(SKIPPED_PREFIXES)
