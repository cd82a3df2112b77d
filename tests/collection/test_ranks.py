"""Ranks share work by claims, end together, name who failed, and leave nothing that could write into the next run."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from forked_commands import forked
from rank_processes import bytes_of, children, command, finished, launch, markers, wait_for

from streamfisher.collection import Claims
from streamfisher.collection.progress import Rate
from streamfisher.data import make_units
from streamfisher.errors import RankError, RunError, StoppedError
from streamfisher.runtime import Ranks, StopRequest, finishing_first
from streamfisher.store import RankLock, RunLock


def with_ranks(count, work, timeout=20.0):
    """Run `work(ranks)` in a thread for each rank; return what it returned or raised."""
    store, results = dist.HashStore(), [None] * count

    def run(index):
        try:
            with Ranks(
                SimpleNamespace(process_index=index, num_processes=count), timeout=timeout, store=store
            ) as ranks:
                results[index] = work(ranks)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_a_fast_rank_takes_more_units_and_each_is_taken_once():
    units = make_units(63, 3)

    def work(ranks):
        taken = []
        for unit in Claims(ranks, "rows", units, units):
            time.sleep(0.05 if ranks.index == 1 else 0.002)
            taken.append(unit.index)
        return taken

    fast, slow = with_ranks(2, work)
    assert sorted(fast + slow) == list(range(21))
    assert len(fast) > 2 * len(slow) >= 2


def test_passes_are_claimed_apart_and_rank_0_says_what_is_left():
    units = make_units(10, 1)

    def work(ranks):
        seen = units if ranks.is_main else units[5:]  # another rank has listed the markers later
        return [[unit.index for unit in Claims(ranks, name, seen, units)] for name in ("mean", "rows")]

    results = with_ranks(3, work)
    for number in range(2):
        assert sorted(index for result in results for index in result[number]) == list(range(10))


def test_with_more_ranks_than_units_some_have_nothing_to_do():
    units = make_units(5, 3)
    taken = with_ranks(4, lambda ranks: [unit.index for unit in Claims(ranks, "rows", units, units)])
    assert sorted(taken, key=len)[:2] == [[], []]
    assert sorted(index for one in taken for index in one) == [0, 1]


def test_one_rank_claims_all_in_order():
    units = make_units(7, 2)
    (taken,) = with_ranks(1, lambda ranks: [unit.index for unit in Claims(ranks, "rows", units, units)])
    assert taken == [0, 1, 2, 3]


def test_ranks_that_were_given_other_work_are_named_with_what_differs():
    results = with_ranks(3, lambda ranks: ranks.agree({"setting seed": 7 if ranks.index == 2 else 1, "data": "x"}))
    for result in results:
        assert isinstance(result, RankError)
        assert "rank 2 has setting seed 7, rank 0 has 1" in str(result)
        assert "rank 1" not in str(result)


def test_a_rank_that_fails_ends_the_others_with_its_name_and_error():
    def work(ranks):
        if ranks.index == 1:
            raise ValueError("sample 17 is broken")
        ranks.wait("for nothing")

    waiting, failed = with_ranks(2, work)
    assert isinstance(failed, ValueError)
    assert isinstance(waiting, RankError) and "rank 1 failed: ValueError: sample 17 is broken" in str(waiting)


def test_a_rank_that_is_not_heard_of_is_named_after_the_timeout():
    def work(ranks):
        if ranks.index == 1:
            time.sleep(2)
        else:
            ranks.wait("for the gradients")

    waiting, _ = with_ranks(2, work, timeout=0.5)
    assert isinstance(waiting, RankError)
    assert "nothing was heard for" in str(waiting) and "of rank 1 (process" in str(waiting)


def test_a_dead_rank_is_named_at_once():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    def work(ranks):
        if ranks.index == 0:
            ranks._peers[1] = {**ranks._peers[1], "pid": ended.pid}
            ranks.wait("for the gradients")

    waiting, _ = with_ranks(2, work)
    assert isinstance(waiting, RankError) and f"rank 1 (process {ended.pid} on" in str(waiting)
    assert "died" in str(waiting)


def test_a_signal_on_one_rank_stops_all_between_two_units():
    def work(ranks):
        done = []
        try:
            for unit in Claims(ranks, "rows", make_units(100, 1), make_units(100, 1)):
                done.append(unit.index)
                time.sleep(0.01)
                if ranks.index == 1 and len(done) == 3:
                    ranks.stop.set(signal.SIGTERM)
        except StoppedError as error:
            return len(done), error.exit_code
        return None

    results = with_ranks(2, work)
    assert results[1] == (3, 143) and results[0][1] == 143


def test_signals_are_kept_until_the_unit_is_done_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with finishing_first() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    twice = StopRequest()
    with pytest.raises(KeyboardInterrupt):  # nothing is in flight before somebody looks at requests
        twice.set(signal.SIGINT)
    twice.is_heeded = True
    twice.set(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        twice.set(signal.SIGINT)


def test_a_rank_that_is_alive_keeps_another_run_out(tmp_path):
    with RunLock(tmp_path):
        pass
    with RankLock(tmp_path), pytest.raises(RunError, match=r"is being written by process \d+ on"), RunLock(tmp_path):
        pass
    with RunLock(tmp_path, [{"host": "a", "pid": 1}, {"host": "b", "pid": 2}]):
        assert [rank["pid"] for rank in json.loads((tmp_path / "lock").read_text())["ranks"]] == [1, 2]


def test_the_rate_forgets_old_times_and_slows_down_while_nothing_comes():
    now = 0.0
    rate = Rate(window=10.0, clock=lambda: now)
    assert rate.per_second() is None
    rate.observe(0)
    for now in range(1, 21):
        rate.observe(now)  # one per second
    assert rate.per_second() == pytest.approx((1.0,))
    for step in range(1, 13):
        now = 20 + step / 4
        rate.observe(20 + step)  # then four per second
    assert 1.5 < rate.per_second()[0] < 4
    for step in range(13, 80):
        now = 20 + step / 4
        rate.observe(20 + step)
    assert rate.per_second() == pytest.approx((4.0,))
    now += 10
    assert rate.per_second()[0] < 2.2


# Real processes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    finished(launch(1, command(out), SECONDS="0"))
    return bytes_of(out)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the death signal is Linux's")
def test_the_ranks_of_a_killed_launcher_die_and_the_run_goes_on_at_once(undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    launcher = launch(2, command(out))
    wait_for(lambda: markers(out) >= 2)
    ranks = children(launcher)
    assert len(ranks) == 2
    launcher.kill()
    again = launch(1, command(out), SECONDS="0")
    launcher.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), seconds=2)
    finished(again)
    assert bytes_of(out) == undisturbed


def test_sigterm_writes_what_is_in_flight_and_exits_with_143(undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    process = launch(1, command(out), SECONDS="0.3")
    wait_for(lambda: markers(out) >= 1)
    time.sleep(0.1)  # into the next unit
    before = markers(out)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped by SIGTERM. The same command goes on where it stopped." in errors
    assert "Traceback" not in errors
    assert before <= markers(out) <= before + 1 < 15
    finished(forked(1, command(out), SECONDS="0"))
    assert bytes_of(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(("count", "start"), [(2, launch), (3, forked)], ids=["2, by torchrun", "3, forked"])
def test_several_ranks_one_of_them_slow_give_the_bytes_of_one(count, start, undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    finished(start(count, command(out), SECONDS="0.02", SLOW_RANK="1"))
    assert bytes_of(out) == undisturbed


@pytest.mark.slow
def test_sigterm_to_the_launcher_stops_all_ranks_and_another_number_of_them_goes_on(undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    process = launch(2, command(out))
    wait_for(lambda: markers(out) >= 2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and markers(out) < 15
    assert "stopped by SIGTERM" in errors
    finished(forked(3, command(out), SECONDS="0"))
    assert bytes_of(out) == undisturbed


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_leaves_a_run_that_goes_on(undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    process = launch(3, command(out))
    wait_for(lambda: markers(out) >= 3)
    os.kill(children(process)[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0 and markers(out) < 15
    finished(forked(2, command(out), SECONDS="0"))
    assert bytes_of(out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("slow", "other_data_on_rank_1", "rank 1 has data "),
        ("other_weights_on_rank_1", "thirty_vectors", "rank 1 has model fingerprint "),
    ],
)
def test_ranks_with_other_data_or_weights_are_refused_before_anything_is_written(model, data, message, tmp_path):
    out = tmp_path / "run.zarr"
    process = forked(2, command(out, model, data))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the ranks were not given the same work" in errors and message in errors
    assert not out.exists()


@pytest.mark.slow
def test_an_error_on_one_rank_is_named_by_the_others_and_keeps_what_is_finished(tmp_path):
    out = tmp_path / "run.zarr"
    process = forked(2, command(out, "slow", "nan_in_the_last_vector"), SLOW_RANK="0", SECONDS="0.02")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "sample 29: the loss is nan" in errors
    assert re.search(r"rank [01] failed: NonFiniteError: sample 29[^\n]*\n  So rank [01] stops too", errors), errors
    info = finished(forked(1, ["-m", "streamfisher", "info", str(out), "--json"]))
    assert 0 < json.loads(info)["samples_done"] <= 28
