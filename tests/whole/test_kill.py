"""Kill -9 at any moment costs the work in flight and nothing else: real processes, real SIGKILL, the same bytes."""

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from forked_commands import forked
from rank_processes import finished, launch

COMMAND = [
    *("-m", "streamfisher", "run", "streamfisher.demo:load_demo_model", "streamfisher.demo:demo_dataset"),
    *("--samples", "40", "--chunk-size", "4", "--max-length", "48", "--blocks", "layer,none", "--center", "both"),
    *("--deterministic", "--workers", "1"),
]


def start(out, *options):
    return forked(1, [*COMMAND, "--out", str(out), *options])


def finish(out, *options):
    return finished(start(out, *options))


def markers(out):
    return len(list((out / "done").glob("*.json"))) if (out / "done").is_dir() else 0


def kill_after(out, count, delay, *options):
    """Start the run, wait until `count` units or Grams are marked and `delay` seconds more, and SIGKILL it."""
    process = start(out, *options)
    deadline = time.monotonic() + 120
    while markers(out) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode


def arrays(out):
    group = zarr.open_group(out, mode="r")
    paths = sorted(
        str(path.parent.relative_to(out))
        for path in out.rglob("zarr.json")
        if '"node_type": "array"' in path.read_text()
    )
    assert any(path.startswith(("gradients/", "packed/")) for path in paths)
    assert any(path.startswith("gram/") for path in paths)
    return {path: group[path][...] for path in paths}


def assert_same_bytes(one: Path, other: Path):
    assert (one / "spectrum.json").read_bytes() == (other / "spectrum.json").read_bytes()
    expected, found = arrays(one), arrays(other)
    assert expected.keys() == found.keys()
    for path, values in expected.items():
        assert values.tobytes() == found[path].tobytes(), f"{path} differs"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    finished(launch(1, [*COMMAND, "--out", str(out)]))  # not a fork: with imports and a hash seed of its own
    return out


def test_a_run_killed_while_collecting_goes_on_and_ends_with_the_same_bytes(undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    assert kill_after(out, 3, 0.01) == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in (out / "done").glob("rows-*.json")}
    assert 3 <= len(done) < 10, "killed in the middle"
    finish(out)
    assert all(path.stat().st_mtime_ns == before for path, before in done.items()), "nothing finished was done again"
    assert_same_bytes(undisturbed, out)


@pytest.mark.slow
def test_five_kills_at_random_moments_change_no_byte(undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    moments = random.Random(7)
    total = markers(undisturbed)
    kills = 0
    for round_number in range(5):
        # Any stage: before the manifest, between units, in the Grams.
        lower = total * round_number // 5
        count = moments.randint(lower, max(lower, total * (round_number + 1) // 5 - 1))
        kills += kill_after(out, count, moments.uniform(0, 0.05)) == -signal.SIGKILL
    assert kills == 5
    finish(out)
    assert_same_bytes(undisturbed, out)


@pytest.mark.slow
def test_a_killed_centered_run_goes_on_in_either_pass(tmp_path):
    whole, out = tmp_path / "whole.zarr", tmp_path / "run.zarr"
    finish(whole, "--store-centered")
    for count in (2, 14, 25):  # in the mean pass, in the pass that writes rows, in the Grams
        assert kill_after(out, count, 0.0, "--store-centered") == -signal.SIGKILL
    finish(out, "--store-centered")
    assert_same_bytes(whole, out)


@pytest.mark.slow
def test_two_ranks_give_the_bytes_of_one(undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    finished(launch(2, [*COMMAND, "--out", str(out), "--quiet"]))
    assert_same_bytes(undisturbed, out)


def test_a_run_that_is_not_finished_is_not_analysed(undisturbed, tmp_path):
    out = tmp_path / "run.zarr"
    kill_after(out, 2, 0.0)
    refused = forked(1, ["-m", "streamfisher", "spectrum", str(out)])
    _, errors = refused.communicate()
    assert refused.returncode == 2
    assert "is not finished" in errors and "goes on where it stopped" in errors
    facts = json.loads(finished(forked(1, ["-m", "streamfisher", "info", str(out), "--json"])))
    assert facts["complete"] is False
    assert 8 <= facts["samples_done"] < 40
    assert np.isnan(zarr.open_array(out / "samples" / "loss", mode="r")[facts["samples_done"] + 4 :]).all()
