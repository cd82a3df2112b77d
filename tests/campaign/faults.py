"""Faults, and the moment at which each strikes a command that runs in this process.

An audit hook sees every file that Python opens, renames, links or removes below the run, from whatever thread; calls of
`os.fsync`, forward passes and eigensolves are seen too. Each such *event* belongs to a stage of the run, told by its
path. A fault strikes at one event: a signal is sent, an error is raised in its place, or the disk itself is changed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MNT_DETACH = 1, 32, 4096, 2
_FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}

STAGES = ("manifest", "mean", "rows", "wave change", "growth", "gram", "eigensolve", "eigenvectors", "report")


@dataclass(frozen=True)
class Disk:
    """A filesystem of a few megabytes that is mounted for the campaign, and where runs see it."""

    home: Path  # the tmpfs
    seen: Path  # a second mount of it, below which runs are written

    def mount(self) -> None:
        """Mount both; needs root."""
        for folder in (self.home, self.seen):
            folder.mkdir(parents=True, exist_ok=True)
        _mount("tmpfs", self.home, "tmpfs", 0, "size=256m")
        self.show()

    def show(self) -> None:
        """Mount the filesystem where runs are to see it."""
        _mount(str(self.home), self.seen, None, _MS_BIND, None)

    def hide(self) -> None:
        """Take away whatever is mounted where runs see the disk, however often, while it is in use."""
        while os.path.ismount(self.seen):
            _call("umount2", str(self.seen).encode(), _MNT_DETACH)

    def unmount(self) -> None:
        """Leave nothing behind."""
        self.hide()
        if self.home.is_mount():
            _call("umount2", str(self.home).encode(), _MNT_DETACH)

    def fill(self) -> None:
        """Leave no room: the filesystem becomes as small as what is on it."""
        statistics = os.statvfs(self.home)
        used = (statistics.f_blocks - statistics.f_bfree) * statistics.f_frsize
        _mount("tmpfs", self.home, None, _MS_REMOUNT, f"size={max(used, 4096)}")

    def empty(self) -> None:
        """Make room again."""
        _mount("tmpfs", self.home, None, _MS_REMOUNT, "size=256m")

    def forbid(self) -> None:
        """Make every path on the disk read-only from now on; files that are open stay writable."""
        _mount(str(self.seen), self.seen, None, _MS_BIND, None)
        _mount("none", self.seen, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY, None)


def _mount(source: str, target: Path, kind: str | None, flags: int, data: str | None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, str(target), kind, data)]
    _call("mount", encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def stage_of(path: str, growing: bool) -> str | None:
    """Return the stage that a path below the run (relative to it) belongs to; `None` for the lock and the like."""
    first, _, rest = path.partition("/")
    name = rest.rsplit("/", 1)[-1]
    if first in ("spectrum.json", "spectrum.png", "report.html") or first.startswith("spectrum.json"):
        return "report"
    if first == "eigenvectors" or path.startswith("done/eigenvectors"):
        return "eigenvectors"
    if first == "gram" or first == "gram_mean" or name.startswith("gram-"):
        return "gram"
    if first in ("mean", "mean_parts") or (first == "done" and name.startswith("mean")):
        return "mean" if not path.endswith("zarr.json") else "manifest"
    if first == "done" and name.startswith("deleted"):
        return "wave change"
    if path.startswith(("manifest", "config.yaml")) or (
        path.endswith("zarr.json") and first in ("gradients", "packed", "samples")
    ):
        return "growth" if growing else "manifest"
    if first in ("gradients", "packed", "samples", "factors") or (first == "done" and name.startswith("rows")):
        return "rows"
    return None


class Watch:
    """Counts the events of this process by stage, and strikes at one of them.

    Args:
        run: the folder; events elsewhere are not seen.
        growing: metadata and manifest that are written belong to the growth of a run.
        stage: where to strike; `None` only counts.
        position: at which event of the stage, from 0.
        strike: called there with the name of the event and its path.
        only: names of events that count; `None` means all.
    """

    def __init__(
        self,
        run: Path,
        *,
        growing: bool = False,
        stage: str | None = None,
        position: int = 0,
        strike: Callable[[str, str], None] | None = None,
        only: frozenset[str] | None = None,
    ):
        self.run, self.growing, self.stage, self.position = str(run), growing, stage, position
        self.strike, self.only = strike, only
        self.seen: Counter[tuple[str, str]] = Counter()  # (stage, name of the event) -> how many
        self.count = 0  # events of the stage where it strikes
        self.struck = False
        self._lock = threading.RLock()

    def install(self) -> None:
        """See everything from now on; for good, as audit hooks cannot be removed."""
        import torch

        from streamfisher.solving import eigen

        sys.addaudithook(self._audit)
        fsync, drive = os.fsync, eigen._drive

        def watched_fsync(file: int) -> None:
            self.event("fsync", str(Path(f"/proc/self/fd/{file}").readlink()))
            fsync(file)

        def watched_drive(*arguments: object) -> object:
            self.event("solve", f"{self.run}/", "eigensolve")
            return drive(*arguments)

        os.fsync, eigen._drive = watched_fsync, watched_drive
        torch.nn.modules.module.register_module_forward_pre_hook(self._forward)

    def _forward(self, module: object, inputs: object) -> None:
        self.event("forward", f"{self.run}/gradients/", "rows")

    def _audit(self, event: str, arguments: tuple) -> None:
        if event not in _FILE_EVENTS:
            return
        path = arguments[0]
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if isinstance(path, str | os.PathLike):
            name = event
            if event == "open":
                writing = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                name = "write" if writing else "read"
            self.event(name, os.fspath(path))

    def event(self, name: str, path: str, stage: str | None = None) -> None:
        """Count an event and strike if it is the one."""
        if not path.startswith(self.run + "/"):
            return
        stage = stage or stage_of(path[len(self.run) + 1 :], self.growing)
        if stage == "rows" and name == "shutil.rmtree":
            stage = "wave change"
        if stage is None or (self.only is not None and name not in self.only):
            return
        with self._lock:
            self.seen[stage, name] += 1
            hit = stage == self.stage and self.count == self.position and not self.struck
            self.count += stage == self.stage
            self.struck = self.struck or hit
        if hit or (self.struck and getattr(self.strike, "lasting", False)):
            assert self.strike is not None
            self.strike(name, path)


def error(number: int, *, lasting: bool = False, writes_only: bool = False) -> Callable[[str, str], None]:
    """Return a strike that raises `OSError(number)`; a lasting one does so at every later event too."""

    def strike(name: str, path: str) -> None:
        if not (writes_only and name in ("read", "solve", "forward")):
            raise OSError(number, os.strerror(number), path)

    strike.lasting = lasting  # type: ignore[attr-defined]
    return strike


def send(number: signal.Signals) -> Callable[[str, str], None]:
    """Return a strike that sends this process a signal."""
    return lambda name, path: os.kill(os.getpid(), number)


def no_more_memory(name: str, path: str) -> None:
    """Let the kernel refuse every further page to this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)


def exception(name: str, path: str) -> None:
    """Fail as the user's model may."""
    raise RuntimeError("injected: the model failed")


def vanish(run: Path) -> Callable[[str, str], None]:
    """Return a strike that moves the run's folder away, as a disk that is lost, where nothing may be mounted."""
    return lambda name, path: run.rename(run.with_name(run.name + ".vanished"))


NO_SPACE, READ_ONLY, BROKEN = errno.ENOSPC, errno.EROFS, errno.EIO
