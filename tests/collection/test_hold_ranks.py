"""Ranks that hold the gradients of their own samples give each other what a Gram needs: the bytes of one rank."""

import random
import signal
import time

import pytest
import torch
from forked_commands import forked
from rank_processes import bytes_of, command, finished, wait_for

import streamfisher as sf
from streamfisher.collection.prepare import least_room, within_devices
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import make_units
from streamfisher.gradients.shapes import GradientShape
from streamfisher.planning import held_where, run_layout
from streamfisher.runtime import read_log

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


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("representation", ["factors", "dense"])
def test_ranks_share_the_columns_of_one_large_gram(tmp_path, where, representation):
    options = ("--hold", where, "--representation", representation, "--gram-per", "layer")
    model = "llama_in_small_parts" + ("_on_a_device" if where == "device" else "")
    alone = held(tmp_path / "1.zarr", 1, *options, model=model)
    for count in (2, 3):
        path = tmp_path / f"{count}.zarr"
        assert held(path, count, *options, model=model) == alone
        (shared,) = (line for line in read_log(path)[0] if line["event"] == "columns shared")
        assert shared["ranks"] == count and shared["shared"] >= 1, shared


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


WAYS = {
    "waves": ("slow_llama", ("--memory-budget", "6MB", "--representation", "dense")),
    "layers": ("slow_llama", ("--stream", "layers", "--representation", "factors")),
    "device": ("slow_llama_on_a_device", ("--hold", "device")),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_random_moments_on_1_to_3_ranks_the_bytes_are_the_same(tmp_path, way):
    model, options = WAYS[way]
    alone = held(tmp_path / "undisturbed.zarr", 1, *options, model=model)
    dice, out, hits = random.Random(way), tmp_path / "run.zarr", 0
    for _ in range(7):
        count = dice.choice([1, 2, 3])
        arguments = command(out, model, "twenty_one_sequences", *HELD, *options)
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
    assert held(out, 2, *options, model=model) == alone


@pytest.mark.parametrize(
    ("rooms", "room", "said"),
    [
        ([("a", 100), ("b", 100)], 100, None),
        ([("a", 100), ("a", 100)], 50, "2 ranks share a: each rank takes at most 50 B there."),
        ([("a", 100), ("b", 60)], 60, "The devices of the ranks differ: each rank takes at most 60 B, as b has."),
        ([("a", 100), ("a", 90), ("b", 40)], 40, "2 ranks share a: each rank takes at most 40 B there."),
    ],
)
def test_ranks_take_what_the_least_of_their_devices_has_for_each_of_them(rooms, room, said):
    assert least_room(rooms) == (room, said)


class TwoRanks:
    """The first of two, as one process has them."""

    count, is_main = 2, True

    def gather(self, name, value):
        return [value, value]


def test_ranks_that_share_a_device_share_what_is_free_there_and_say_so(monkeypatch, capsys):
    monkeypatch.setattr(run_layout, "device_room", lambda device, budget: budget or 1000)
    for budget, each in ((None, 500), (300, 150)):
        config = SpectralConfig(device_memory_budget=budget)
        shared = within_devices(config, torch.device("cpu"), TwoRanks(), progress=True)
        assert int(shared.device_memory_budget) == each
        assert f"each rank takes at most {each} B there" in capsys.readouterr().out
    monkeypatch.setattr(run_layout, "device_room", lambda device, budget: None)  # no devices
    assert within_devices(config, torch.device("cpu"), TwoRanks(), progress=True) == config


@pytest.mark.parametrize("count", [1, 4])
def test_a_gram_too_large_to_come_together_on_the_device_is_held_on_the_host_alone(monkeypatch, count):
    shapes = [GradientShape(f"layer.{index}.weight", (64, 64), torch.float32) for index in range(8)]
    shapes.append(GradientShape("head.weight", (128, 128), torch.float32))
    config = SpectralConfig(keep_gradients="none", chunk_size=4, representation="dense")
    monkeypatch.setattr(held_where, "world_size", lambda: count)

    def places(room):
        limits = {"disk": 1 << 40, "memory": 1 << 40, "row_dtype": torch.float32}
        device_memory = int(room / held_where.DEVICE_SHARE) + 3 * 8 * 64**2 + 10
        plan = run_layout.layout_within(shapes, [8] * 64, config, device_memory=device_memory, **limits)
        return {name: place for wave, place in zip(plan.waves, plan.places, strict=True) for name in wave.parameters}

    layer, head = (4 * 64 * size**2 for size in (64, 128))  # bytes of the rows of all samples
    beside = 3 if count > 1 else 0  # what comes of one Gram, goes, and is multiplied
    assert set(places(head // count + beside * head).values()) == {"device"}
    assert places(head // count + beside * head - 100) == {
        shape.name: "host" if shape.name == "head.weight" else "device" for shape in shapes
    }
    assert set(places(layer // count + beside * layer - 100).values()) == {"host"}


def test_a_rank_plans_for_its_own_samples_and_for_what_comes_of_one_gram(monkeypatch):
    shapes = [GradientShape(f"layer.{index}.weight", (64, 64), torch.float32) for index in range(8)]
    config = SpectralConfig(
        hold="host", keep_gradients="none", chunk_size=4, memory_budget="100MB", representation="dense"
    )

    def waves(memory, count):
        monkeypatch.setattr(held_where, "world_size", lambda: count)
        limits = {"disk": 1 << 40, "memory": memory, "row_dtype": torch.float32}
        return len(run_layout.layout_within(shapes, [8] * 64, config, **limits).waves)

    of_all = 8 * 64 * 64 * 64 * 4  # bytes of the rows of all samples
    enough = int(of_all / held_where.HOST_SHARE) + 1000
    assert waves(enough, 1) == 1
    one = of_all // 8
    assert waves(int((of_all / 2 + 3 * one) / held_where.HOST_SHARE) + 1000, 2) == 1
    assert waves(int((of_all / 2 + 3 * one) / held_where.HOST_SHARE) - 1000, 2) > 1
    assert sum(map(len, make_units(64, 4)[::2])) == 32
