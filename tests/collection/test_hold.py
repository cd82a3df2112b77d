"""Gradients that nobody keeps stay in memory until they are reduced: the same bits as through the disk."""

import json

import numpy as np
import pytest
import torch
from command_line import cli
from factored_models import MODELS, llama, sequences
from tiny_models import TinyRegression, vectors

import streamfisher as sf
from streamfisher.data.batches import Unit
from streamfisher.errors import CapacityError, ConfigError
from streamfisher.gradients.factors import FactorPair
from streamfisher.gradients.producer import BatchGradients
from streamfisher.runtime import durable
from streamfisher.sinks import memory
from streamfisher.sinks.memory import MemorySink
from streamfisher.store import GramStore, KeptGradients, RunStore


def collected(path, model, samples, **options):
    settings = {"chunk_size": 4, "batch_tokens": 25, "dtype_compute": "float64", "keep_gradients": "none"} | options
    return sf.collect(model.double(), samples, path, config=sf.SpectralConfig(**settings))


def same(one, other):
    for name in one.store.gram_members:
        assert np.array_equal(one.store.grams.read(name)[0], other.store.grams.read(name)[0]), name
    for what in ("loss", "n_targets", "valid"):
        values = [run.store.samples.per_sample(what) for run in (one, other)]
        assert np.array_equal(*values, equal_nan=what == "loss"), what
    norms = [run.store.samples.per_sample("squared_norm") for run in (one, other)]
    close = 1e-12 if one.store.row_dtype == torch.float64 else 1e-6  # of rows, or from the diagonal of their Gram
    np.testing.assert_allclose(*norms, rtol=close, atol=close * np.nanmax(norms[0]))


@pytest.mark.parametrize("representation", ["dense", "factors", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_held_in_memory_gives_the_bits_of_the_disk(tmp_path, name, representation):
    make, data = MODELS[name]
    disk, host = (
        collected(tmp_path / hold, make(), data(), hold=hold, representation=representation)
        for hold in ("disk", "host")
    )
    same(disk, host)
    assert host.info()["complete"] and host.info()["gradients_deleted"] == list(host.parameters)
    assert not any((host.path / "factors").rglob("c/*")) and not any((host.path / "gradients").rglob("c/*"))
    assert sf.verify(host) == []
    for center in (False, True):
        one, other = (run.spectrum("layer", center).to_dict()["global"] for run in (disk, host))
        assert one == other


def test_the_disk_is_flushed_some_times_and_not_twice_for_each_gram(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(durable, "sync_path", lambda path: flushed.append(path.name))
    held = collected(tmp_path / "run", llama(), sequences(), hold="host")
    grams = {name.split(".json")[0] for name in flushed if name.startswith("gram-")}
    assert len(grams) == len(held.store.gram_members) and flushed.count("done") < 10


@pytest.mark.parametrize("options", [{"gram_per": "layer"}, {"project": 8}, {"stream": "layers"}], ids=str)
def test_so_do_coarser_grams_projections_and_streams(tmp_path, options):
    disk, host = (collected(tmp_path / hold, llama(), sequences(), hold=hold, **options) for hold in ("disk", "host"))
    same(disk, host)
    assert sf.verify(host) == []


def test_float32_is_held_in_float32(tmp_path):
    disk, host = (
        sf.collect(
            llama(),
            sequences(),
            tmp_path / hold,
            config=sf.SpectralConfig(keep_gradients="none", representation="factors", hold=hold, chunk_size=4),
        )
        for hold in ("disk", "host")
    )
    for name in disk.store.gram_members:
        assert np.array_equal(disk.gram(name), host.gram(name)), name


def test_small_memory_takes_waves_of_what_fits(tmp_path):
    whole = collected(tmp_path / "whole", llama(), sequences(), hold="host")
    tight = collected(tmp_path / "tight", llama(), sequences(), hold="host", memory_budget="1MB", n_workers=1)
    assert len(whole.store.waves) == 1 and len(tight.store.waves) > 1
    same(whole, tight)


@pytest.mark.parametrize("at", [0, 3, 11, 21, 22, 24])
def test_stopped_anywhere_it_goes_on_to_the_same_bits(tmp_path, monkeypatch, at):
    """While Grams are written, before the gradients are said to be gone, and while units are marked."""

    class StopError(Exception):
        pass

    whole = collected(tmp_path / "whole", llama(), sequences(), hold="host")
    count = iter(range(100))

    def stopping(function):
        def call(*arguments, **options):
            if next(count) == at:
                raise StopError
            return function(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for owner, method in ((GramStore, "write"), (KeptGradients, "delete"), (RunStore, "write_unit")):
            patch.setattr(owner, method, stopping(getattr(owner, method)))
        with pytest.raises(StopError):
            collected(tmp_path / "run", llama(), sequences(), hold="host")
    again = collected(tmp_path / "run", llama(), sequences(), hold="host")
    same(whole, again)
    assert again.info()["complete"] and sf.verify(again) == []


def test_a_sample_that_is_not_finite_is_named_or_skipped(tmp_path):
    data = vectors(9, nan_at=4)
    options = {"chunk_size": 4, "keep_gradients": "none", "hold": "host", "loss": "regression"}
    with pytest.raises(sf.StreamfisherError, match="sample 4"):
        sf.collect(TinyRegression(), data, tmp_path / "raised", config=sf.SpectralConfig(**options))
    run, disk = (
        sf.collect(
            TinyRegression(),
            data,
            tmp_path / hold,
            config=sf.SpectralConfig(**options | {"hold": hold, "on_nonfinite": "skip"}),
        )
        for hold in ("host", "disk")
    )
    assert list(run.store.samples.skipped()) == [4]
    same(disk, run)
    for center in (False, True):  # parameters of fewer elements than samples are solved from their moments
        one, other = (each.spectrum("parameter", center).blocks for each in (disk, run))
        for block in one:
            np.testing.assert_allclose(other[block].eigenvalues, one[block].eigenvalues, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_numbers_whose_sum_is_not_are_finite(dtype):
    side = torch.full((3, 4, 5), 3e38, dtype=dtype)
    side[1, 2, 3] = float("nan")
    pair = FactorPair(side, torch.ones(3, 4, 2, dtype=dtype))
    sum_only, exact = (
        memory._finite({"w": [pair]}, check)["w"] for check in (memory._sum_is_finite, memory._is_finite)
    )
    assert not sum_only.any() and exact.tolist() == [True, False, True]
    sink = MemorySink(Producer(), [Unit(0, 0, 3)], ["w"], parameters=["w"])
    norms = sink.norms(BatchGradients(torch.zeros(3), torch.ones(3), {"w": [pair]}, {}), 3)["w"]
    assert np.isfinite(norms).tolist() == [True, False, True]


class Producer:
    """What a sink asks of a producer before it has rows."""

    device = torch.device("cpu")


def test_auto_holds_in_memory_what_nobody_keeps_and_stores_what_somebody_does(tmp_path):
    dropped = collected(tmp_path / "dropped", llama(), sequences())
    kept = collected(tmp_path / "kept", llama(), sequences(), keep_gradients="all")
    some = collected(tmp_path / "some", llama(), sequences(), keep_gradients=["*embed*"])
    assert [run.store.run.hold for run in (dropped, kept, some)] == ["host", "disk", "disk"]
    kept.build_grams()
    same(kept, dropped)


def test_what_needs_the_disk_is_refused_in_memory(tmp_path):
    for options, reason in (
        ({"store_centered": True, "representation": "dense"}, "as a store would hold them"),
        ({"dtype_store": "float32"}, "as a store would hold them"),
    ):
        with pytest.raises(ConfigError, match=f"hold='host' holds gradients in memory, and .*{reason}"):
            collected(tmp_path / "run", llama(), sequences(), hold="host", **options)


def test_memory_that_holds_no_parameter_says_what_would(tmp_path):
    with pytest.raises(CapacityError, match=r"embed_tokens.weight alone need .* and --memory-budget leaves"):
        collected(tmp_path / "run", llama(), sequences(400), hold="host", memory_budget="300kB", batch_tokens=12)


def test_the_command_line_says_where_gradients_are(tmp_path, capsys):
    model, data = "streamfisher.demo:load_demo_model", "streamfisher.demo:demo_dataset"
    line = ("run", model, data, "--samples", "6", "--max-length", "24", "--keep-gradients", "none")
    assert cli(*line, "--out", tmp_path / "run.zarr", "--blocks", "none") == 0
    assert "Gradients stay in memory until they are reduced" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.zarr/manifest.json").read_text())["layout"]["hold"] == "host"
