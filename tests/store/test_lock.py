"""One writer per run, also where the filesystem carries no locks between hosts: the living are told from the dead."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from rank_processes import wait_for

from streamfisher.errors import RankError, RunError
from streamfisher.runtime import Ranks
from streamfisher.store import RankLock, RunLock, lock

ELSEWHERE = {"host": "node7", "pid": 4711, "boot": "another kernel", "token": "t", "beat": 5, "released": False}


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_STALE", 0.5)
    monkeypatch.setattr(lock, "_PATIENCE", 0.5)


def forge(folder, **changes):
    record = {**ELSEWHERE, "time": int(time.time()), **changes}
    (folder / "lock").write_text(json.dumps(record))
    return record


def record_of(folder):
    return json.loads((folder / "lock").read_text())


@contextlib.contextmanager
def beating(folder):
    """A holder on another host, whose `flock` is not seen here."""
    stop = threading.Event()

    def beat():
        number = ELSEWHERE["beat"]
        while not stop.wait(0.05):
            number += 1
            (folder / "lock.new").write_text(json.dumps({**ELSEWHERE, "beat": number, "time": 0}))
            (folder / "lock.new").replace(folder / "lock")

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_a_holder_renews_its_record_and_marks_it_free_when_it_leaves(tmp_path):
    with RunLock(tmp_path):
        first = record_of(tmp_path)
        assert (first["host"], first["pid"]) == (socket.gethostname(), os.getpid())
        wait_for(lambda: record_of(tmp_path)["beat"] >= first["beat"] + 3, seconds=5)
        assert record_of(tmp_path)["token"] == first["token"] and not record_of(tmp_path)["released"]
    assert record_of(tmp_path)["released"]
    time.sleep(0.15)
    beat = record_of(tmp_path)["beat"]
    time.sleep(0.15)
    assert record_of(tmp_path)["beat"] == beat, "nobody renews it any more"


def test_a_reader_finds_a_whole_record_at_any_moment(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT", 0.001)
    (tmp_path / "lock").write_text("x" * 5000)  # a longer one was there
    with RunLock(tmp_path):
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert record_of(tmp_path)["beat"] > 0


def test_a_holder_on_another_host_that_is_alive_is_named_whatever_its_clock_says(tmp_path):
    forge(tmp_path)
    with (
        beating(tmp_path),
        pytest.warns(UserWarning, match="may be written by process 4711 on node7; watching"),
        pytest.raises(RunError, match="is being written by process 4711 on node7; wait for it or stop it"),
        RunLock(tmp_path),
    ):
        pass
    assert record_of(tmp_path)["token"] == "t", "nothing was taken from it"


def test_a_holder_on_another_host_that_is_dead_is_watched_and_then_replaced(tmp_path):
    forge(tmp_path, time=int(time.time()) + 300)  # its clock is ahead
    start = time.monotonic()
    with pytest.warns(UserWarning, match="lock of process 4711 on node7 is not renewed any more; taking it over"):
        entered = RunLock(tmp_path).__enter__()
    assert time.monotonic() - start >= 0.5
    assert record_of(tmp_path)["pid"] == os.getpid()
    entered.__exit__(None, None, None)


def test_a_lock_that_was_last_renewed_long_ago_is_not_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_STALE", 60.0)
    forge(tmp_path, time=int(time.time()) - 3600)
    with pytest.warns(UserWarning, match="taking it over"), RunLock(tmp_path):
        pass


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({**ELSEWHERE, "time": 0, "released": True}),
        json.dumps({"host": "node7", "pid": 4711}),  # of an earlier version
        json.dumps({**ELSEWHERE, "time": "now"}),
        json.dumps({"beat": 3}),
        "[1]",
        "{",
        "",
    ],
)
def test_a_free_lock_and_one_that_says_nothing_are_taken_at_once(content, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_STALE", 60.0)
    (tmp_path / "lock").write_text(content)
    with no_warning(), RunLock(tmp_path):
        assert record_of(tmp_path)["pid"] == os.getpid()


def test_who_was_killed_on_this_machine_is_replaced_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_STALE", 60.0)
    program = (
        "import sys, pathlib; from streamfisher.store import RunLock\nRunLock(pathlib.Path(sys.argv[1])).__enter__()"
    )
    program += "\nprint('held', flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"is being written by process {holder.pid} on"), RunLock(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert not record_of(tmp_path)["released"]
    with no_warning(), RunLock(tmp_path):
        pass


def no_locks(file, operation):
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_file_locks_the_living_on_this_machine_are_told_by_their_process_number(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunLock(tmp_path), pytest.raises(RunError, match=f"written by process {os.getpid()} on"), RunLock(tmp_path):
        pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    forge(tmp_path, host=socket.gethostname(), pid=ended.pid, boot=lock._boot())
    with no_warning(), RunLock(tmp_path), RankLock(tmp_path):
        pass


def test_a_lock_that_was_taken_over_elsewhere_is_noticed_and_not_written_any_more(tmp_path):
    told = []
    with (
        pytest.raises(RunError, match="was taken over by process 4711 on node7"),
        RunLock(tmp_path, on_lost=told.append),
    ):
        forge(tmp_path)
        wait_for(lambda: told, seconds=5)
        assert "saw no sign of life of this run" in told[0]
    assert record_of(tmp_path)["token"] == "t"


def test_the_ranks_of_a_lost_lock_stop_with_that_message(tmp_path):
    state = SimpleNamespace(process_index=0, num_processes=1)
    with (
        pytest.raises(RankError, match="was taken over by process 4711 on node7"),
        Ranks(state, timeout=5, store=dist.HashStore()) as ranks,
        RunLock(tmp_path, ranks.processes, on_lost=ranks.fail),
    ):
        forge(tmp_path)
        for _ in range(200):
            ranks.check()
            time.sleep(0.02)
