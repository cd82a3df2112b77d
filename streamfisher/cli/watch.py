"""Follow a run from elsewhere: its markers say how far it is, its log what is going on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamfisher.errors import RunError
from streamfisher.runtime.own_files import require_own
from streamfisher.runtime.printable import printable
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.runtime.run_log import read_log
from streamfisher.store import RunStore, stage_of

#: Seconds without a line in the log after which that is said.
_SILENCE = 300.0


def follow(
    path: Path,
    show: Callable[[str], None],
    *,
    interval: float = 5.0,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Show how far a run is whenever that changes; return when the process that writes it ends.

    Args:
        path: of the run; it may not be there yet.
        show: called with each line.
        interval: seconds between two looks.
        sleep: for tests.
        clock: for tests.

    Returns:
        Whether the run is complete: all gradients, and their Grams.

    Raises:
        RunError: it is there and is no run.
    """
    before, offset, heard, silent = "", 0, clock(), False
    while True:
        if isinstance(path, RemotePath):
            path.store.forget()
        lines, offset = read_log(path, offset)
        for line in lines:
            text = _words(line)
            if text:
                show(printable(text))
        state, complete = _state(path)
        if state != before or lines:
            heard, silent = clock(), False
        if state != before:
            show(state)
            before = state
        ended = [line for line in lines if line.get("event") in ("end", "failed") and line.get("rank") == 0]
        if complete or (ended and ended[-1]["event"] == "failed"):
            return complete
        if clock() - heard > _SILENCE and not silent:
            show(f"nothing has changed for {_SILENCE:.0f} s; see who holds {path / 'lock'}")
            silent = True
        sleep(interval)


def _state(path: Path) -> tuple[str, bool]:
    if not (path / "manifest.json").is_file():
        if path.is_file():
            raise RunError(f"{path} is a file, not a run.")
        if path.is_dir():
            require_own(path, path / "manifest.json")  # which may be there, and no file
        return f"{path}: not there yet", False
    store = RunStore(path)
    parts = []
    for wave in range(len(store.waves)):
        done = sum(len(store.units[index]) for index in store.markers.done_units(stage_of(wave)))
        name = f"wave {wave + 1}: " if len(store.waves) > 1 else ""
        parts.append(f"{name}{done} of {store.n_samples} samples")
    grams = sum(store.grams.has(key) for key in store.gram_members)
    parts.append(f"{grams} of {len(store.gram_members)} Grams")
    return f"{path}: {', '.join(parts)}", store.markers.is_collected and grams == len(store.gram_members)


def _words(line: dict[str, Any]) -> str:
    """Return what a line of the log says to someone who watches; units are counted instead."""
    event = line.get("event")
    where = f"{line.get('time', '')} rank {line.get('rank')}, {line.get('stage')}"
    if event in ("warning", "failed"):
        return f"{where}: {event}: {line.get('message')}"
    if event in ("start", "end"):
        return f"{where}: {event}"
    if event == "rate":
        return f"{where}: {line.get('samples_per_s')} samples/s"
    return ""
