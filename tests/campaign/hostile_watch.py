"""What hostile files may not bring about: a file touched outside, a hang, memory filled, an end that is not documented.

The commands of a case run one after the other in one forked process, which is watched from outside: how long each
takes, and how much memory the process has. What lies around the run is looked at before and after.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import math
import mmap
import os
import resource
import stat
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign.workers import streamfisher

#: Seconds that one command may take, and bytes that it may have in memory.
SECONDS, BYTES = 60.0, 4 << 30
#: Exit codes of docs/reliability.md; `verify` has 7 too.
CODES = {0, 2, 3, 4, 5, 6}
#: In every canary, so that one that was read can be seen in what was printed or written.
SECRET = "canary-5f1e"
_FLOATS = {"eigenvalues", "largest_eigenvalue", "trace", "counts"}


@dataclass(frozen=True)
class Command:
    """Words of a command line; with `pictures` matplotlib is there."""

    words: tuple[object, ...]
    pictures: bool = False

    @property
    def name(self) -> str:
        """Return the command, and `--repair` where it is asked for."""
        return f"{self.words[0]} --repair" if "--repair" in self.words else str(self.words[0])


@dataclass(frozen=True)
class Said:
    """How a command ended, and what it printed."""

    command: Command
    code: int
    out: bytes
    err: bytes
    seconds: float


@dataclass(frozen=True)
class Watched:
    """What came of all commands of a case."""

    said: list[Said]
    peak: int  # bytes of memory
    stopped: str  # why the process was killed; empty: it was not


def watched(commands: Sequence[Command], work: Path, printed: Path) -> Watched:
    """Run commands in one forked process, in the folder `work`; what they print goes into `printed`."""
    for folder in (work, printed):
        folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    at = mmap.mmap(-1, 8)  # which command it is at
    process = os.fork()
    if process == 0:
        try:
            _child(commands, work, printed, at)
        finally:
            os._exit(0)
    stopped, usage = _wait(process, at, commands)
    ends = {end["number"]: end for end in map(json.loads, _lines(printed / "ends"))}
    said = []
    for number, command in enumerate(commands):
        if number in ends:
            out, err = ((printed / f"{number}.{kind}").read_bytes() for kind in ("out", "err"))
            said.append(Said(command, ends[number]["code"], out, err, ends[number]["seconds"]))
    if not stopped and len(said) < len(commands):
        stopped = f"{commands[len(said)].name}: the process died"
    return Watched(said, usage, stopped)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _child(commands: Sequence[Command], work: Path, printed: Path, at: mmap.mmap) -> None:
    os.chdir(work)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, BYTES))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    find = importlib.util.find_spec  # which hides matplotlib from some commands
    for number, command in enumerate(commands):
        at[:8] = (number + 1).to_bytes(8, "little")
        for descriptor, kind in ((1, "out"), (2, "err")):
            file = os.open(printed / f"{number}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, descriptor)
            os.close(file)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding="utf-8", write_through=True)
        sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "w", closefd=False), encoding="utf-8", errors="backslashreplace", write_through=True
        )
        importlib.util.find_spec = find
        start = time.monotonic()
        try:
            code = streamfisher(command.words, pictures=command.pictures)()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        end = {"number": number, "code": code, "seconds": time.monotonic() - start}
        with (printed / "ends").open("a") as ends:
            ends.write(json.dumps(end) + "\n")


def _wait(process: int, at: mmap.mmap, commands: Sequence[Command]) -> tuple[str, int]:
    """Return why a process was killed, or nothing, and the most memory that it had."""
    number, since, peak = b"", time.monotonic(), 0
    while True:
        found, _, usage = os.wait4(process, os.WNOHANG)
        if found:
            return "", max(peak, usage.ru_maxrss * 1024)
        with contextlib.suppress(OSError, IndexError):
            peak = max(peak, int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize())
        if at[:8] != number:
            number, since = at[:8], time.monotonic()
        name = commands[max(int.from_bytes(number, "little") - 1, 0)].name
        why = ""
        if time.monotonic() - since > SECONDS:
            why = f"{name} took more than {SECONDS:.0f} s"
        elif peak > BYTES:
            why = f"{name} took more than {BYTES >> 30} GB"
        if why:
            os.kill(process, 9)
            os.waitpid(process, 0)
            return why, peak
        time.sleep(0.005)


def canaries(outside: Path) -> None:
    """Lay out files that hostile runs lead to."""
    for name in ("precious", "zarr.json", "manifest.json", "a.partial", "c/0/0", "global/finished.json", "lock"):
        path = outside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"secret": SECRET}))


def around(folder: Path, but: Sequence[Path]) -> dict[str, tuple[Any, ...]]:
    """Return everything below a folder, but for some folders, as it must stay: kind, inode, size, times, contents."""
    found: dict[str, tuple[Any, ...]] = {}
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(here, name) not in but]
        for name in (*folders, *names):
            path = Path(here, name)
            facts = path.lstat()
            content = path.read_bytes() if stat.S_ISREG(facts.st_mode) and facts.st_size < 1 << 24 else b""
            of_file = () if stat.S_ISDIR(facts.st_mode) else (facts.st_mtime_ns, facts.st_size)
            found[str(path.relative_to(folder))] = (facts.st_mode, facts.st_ino, *of_file, content)
    return found


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return in words what is not as it was."""
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    words = {(True, False): "is gone", (False, True): "is new", (True, True): "was touched"}
    return [f"{name} {words[name in before, name in after]}" for name in names]


def values_of(content: Any, path: str = "") -> dict[str, list[float]]:
    """Return the eigenvalues and what is computed from them alone in an answer, by where they are."""
    found: dict[str, list[float]] = {}
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        where = f"{path}/{key}"
        if key in _FLOATS and isinstance(value, int | float | list):
            numbers = value if isinstance(value, list) else [value]
            found[where] = [math.nan if number is None else float(number) for number in numbers]
        elif isinstance(value, dict | list):
            found |= values_of(value, where)
    return found


def differing(expected: Mapping[str, list[float]], found: Mapping[str, list[float]]) -> str | None:
    """Return where an answer differs by more than rounding, or is of other blocks; `None`: nowhere."""
    if expected.keys() != found.keys():
        return f"of {sorted(expected.keys() ^ found.keys())[:3]} there is only one"
    for where, values in expected.items():
        others = found[where]
        scale = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        same = len(values) == len(others) and all(
            abs(one - other) <= 1e-5 * scale or (math.isnan(one) and math.isnan(other))
            for one, other in zip(values, others, strict=True)
        )
        if not same:
            return f"{where}: {others[:3]}, not {values[:3]}"
    return None
