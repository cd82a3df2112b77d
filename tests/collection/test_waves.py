"""Waves: within a disk budget the parameters take turns, and the result is that of one pass."""

import sys

import numpy as np
import pytest
import torch
from factored_models import sequences
from forked_commands import forked
from llama_runs import GRAMS, budget, collected
from rank_processes import bytes_of, command, finished, launch, wait_for

import streamfisher as sf
from streamfisher import verify
from streamfisher.collection import wave_reduction as reduction
from streamfisher.errors import CapacityError, ConfigError, RunError
from streamfisher.gradients import Factor, GradientShape
from streamfisher.planning.waves import WaveLimits, WaveSizes, cut_waves
from streamfisher.store import KeptGradients, RunStore


@pytest.fixture(scope="module", params=["dense", "factors"])
def whole(request, tmp_path_factory):
    run = collected(tmp_path_factory.mktemp("whole") / "run.zarr", representation=request.param)
    run.spectrum("layer")
    return run


def held_as(run):
    return run.manifest.config["representation"]


def test_the_result_of_waves_is_that_of_one_pass(whole, tmp_path):
    run = collected(tmp_path / "run.zarr", representation=held_as(whole), disk_budget=budget(whole))
    assert len(run.store.waves) > 2
    assert [name for names in run.store.waves for name in names] == list(run.parameters)
    assert run.info()["complete"] and run.info()["grams_done"] == len(run.parameters)
    assert run.info()["gradients_deleted"] == list(run.parameters)
    for name in run.parameters:
        assert np.array_equal(run.gram(name), whole.gram(name)), name
    for what in ("loss", "n_targets", "valid", "squared_norm"):
        assert np.array_equal(run.store.samples.per_sample(what), whole.store.samples.per_sample(what)), what
    assert run.spectrum("module").to_dict()["global"] == whole.spectrum("module").to_dict()["global"]
    assert not verify(run)


def test_what_is_on_disk_stays_within_the_budget(whole, tmp_path, monkeypatch):
    limit = budget(whole)
    seen = []
    delete = KeptGradients.delete

    def watch(kept, wave):
        arrays = [
            p for folder in ("gradients", "packed", "factors", "gram") for p in (kept.run.path / folder).rglob("c/**/*")
        ]
        seen.append(sum(path.stat().st_size for path in arrays if path.is_file()))
        delete(kept, wave)

    monkeypatch.setattr(KeptGradients, "delete", watch)
    # Raw, because a budget is kept whatever the codec makes of the numbers.
    run = collected(tmp_path / "run.zarr", representation=held_as(whole), disk_budget=limit, codec="raw")
    assert len(seen) == len(run.store.waves) and max(seen) <= limit + 4 * 4000  # a checksum ends every chunk
    assert not (run.path / "factors").exists() or not any((run.path / "factors").rglob("c/*"))


def test_gradients_that_match_a_pattern_are_kept(whole, tmp_path):
    kept = "model.layers.0.*"
    run = collected(
        tmp_path / "run.zarr", representation=held_as(whole), keep_gradients=[kept], disk_budget=budget(whole, 0.7)
    )
    stays = [name for name in run.parameters if name.startswith("model.layers.0.")]
    assert run.info()["gradients_deleted"] == [name for name in run.parameters if name not in stays]
    for name in stays:
        expected = whole.store.rows.columns(name, 0, whole.parameters[name])
        assert np.array_equal(run.store.rows.columns(name, 0, run.parameters[name]), expected)
    assert len(run.eigenvectors("layer_0", 2, block_structure="layer")) == 2
    with pytest.raises(RunError, match=r"gradients of lm_head.weight were not kept .*--keep-gradients all"):
        run.store.rows.columns("lm_head.weight", 0, 5)
    with pytest.raises(RunError, match="were not kept"):
        run.eigenvectors("layer_1", 2, block_structure="layer")
    assert not verify(run)


def test_none_kept_in_one_wave(whole, tmp_path):
    run = collected(tmp_path / "run.zarr", representation=held_as(whole), keep_gradients="none")
    assert len(run.store.waves) == 1 and run.info()["gradients_deleted"] == list(run.parameters)
    assert run.spectrum("layer").to_dict()["global"] == whole.spectrum("layer").to_dict()["global"]


@pytest.mark.parametrize("at", [0, 1, 4, 6, 8])
def test_stopped_anywhere_the_waves_go_on_to_the_same_bytes(whole, tmp_path, monkeypatch, at):
    class StopError(Exception):
        pass

    options = {"representation": held_as(whole), "disk_budget": budget(whole)}
    count = iter(range(100))
    write, delete = RunStore.write_unit, KeptGradients.delete

    def stopping(function):
        def call(*arguments):
            if next(count) == at:
                raise StopError
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "write_unit", stopping(write))
        patch.setattr(KeptGradients, "delete", stopping(delete))
        with pytest.raises(StopError):
            collected(tmp_path / "run.zarr", **options)
    run = collected(tmp_path / "run.zarr", **options)
    assert all(np.array_equal(run.gram(name), whole.gram(name)) for name in run.parameters)
    assert run.info()["gradients_deleted"] == list(run.parameters)


def test_a_damaged_gram_costs_its_wave_and_no_other(whole, tmp_path, monkeypatch):
    options = {"representation": held_as(whole), "disk_budget": budget(whole)}
    run = collected(tmp_path / "run.zarr", **options)
    key = run.store.waves[1][0]
    chunk = next(path for path in (run.path / "gram" / key).rglob("c/*/*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-7])
    assert [(problem.what, problem.parameter) for problem in verify(run, repair=True)] == [("gram", key)]
    passes = []
    reopen = reduction.reopen_wave
    waves = sys.modules["streamfisher.collection.waves"]
    monkeypatch.setattr(waves, "reopen_wave", lambda s, wave, config: (passes.append(wave), reopen(s, wave, config)))
    again = collected(tmp_path / "run.zarr", **options)
    assert passes == [1]
    assert np.array_equal(again.gram(key), whole.gram(key)) and not verify(again)


def test_a_run_whose_gradients_were_deleted_grows_by_taking_its_waves_again(whole, tmp_path):
    options = {"representation": held_as(whole), "disk_budget": budget(whole)}
    before = collected(tmp_path / "run.zarr", samples=sequences()[:8], **options)
    after = collected(tmp_path / "run.zarr", **options)
    assert (before.n_samples, after.n_samples) == (8, 11) and verify(after) == []
    for name in whole.parameters:
        np.testing.assert_allclose(after.gram(name), whole.gram(name), rtol=1e-6, atol=1e-12)


def test_an_unfinished_run_of_waves_says_how_far_it_is(whole, tmp_path):
    run = collected(tmp_path / "run.zarr", representation=held_as(whole), disk_budget=budget(whole))
    run.store.forget_unit(run.store.units[0], 1)
    run.store.grams.forget(run.store.waves[1][0])
    with pytest.raises(RunError, match=r"7 of 11 samples have gradients in wave 2 of"):
        run.spectrum("layer")
    with pytest.raises(RunError, match=r"is collected in .* waves and not finished"):
        run.spectrum("layer", partial=True)


def test_a_sample_skipped_in_one_wave_counts_in_none(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()
    data = {"input": torch.randn(9, 3, dtype=torch.float64), "labels": torch.randn(9, 2, dtype=torch.float64)}
    data["input"][4] = torch.tensor([1e200, 1e200, 1e200])  # overflows in the lower layer's gradient only
    options = {
        "hold": "disk",
        "on_nonfinite": "skip",
        "chunk_size": 4,
        "dtype_compute": "float64",
        "loss": "regression",
    }
    with torch.no_grad():
        model[0].weight *= 1e-200
    one, waves = (
        sf.collect(model, data, tmp_path / f"{limit}.zarr", config=sf.SpectralConfig(disk_budget=limit, **options))
        for limit in (10**9, 8 * 81 * 4 + 8 * 9 * 16)
    )
    assert len(waves.store.waves) > 1
    assert list(one.store.samples.skipped()) == list(waves.store.samples.skipped()) == [4]
    np.testing.assert_allclose(
        waves.spectrum("none").global_.eigenvalues, one.spectrum("none").global_.eigenvalues, rtol=1e-12
    )


def test_budgets_that_are_too_small_say_what_would_do(tmp_path):
    with pytest.raises(CapacityError, match=r"21 Grams of 11 samples take .*--disk-budget is .*--gram-per layer"):
        collected(tmp_path / "run.zarr", disk_budget=GRAMS // 2)
    with pytest.raises(CapacityError, match=r"embed_tokens.weight alone need .* on disk, and --disk-budget leaves"):
        collected(tmp_path / "run.zarr", representation="dense", disk_budget=GRAMS + 1000)
    with pytest.raises(CapacityError, match=r"one sample of 11 tokens needs about .*--max-length"):
        collected(tmp_path / "run.zarr", memory_budget="5kB")
    with pytest.raises(ConfigError, match="disk_budget='much' is not a size"):
        sf.SpectralConfig(disk_budget="much")
    with pytest.raises(ConfigError, match=r"store_centered=True takes one pass .* the run takes"):
        collected(tmp_path / "run.zarr", store_centered=True, disk_budget=GRAMS + 500_000)
    assert not (tmp_path / "run.zarr" / "manifest.json").exists()


def test_a_memory_budget_makes_batches_smaller(tmp_path):
    free = collected(tmp_path / "free.zarr", batch_tokens=4096)
    tight = collected(tmp_path / "tight.zarr", batch_tokens=4096, memory_budget="1MB")
    assert free.store.batch_tokens == 4096 and 11 <= tight.store.batch_tokens < 100
    expected, found = free.spectrum("none").global_.eigenvalues, tight.spectrum("none").global_.eigenvalues
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12 * expected[0])
    again = collected(tmp_path / "tight.zarr", batch_tokens=4096)  # without the budget, the run keeps its batches
    assert again.store.batch_tokens == tight.store.batch_tokens


def test_ranks_of_a_host_share_its_memory_budget(tmp_path, monkeypatch):
    alone = collected(tmp_path / "alone.zarr", batch_tokens=4096, memory_budget="1MB")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    shared = collected(tmp_path / "shared.zarr", batch_tokens=4096, memory_budget="2MB")
    assert abs(shared.store.batch_tokens - alone.store.batch_tokens) <= 1
    with pytest.raises(CapacityError, match=r"--memory-budget 5 kB leaves"):
        collected(tmp_path / "run.zarr", memory_budget="10kB")


def shape(name, m, n, positions=4.0, key=None):
    sides = (Factor(f"{name}~L0", m, 4), Factor(key or f"{name}~R0", n, 4))
    return GradientShape(name, (m, n), torch.float32, (sides,), (positions,))


def sizes(shapes, **chosen):
    held = {s.name: chosen.get(s.name, "factors") for s in shapes}
    return WaveSizes(shapes, held, n_samples=10, unit_rows=5, batch_samples=2, row_itemsize=4, stored_itemsize=2)


def test_sizes_count_a_shared_input_once():
    found = sizes([shape("q", 8, 6, key="x"), shape("k", 8, 6, key="x")]).of(["q", "k"])
    assert found.factors == 10 * 4 * 4 * (8 + 8 + 6) and found.rows == 0
    assert found.memory == 2 * 2 * 4 * 4 * (8 + 8 + 6)
    dense = sizes([shape("q", 8, 6)], q="dense").of(["q"])
    assert (dense.rows, dense.memory) == (10 * 48 * 2, 5 * 48 * 4)


def test_waves_are_as_few_as_fit_in_the_order_of_the_model():
    shapes = [shape(name, 8, 8) for name in "abcde"]
    one = sizes(shapes).of(["a"]).disk
    waves = cut_waves(sizes(shapes), WaveLimits(disk=2 * one, memory=1 << 30))
    assert [wave.parameters for wave in waves] == [("a", "b"), ("c", "d"), ("e",)]
    waves = cut_waves(sizes(shapes), WaveLimits(disk=3 * one, memory=1 << 30), keep=["b", "d"])
    assert [wave.parameters for wave in waves] == [("a", "b"), ("c", "d"), ("e",)]
    memory = sizes(shapes).of(["a"]).memory
    assert len(cut_waves(sizes(shapes), WaveLimits(disk=1 << 40, memory=memory))) == 5


#: Of the Grams of 30 samples and 4 parameters, and of half of their rows.
TIGHT = ["--hold", "disk", "--disk-budget", str(8 * 30**2 * 4 + 2000)]


@pytest.mark.slow
def test_waves_of_several_ranks_that_were_killed_have_the_bytes_of_one(tmp_path):
    whole, one, out = tmp_path / "whole.zarr", tmp_path / "one.zarr", tmp_path / "run.zarr"
    finished(forked(1, command(whole), SECONDS="0"))
    finished(forked(1, command(one, "slow", "thirty_vectors", *TIGHT), SECONDS="0"))
    arguments = command(out, "slow", "thirty_vectors", *TIGHT)
    process = launch(2, arguments, SECONDS="0.02")
    wait_for(lambda: any((out / "done").glob("rows.1-*.json")))
    process.kill()
    process.communicate(timeout=120)
    finished(forked(3, arguments, SECONDS="0"))
    assert len(sf.open_run(out).store.waves) == 3
    assert bytes_of(out) == bytes_of(one)
    same = {path: content for path, content in bytes_of(whole).items() if path.startswith(("gram/", "samples/"))}
    assert same == {path: content for path, content in bytes_of(out).items() if path.startswith(("gram/", "samples/"))}
