"""Commands of streamfisher as processes of their own, forked from one that has imported everything.

Real processes with real signals; only the seconds of importing are paid once. A fork has the hash seed of its parent,
and there is no torchrun: what these matter to is tested with `rank_processes.launch`.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence

from rank_processes import environment, free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["imported_commands"])


class Forked:
    """A command that runs, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, count: int, arguments: Sequence[str], **extra: str):
        assert list(arguments[:2]) == ["-m", "streamfisher"], arguments
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(2)]
        self._process = _CONTEXT.Process(
            target=_command,
            args=(count, arguments[2:], environment(**extra), *(writer for _, writer in pipes)),
            daemon=True,  # ends with the tests
        )
        before = dict(os.environ)
        os.environ.update(environment())  # for the process that forks, which starts with the first command
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        self._readers = [reader for reader, _ in pipes]
        for _, writer in pipes:
            writer.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 300.0) -> tuple[str, str]:
        """Return what it and all its children printed, once they have ended."""
        deadline = time.monotonic() + timeout
        printed = dict.fromkeys(self._readers, b"")
        with selectors.DefaultSelector() as selector:
            for reader in self._readers:
                selector.register(reader, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(deadline - time.monotonic())
                if not ready:
                    raise subprocess.TimeoutExpired("a forked command", timeout)
                for key, _ in ready:
                    piece = os.read(key.fd, 1 << 16)
                    printed[key.fileobj] += piece
                    if not piece:
                        selector.unregister(key.fileobj)
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked command", timeout)
        for reader in self._readers:
            reader.close()
        out, errors = (text.decode() for text in printed.values())
        return out, errors


def forked(count: int, arguments: Sequence[str], **extra: str) -> Forked:
    """Start a command on `count` ranks, which are children of one launcher where there are several."""
    return Forked(count, arguments, **extra)


def _command(count, arguments, variables, out, errors) -> None:
    assert "imported_commands" in sys.modules, "nothing was imported before the fork"
    os.dup2(out.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    out.close()
    errors.close()
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    os.environ.clear()
    os.environ.update(variables)
    sys.exit(_main(arguments) if count == 1 else _launcher(count, arguments))


def _main(arguments) -> int:
    from streamfisher.cli.main import main

    return main(arguments)


def _launcher(count, arguments) -> int:
    """As torchrun does: it keeps the store, a rank that fails ends the others, and SIGTERM is for all."""
    from torch.distributed import TCPStore

    running = {}

    def stop(*_) -> None:
        for pid in running:
            os.kill(pid, signal.SIGTERM)

    port = str(free_port())
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until all ranks are there to be told
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_RUN_ID": "none"}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
            _rank(arguments)
        running[pid] = rank
    store = TCPStore("127.0.0.1", int(port), is_master=True, wait_for_workers=False)  # after the forks: it has threads
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    failed = False
    while running:
        pid, status = os.wait()
        del running[pid]
        if status and not failed:
            failed = True
            stop()
    del store
    return int(failed)


def _rank(arguments) -> None:
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        code = _main(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
