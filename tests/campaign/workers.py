"""Commands of streamfisher in forked processes: everything is imported once, and each command has its own process."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: What is compared between two runs: arrays with their metadata, and the spectrum.
COMPARED = (
    "gradients",
    "packed",
    "samples",
    "factors",
    "fields",
    "mean",
    "gram",
    "gram_mean",
    "eigenvectors",
    "spectrum.json",
    "zarr.json",
)


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    code: int  # exit code, or minus the signal that ended it
    printed: str  # stdout and stderr

    @property
    def words(self) -> str:
        """Return the exit code, or the name of the signal."""
        return f"exit {self.code}" if self.code >= 0 else signal.Signals(-self.code).name


def import_everything() -> None:
    """Import what the commands import, without starting a thread: what is forked must have one.

    No collection of a fork looks through what is frozen, so its pages stay shared.
    """
    import gc

    import torch

    torch.set_num_threads(1)
    import accelerate  # noqa: F401
    import matplotlib

    matplotlib.use("Agg")
    import dask.threaded  # noqa: F401
    import distributed  # noqa: F401
    import matplotlib.pyplot
    import tiny_models  # noqa: F401
    import torch._dynamo

    import streamfisher.cli.main
    import streamfisher.reports
    import streamfisher.verification  # noqa: F401

    gc.collect()
    gc.freeze()


def fork(
    command: Callable[[], int],
    output: Path,
    *,
    before: Callable[[], None] = lambda: None,
    kill_after: float | None = None,
    patience: float | None = None,
) -> Ending:
    """Run `command` in a forked process and say how it ended.

    Args:
        command: returns the exit code.
        output: file for what it prints.
        before: called in the new process first.
        kill_after: seconds after which it gets SIGKILL.
        patience: seconds after which it is given up and killed; `None`: 300, and giving it up is an error.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        code = 70
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
            before()
            code = command()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    status = wait(process, patience or 300.0)
    if status is None and patience is None:
        raise TimeoutError(f"a command of the campaign did not end: {output.read_text(errors='replace')[-2000:]}")
    if status is None:
        return Ending(-signal.SIGKILL, "it did not end and was killed")
    return Ending(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"))


def wait(process: int, seconds: float) -> int | None:
    """Return the status of a process that ends within `seconds`; `None` where it did not and was killed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def streamfisher(arguments: Sequence[object], *, pictures: bool = False) -> Callable[[], int]:
    """Return a command that runs the command line; without `pictures`, as if matplotlib were not installed."""

    def command() -> int:
        import importlib.util

        from streamfisher.cli.main import main

        find = importlib.util.find_spec
        if not pictures:
            importlib.util.find_spec = lambda name, *more: None if name == "matplotlib" else find(name, *more)
        return main([str(argument) for argument in arguments])

    return command


def files(run: Path, more: Sequence[str] = ()) -> dict[str, bytes]:
    """Return the files of a run that must not depend on its history, and `more`."""
    found = {}
    for name in (*COMPARED, *more):
        path = run / name
        paths = [path] if path.is_file() else sorted(path.rglob("*"))
        found |= {str(each.relative_to(run)): each.read_bytes() for each in paths if each.is_file()}
    return found


def difference(expected: dict[str, bytes], run: Path) -> str | None:
    """Return in words how a run differs from what it must be; `None` where every byte is the same."""
    found = files(run)
    left = sorted(name for name in found.keys() - expected.keys() if not name.endswith(".partial"))
    missing = sorted(expected.keys() - found.keys())
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    for what, names in (("is missing", missing), ("is not in an undisturbed run", left), ("has other bytes", other)):
        if names:
            return f"{names[0]} {what}" + (f" ({len(names)} files)" if len(names) > 1 else "")
    return None


def copy(source: Path, target: Path) -> None:
    """Make `target` a copy of a run, or nothing where `source` does not exist."""
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, target)
