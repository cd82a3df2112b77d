"""The processes of one run, its ranks: what they share, how they wait for each other, and how they end together.

Ranks talk through the key-value store of the process group that Accelerate started, never through collectives of
gradients: they share a few counters and facts, so a run on 100 ranks costs no more traffic than on 2. A rank that fails
says so in the store, and the others end with a message that names it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState

from streamfisher.errors import RankError, StoppedError, first_line
from streamfisher.runtime.signals import StopRequest

_POLL = 0.02  # seconds between two looks at the store while waiting
_LOOK_FOR_DEAD = 1.0  # seconds between two looks at the processes of this host

_sessions = 0


def start_ranks(*, cpu: bool, timeout: float) -> PartialState:
    """Join the process group that a launcher prepared, or be the only rank.

    Args:
        cpu: use the CPU although there is a GPU.
        timeout: seconds after which a collective operation of torch gives up.
    """
    cpu = cpu or not torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        return PartialState(cpu=cpu, timeout=timedelta(seconds=timeout))
    with _without_leftovers():
        return PartialState(cpu=cpu)


@contextmanager
def _without_leftovers() -> Iterator[None]:
    """Hide a LOCAL_RANK that some earlier launcher left in the environment: by itself it makes nobody a rank."""
    rest = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    launched = dist.is_initialized() or any(name in os.environ for name in rest)
    left = None if launched else os.environ.pop("LOCAL_RANK", None)
    try:
        yield
    finally:
        if left is not None:
            os.environ["LOCAL_RANK"] = left


class Ranks:
    """This process among all that work on a run; a context manager, to be entered by all of them.

    Args:
        state: the process group.
        timeout: seconds without a sign of progress from any rank after which waiting ends.
        stop: a signal's request to stop, which one rank passes on to all.
        store: what the ranks share; `None` means that of the process group.

    Raises:
        RankError: another rank failed, died, or was not heard of; the message names it.
        StoppedError: a rank was asked to stop.
    """

    def __init__(
        self,
        state: PartialState,
        *,
        timeout: float,
        stop: StopRequest | None = None,
        store: dist.Store | None = None,
    ):
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.timeout = timeout
        self.stop = stop or StopRequest()
        self.on_idle: Callable[[], None] = lambda: None
        self._store = store or _shared_store(self.count)
        self._steps = 0
        self._peers: dict[int, dict[str, Any]] = {}

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0."""
        return self.index == 0

    def __enter__(self) -> Ranks:
        with self._connected():
            self._peers = dict(enumerate(self.gather("who", {"host": socket.gethostname(), "pid": os.getpid()})))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, RankError | StoppedError) or self.count == 1:
            return
        if isinstance(error, KeyboardInterrupt):
            self._tell("stop", str(int(signal.SIGINT)))
        else:
            self._tell("failed", f"rank {self.index} failed: {type(error).__name__}: {error}")

    @property
    def processes(self) -> list[dict[str, Any]]:
        """Return host and process number of each rank."""
        return [self._peers[rank] for rank in sorted(self._peers)]

    def add(self, key: str, amount: int = 0) -> int:
        """Add to a counter that all ranks share and return its new value."""
        with self._connected():
            return self._store.add(key, amount)

    def alive(self) -> None:
        """Say that this rank got on: the time that others wait starts anew."""
        self.add("progress", 1)

    def fail(self, message: str) -> None:
        """Let every rank, this one too, stop after its unit with this message."""
        self._tell("failed", message)

    def check(self) -> None:
        """Stop here if a rank failed or was asked to stop.

        Raises:
            RankError: another rank failed.
            StoppedError: SIGTERM or SIGUSR1 reached a rank.
            KeyboardInterrupt: SIGINT reached a rank.
        """
        self.stop.is_heeded = True
        if self.stop.signal is not None:
            self._tell("stop", str(int(self.stop.signal)))
        with self._connected():
            failed = self._store.get("failed").decode() if self._store.check(["failed"]) else None
            stop = int(self._store.get("stop")) if self._store.check(["stop"]) else None
        if failed is not None:
            raise RankError(f"{failed}\nSo rank {self.index} stops too. What is finished is kept.")
        if stop is not None:
            raise KeyboardInterrupt if stop == signal.SIGINT else StoppedError(stop)

    def wait(self, what: str) -> None:
        """Wait until every rank is here.

        Raises:
            RankError: one failed, died, or nothing was heard for `timeout` seconds.
        """
        self._steps += 1
        key = f"wait/{self._steps}"
        with self._connected():
            self._store.set(f"{key}/{self.index}", "")
            arrived = self._store.add(key, 1)
        progress, heard, looked = -1, time.monotonic(), time.monotonic()
        while arrived < self.count:
            self.check()
            self.on_idle()
            time.sleep(_POLL)
            now = time.monotonic()
            if self.add("progress") != progress:
                progress, heard = self.add("progress"), now
            if now - looked > _LOOK_FOR_DEAD:
                looked = now
                self._look_for_dead(key, what)
            if now - heard > self.timeout:
                missing = ", ".join(self._name(rank) for rank in self._missing(key))
                raise RankError(
                    f"nothing was heard for {self.timeout:.0f} s of {missing}, while rank {self.index} waited {what}. "
                    "What is finished is kept. If a batch takes longer than that, raise --rank-timeout."
                )
            arrived = self.add(key)

    def gather(self, name: str, value: Any) -> list[Any]:
        """Return the JSON values that the ranks gave, in their order."""
        self._steps += 1
        key = f"gather/{self._steps}"
        with self._connected():
            self._store.set(f"{key}/{self.index}", json.dumps(value))
        self.wait(f"for {name} of all ranks")
        with self._connected():
            return [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.count)]

    def share(self, name: str, value: Any = None) -> Any:
        """Return the JSON value that rank 0 gave."""
        self._steps += 1
        key = f"share/{self._steps}"
        with self._connected():
            if self.is_main:
                self._store.set(key, json.dumps(value))
        self.wait(f"for {name} of rank 0")
        with self._connected():
            return json.loads(self._store.get(key))

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Refuse to start where ranks were given different work.

        Args:
            facts: what is compared, as plain JSON values.

        Raises:
            RankError: the message names the rank, the fact, and both values.
        """
        if self.count == 1:
            return
        everyone = self.gather("the settings", facts)
        found = [
            f"rank {rank} has {key} {_short(others.get(key))}, rank 0 has {_short(everyone[0].get(key))}"
            for rank, others in enumerate(everyone)
            for key in sorted(everyone[0].keys() | others.keys())
            if others.get(key) != everyone[0].get(key)
        ]
        if found:
            more = f"\n  - and {len(found) - 8} more" if len(found) > 8 else ""
            raise RankError(
                "the ranks were not given the same work:\n  - "
                + "\n  - ".join(found[:8])
                + more
                + "\nNothing was written. Start all of them with the same command, model and data."
            )

    def _look_for_dead(self, key: str, what: str) -> None:
        here = socket.gethostname()
        for rank in self._missing(key):
            peer = self._peers.get(rank)
            if peer is not None and peer["host"] == here and not _runs(peer["pid"]):
                self.check()  # it may have said why
                raise RankError(
                    f"{self._name(rank)} died while rank {self.index} waited {what}. What is finished is kept; the "
                    "same command goes on from there."
                )

    def _missing(self, key: str) -> list[int]:
        with self._connected():
            return [rank for rank in range(self.count) if not self._store.check([f"{key}/{rank}"])]

    def _name(self, rank: int) -> str:
        peer = self._peers.get(rank)
        return f"rank {rank}" if peer is None else f"rank {rank} (process {peer['pid']} on {peer['host']})"

    def _tell(self, key: str, message: str) -> None:
        try:
            self._store.compare_set(key, "", message)  # the first one stays
        except (RuntimeError, OSError):
            return  # the store is gone: the others will notice that

    @contextmanager
    def _connected(self) -> Iterator[None]:
        try:
            yield
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, RankError):
                raise
            raise RankError(
                f"rank {self.index} lost the launcher or rank 0, which keeps what the ranks share ({_first(error)}). "
                "What is finished is kept; the same command goes on from there."
            ) from error


def _shared_store(count: int) -> dist.Store:
    """Return a store of these ranks alone; all of them open theirs in the same order."""
    global _sessions
    _sessions += 1
    shared = dist.HashStore() if count == 1 else dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"streamfisher/{_sessions}", shared)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first(error: BaseException) -> str:
    return first_line(error)[:200]
