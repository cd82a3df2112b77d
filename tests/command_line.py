"""The command line in this process, and what a folder holds, for tests."""

from __future__ import annotations

from pathlib import Path

from streamfisher.cli.main import build_parser, main

__all__ = ["arrays", "build_parser", "cli", "contents", "main"]


def cli(*arguments: object) -> int:
    """Return the exit code of `streamfisher ARGUMENTS`; argparse's own refusals count too."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes, but for the lock and the log, which say what was tried last."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("lock", "log.jsonl")
    }


def arrays(run: Path) -> dict[str, bytes]:
    """Return the files of a run's arrays: gradients, per-sample values and Grams."""
    parts = ("gradients", "packed", "samples", "gram", "mean")
    return {name: data for name, data in contents(run).items() if name.split("/")[0] in parts}
