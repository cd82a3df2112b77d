"""Files of a staged run, sent to the store: what a marker stands for first, and then the marker."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from streamfisher.errors import RemoteError, RunError
from streamfisher.runtime.remote_filesystem import answering
from streamfisher.runtime.staging import Staging, may_be_freed

#: Seconds between two looks at what is new, between two tries at a store that does not answer, and of trying at last.
_LOOK, _PAUSE, _PATIENCE = 2.0, 5.0, 60.0
#: Files that are sent at a time, and bytes from which one is sent in parts.
_AT_A_TIME, _IN_PARTS = 8, 64 << 20
_MARKERS, _MANIFEST = "done/", "manifest.json"


class Upload:
    """Sends what is new in a staged run, in a thread of its own, until it is left.

    Leaving sends what is left, or says what could not be sent.

    Args:
        staging: of the run.
        check: raises once nothing may be written any more, as when the lock is lost.
        budget: bytes that the run may take here; chunks of gradients that are at the store are freed beyond it.
    """

    def __init__(self, staging: Staging, check: Callable[[], None], budget: int) -> None:
        self.staging, self.check, self.budget = staging, check, budget
        self.filesystem, self.root = staging.store.filesystem, staging.store.root
        self._failed: BaseException | None = None
        self._here, self._since = 0, 0  # bytes here when it was looked last, and those that came since
        self._pass = threading.Lock()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="streamfisher-upload", daemon=True)

    def __enter__(self) -> Upload:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._left.set()
        if kind is not None and issubclass(kind, KeyboardInterrupt):  # which ends a command at once
            return
        self._thread.join()
        deadline = time.monotonic() + (_PATIENCE if error is None else 0.0)
        while True:
            try:
                self.sync()
                return
            except (RemoteError, RunError) as problem:
                if isinstance(problem, RunError) or time.monotonic() >= deadline:
                    if error is not None:  # which is to be seen, and what is here is sent by the next run
                        return
                    raise type(problem)(
                        f"{problem} What is finished is in {self.staging.folder}; the same command sends it and "
                        "goes on."
                    ) from problem
                time.sleep(_PAUSE)

    def made(self, size: int) -> None:
        """Take note of so many new bytes; wait for room where the budget has none left.

        Raises:
            RunError: nothing may be written any more.
            RemoteError: there is no room, and the store does not answer.
        """
        with contextlib.suppress(RemoteError):  # there may be room for some time
            self.check()
        if isinstance(self._failed, RunError):
            raise self._failed
        self._since += size
        if self._here + self._since <= self.budget:
            return
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                self.sync()
                self._free()
                return
            except RemoteError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_PAUSE)

    def sync(self) -> None:
        """Send what is new, and delete what is no more.

        Raises:
            RemoteError: the store does not answer.
            RunError: another process has written there.
        """
        with self._pass:
            self.check()
            self._since = 0
            markers = self._new_markers()  # before anything else is looked at: their bytes are there
            here = {name: (facts.st_size, facts.st_mtime_ns) for name, facts in self.staging.files()}
            self._here = sum(size for size, _ in here.values())
            sent, away = dict(self.staging.sent), dict(self.staging.away)
            gone = [name for name in sent if name not in here and name not in away]
            stale = [name for name in (*markers, *gone) if name in sent and name.startswith(_MARKERS)]
            self._delete(stale)  # no marker may stand for bytes that are being replaced
            new = [name for name, facts in here.items() if sent.get(name) != facts and not name.startswith(_MARKERS)]
            self._send({name: here[name] for name in new if name != _MANIFEST})
            self._send({name: here[name] for name in new if name == _MANIFEST})
            self._mark(markers)
            self._delete([name for name in gone if not name.startswith(_MARKERS)])

    def _go_on(self) -> None:
        pause = _LOOK
        while not self._left.wait(pause):
            started = time.monotonic()
            try:
                self.sync()
                self._failed, pause = None, _LOOK + 4 * (time.monotonic() - started)
            except Exception as error:  # the next look tries again, and the end raises what remains
                self._failed, pause = error, _PAUSE

    def _new_markers(self) -> dict[str, tuple[bytes, tuple[int, int]]]:
        found = {}
        for path in sorted((self.staging.folder / "done").rglob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # forgotten meanwhile
                name, facts = self.staging.folder_name(path), path.stat()
                version = (facts.st_size, facts.st_mtime_ns)
                if self.staging.sent.get(name) != version:
                    found[name] = (path.read_bytes(), version)
        return found

    def _send(self, files: Mapping[str, tuple[int, int]]) -> None:
        with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="streamfisher-send") as pool:
            for _ in pool.map(self._send_one, files, files.values()):
                pass

    def _send_one(self, name: str, version: tuple[int, int]) -> None:
        """Send a file that is still as it was seen: a later one may be of a unit whose marker was forgotten since."""
        path, place = self.staging.folder / name, f"{self.root}/{name}"
        try:
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if (facts.st_size, facts.st_mtime_ns) != version:
                    return
                with answering(f"{self.staging.store.url}/{name}"):
                    if facts.st_size > _IN_PARTS:
                        self.filesystem.put_file(f"/proc/self/fd/{file.fileno()}", place)
                    else:
                        self.filesystem.pipe_file(place, file.read())
        except FileNotFoundError:  # deleted meanwhile
            return
        self.staging.note(name, list(version))

    def _mark(self, markers: dict[str, tuple[bytes, tuple[int, int]]]) -> None:
        """Send markers that are here as they were before their bytes were sent, where none stands there."""
        for name, (content, version) in markers.items():
            path, place = self.staging.folder / name, f"{self.root}/{name}"
            with contextlib.suppress(FileNotFoundError):
                if path.read_bytes() != content:
                    continue  # it is another one by now, and waits for its bytes
                self.check()
                with answering(f"{self.staging.store.url}/{name}"):
                    try:
                        self.filesystem.pipe_file(place, content, mode="create")
                    except FileExistsError:
                        if self.filesystem.cat_file(place) != content:  # else it was sent, and nobody noted it
                            raise RunError(
                                f"{self.staging.store.url}/{name} was written by another process. Let only one of "
                                "the two go on, and then look it over with `streamfisher verify`."
                            ) from None
                self.staging.note(name, list(version))

    def _delete(self, names: Sequence[str]) -> None:
        def delete(name: str) -> None:
            with answering(f"{self.staging.store.url}/{name}"), contextlib.suppress(FileNotFoundError):
                self.filesystem.rm_file(f"{self.root}/{name}")
            self.staging.note(name, "gone")

        with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="streamfisher-delete") as pool:
            for _ in pool.map(delete, names):
                pass

    def _free(self) -> None:
        """Free the oldest chunks of gradients that are at the store, down to half of the budget."""
        oldest = sorted((time, name) for name, (_, time) in self.staging.sent.items() if may_be_freed(name))
        for _, name in oldest:
            if self._here <= self.budget // 2:
                return
            if name not in self.staging.away:
                with contextlib.suppress(FileNotFoundError):
                    self._here -= self.staging.free(name)
