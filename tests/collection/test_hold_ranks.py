"""Ranks that hold the gradients of their own samples give each other what a Gram needs: the bytes of one rank."""

import random
import signal
import time

import pytest
import torch
from forked_commands import forked
from rank_processes import bytes_of, command, finished, wait_for

import streamfisher as sf
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import make_units
from streamfisher.gradients.shapes import GradientShape
from streamfisher.planning import run_layout

HELD = ("--keep-gradients", "none", "--hold", "host", "--chunk-size", "4")


def held(out, count, *options, model="llama_in_float64", data="twenty_one_sequences"):
    finished(forked(count, command(out, model, data, *HELD, *options)))
    return bytes_of(out)


@pytest.mark.parametrize("representation", ["factors", "dense", "auto"])
def test_any_number_of_ranks_gives_the_bytes_of_one(tmp_path, representation):
    options = ("--representation", representation, "--center", "both")
    alone = held(tmp_path / "1.zarr", 1, *options)
    for count in (2, 3):
        path = tmp_path / f"{count}.zarr"
        assert held(path, count, *options) == alone, count
        run = sf.open_run(path)
        assert run.store.run.hold == "host" and run.info()["complete"] and sf.verify(run) == []
        assert not any((path / "factors").rglob("c/*")) and not any((path / "gradients").rglob("c/*"))


@pytest.mark.parametrize(
    "options",
    [
        ("--gram-per", "layer"),
        ("--stream", "layers"),
        ("--memory-budget", "6MB", "--representation", "dense"),
        ("--project", "8"),
    ],
    ids=" ".join,
)
def test_so_do_coarser_grams_streams_waves_and_projections(tmp_path, options):
    assert held(tmp_path / "2.zarr", 2, *options) == held(tmp_path / "1.zarr", 1, *options)


@pytest.mark.parametrize("representation", ["factors", "dense"])
def test_so_do_gradients_that_stay_on_devices(tmp_path, representation):
    options = ("--hold", "device", "--representation", representation)
    alone, both = (held(tmp_path / f"{count}.zarr", count, *options, model="llama_on_a_device") for count in (1, 2))
    assert sf.open_run(tmp_path / "2.zarr").store.run.hold == "device"
    assert alone == both


def test_with_more_ranks_than_units_some_hold_nothing(tmp_path):
    options = ("--samples", "7")
    assert held(tmp_path / "3.zarr", 3, *options) == held(tmp_path / "1.zarr", 1, *options)


def test_skipped_samples_are_known_to_the_rank_that_forms_a_gram(tmp_path):
    options = ("--on-nonfinite", "skip")
    which = {"model": "slow", "data": "nan_in_the_last_vector"}
    alone, both = (held(tmp_path / f"{count}.zarr", count, *options, **which) for count in (1, 2))
    assert alone == both
    assert sf.open_run(tmp_path / "2.zarr").store.samples.skipped() == {29: "the loss is nan"}


def test_a_rank_that_fails_is_named_and_the_others_end(tmp_path):
    process = forked(2, command(tmp_path / "run.zarr", "slow", "nan_in_the_last_vector", *HELD))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and "sample 29: the loss is nan" in errors
    assert "Traceback" not in errors, errors[-3000:]


def logged(out):
    return (out / "log.jsonl").stat().st_size if (out / "log.jsonl").exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_moments_on_1_to_3_ranks_the_bytes_are_the_same(tmp_path, seed):
    alone = held(tmp_path / "undisturbed.zarr", 1, "--memory-budget", "6MB", "--representation", "dense")
    dice, out, hits = random.Random(seed), tmp_path / "run.zarr", 0
    for _ in range(6):
        count = dice.choice([1, 2, 3])
        arguments = command(out, "slow_llama", "twenty_one_sequences", *HELD)
        arguments += ["--memory-budget", "6MB", "--representation", "dense"]
        before = logged(out)
        process = forked(count, arguments, SECONDS="0.02")
        # Once its log says that it began: before, ranks wait for one another as torch lets them.
        wait_for(lambda process=process, before=before: logged(out) > before or process.poll() is not None)
        time.sleep(dice.uniform(0.0, 2.5))
        hits += process.poll() is None
        if dice.random() < 0.5:
            process.kill()
        else:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert hits >= 3
    assert held(out, 2, "--memory-budget", "6MB", "--representation", "dense", model="slow_llama") == alone


def test_a_rank_plans_for_its_own_samples_and_for_what_comes_of_one_gram(monkeypatch):
    shapes = [GradientShape(f"layer.{index}.weight", (64, 64), torch.float32) for index in range(8)]
    config = SpectralConfig(
        hold="host", keep_gradients="none", chunk_size=4, memory_budget="100MB", representation="dense"
    )

    def waves(memory, count):
        monkeypatch.setattr(run_layout, "world_size", lambda: count)
        limits = {"disk": 1 << 40, "memory": memory, "row_dtype": torch.float32}
        return len(run_layout.layout_within(shapes, [8] * 64, config, **limits).waves)

    of_all = 8 * 64 * 64 * 64 * 4  # bytes of the rows of all samples
    enough = int(of_all / run_layout.HOST_SHARE) + 1000
    assert waves(enough, 1) == 1
    one = of_all // 8
    assert waves(int((of_all / 2 + 3 * one) / run_layout.HOST_SHARE) + 1000, 2) == 1
    assert waves(int((of_all / 2 + 3 * one) / run_layout.HOST_SHARE) - 1000, 2) > 1
    assert sum(map(len, make_units(64, 4)[::2])) == 32
