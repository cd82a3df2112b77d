"""The same bytes whatever is killed, whenever, and however many ranks go on: gradients, Grams and spectrum.json.

A seeded campaign: in each round a launch of 1 to 3 ranks is hit at a random moment (one rank, the launcher, or all of
them, by SIGKILL; or the launcher by SIGTERM), and the next round goes on with another number of ranks.
"""

import os
import random
import signal
import time

import pytest
from forked_commands import forked
from rank_processes import bytes_of, children, command, finished, launch, markers

UNITS = 15


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    finished(launch(1, command(out), SECONDS="0"))
    return bytes_of(out)


def all_markers(out):
    return len(list((out / "done").glob("*.json"))) if (out / "done").is_dir() else 0


def hit(process, count, how, dice):
    """Kill what `how` names; return whether anything was still running."""
    if process.poll() is not None:
        return False
    ranks = children(process) if count > 1 else []
    if how == "rank" and ranks:
        os.kill(dice.choice(ranks), signal.SIGKILL)
    elif how == "all":
        process.kill()
        for pid in ranks:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # the death signal was faster
    elif how == "term":
        process.send_signal(signal.SIGTERM)
    else:
        process.kill()
    return True


def campaign(out, seed, rounds, options=()):
    """Return how many launches were hit while they ran."""
    dice = random.Random(seed)
    hits = 0
    for _ in range(rounds):
        count = dice.choice([1, 2, 3])
        how = dice.choice(["rank", "launcher", "all", "term"])
        process = forked(count, command(out, "slow", "thirty_vectors", *options))
        # From before the manifest over the units to the Grams; a few milliseconds more fall inside a write.
        goal = all_markers(out) + dice.randint(0, 5)
        deadline = time.monotonic() + 60
        while all_markers(out) < goal and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.1))
        hits += hit(process, count, how, dice)
        process.communicate(timeout=120)
    return hits


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_twenty_hits_at_random_moments_change_no_byte(seed, undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    hits = campaign(out, seed, rounds=5)
    assert hits >= 4
    count = random.Random(seed).choice([1, 2, 3])
    finished(forked(count, command(out), SECONDS="0"))
    assert markers(out) == UNITS
    assert bytes_of(out) == undisturbed


@pytest.mark.slow
def test_a_run_killed_while_it_grows_ends_as_one_from_scratch(undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    finished(forked(1, command(out, "slow", "thirty_vectors", "--samples", "13"), SECONDS="0"))
    assert campaign(out, seed=9, rounds=3) >= 2
    finished(launch(2, command(out), SECONDS="0"))
    assert markers(out) == UNITS
    assert bytes_of(out) == undisturbed
