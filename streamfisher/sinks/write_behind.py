"""Writing behind the back of whoever computes: threads write pieces of units, and a unit ends after its last piece.

What waits is bounded: whoever brings more is held up until there is room. A failure keeps its unit from ending and
reaches whoever brings the next piece; units that were complete before end all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType


class WriteBehind:
    """Threads that write. A context manager: left without an error, all is written; with one, all complete units are.

    Args:
        threads: that write.
        room: bytes that may wait beside those that their owners count themselves; a piece alone always fits.
    """

    def __init__(self, threads: int, room: int = 0) -> None:
        self.room = room
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="write")
        self._changed = threading.Condition()
        self._waiting = 0  # bytes
        self._pieces = 0  # that are not written
        self._open: set[UnitInFlight] = set()
        self._failure: tuple[str, BaseException] | None = None

    @property
    def is_behind(self) -> bool:
        """Return whether pieces that were brought are not written yet."""
        return self._pieces > 0

    def begin(self, what: str) -> UnitInFlight:
        """Return a unit to add pieces to.

        Args:
            what: it is of, for messages: 'samples 0 to 31'.

        Raises:
            Exception: what went wrong with an earlier one.
        """
        self.check()
        unit = UnitInFlight(self, what)
        with self._changed:
            self._open.add(unit)
        return unit

    def make_room(self, size: int) -> None:
        """Return when so many bytes more may wait.

        Raises:
            Exception: what went wrong with a unit.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or self._waiting == 0 or self._waiting + size <= self.room,
            )
        self.check()

    def settle(self) -> None:
        """Return when all units that were ended are written.

        Raises:
            Exception: what went wrong with one of them.
        """
        with self._changed:
            self._changed.wait_for(lambda: not any(unit.ended for unit in self._open))
        self.check()

    def check(self) -> None:
        """Raise what went wrong with a unit, once and with the name of the unit."""
        with self._changed:
            failure, self._failure = self._failure, None
        if failure is None:
            return
        what, error = failure
        if isinstance(error, OSError) and error.errno is not None:
            raise type(error)(error.errno, f"{error.strerror} while {what} were written", error.filename) from error
        error.add_note(f"while {what} were written")
        raise error

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            unended = [unit for unit in self._open if not unit.ended]
        for unit in unended:
            unit.give_up()
        self._threads.shutdown()
        if kind is None:
            self.check()

    def _submit(self, work: Callable[[], None], size: int) -> None:
        with self._changed:
            self._waiting += size
            self._pieces += 1
        self._threads.submit(work)

    def _written(self, size: int) -> None:
        with self._changed:
            self._waiting -= size
            self._pieces -= 1
            self._changed.notify_all()

    def _finished(self, unit: UnitInFlight, error: BaseException | None) -> None:
        with self._changed:
            self._open.discard(unit)
            if error is not None and self._failure is None:
                self._failure = (unit.what, error)
            self._changed.notify_all()


class UnitInFlight:
    """A unit some of whose pieces are being written.

    Args:
        writer: whose threads do it.
        what: the unit is of, for messages.
    """

    def __init__(self, writer: WriteBehind, what: str) -> None:
        self.writer, self.what = writer, what
        self.ended = False
        self._lock = threading.Lock()
        self._left = 1  # pieces that are not written, and the end
        self._error: BaseException | None = None
        self._given_up = False
        self._then: Callable[[], None] | None = None
        self._finally: Callable[[], None] | None = None

    def add(self, job: Callable[[], None], size: int = 0) -> None:
        """Have a piece written; `size` bytes of room are taken until it is.

        Raises:
            Exception: what went wrong with this unit or another.
        """
        self.writer.check()
        with self._lock:
            self._left += 1
        self.writer._submit(lambda: self._do(job, size), size)

    def end(self, then: Callable[[], None], finally_: Callable[[], None] = lambda: None) -> None:
        """Have something done once all pieces are written, and something in any case when none is at work any more."""
        self._then, self._finally, self.ended = then, finally_, True
        self._one_less()

    def give_up(self) -> None:
        """Write no more pieces of a unit that will not be ended."""
        self._given_up = True
        self._one_less()

    def _do(self, job: Callable[[], None], size: int) -> None:
        try:
            if self._error is None and not self._given_up:
                job()
        except BaseException as error:  # it is raised where the next piece comes from
            self._error = error
        del job  # and with it what it holds
        self.writer._written(size)
        self._one_less()

    def _one_less(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        try:
            if self._error is None and self._then is not None:
                self._then()
        except BaseException as error:
            self._error = error
        if self._finally is not None:
            self._finally()
        self.writer._finished(self, self._error)
