"""Gradients that are kept and held: written while they are reduced where they are; no product waits for the disk."""

import errno
import threading

import numpy as np
import pytest
from factored_models import MODELS, llama, sequences
from forked_commands import forked
from rank_processes import bytes_of, command, finished
from tiny_models import TinyRegression, vectors

import streamfisher as sf
from streamfisher.errors import CapacityError
from streamfisher.planning import run_layout
from streamfisher.store import GramStore, RunStore
from streamfisher.store.chunk_reading import ChunkReader
from streamfisher.store.chunks import ChunkWriter

SETTINGS = {"chunk_size": 4, "batch_tokens": 25, "dtype_compute": "float64", "keep_gradients": "all"}
PLACES = ["host", "device"]


@pytest.fixture(autouse=True)
def room(monkeypatch):
    """Let the CPU be taken for a device with a gigabyte of memory."""
    monkeypatch.setattr(run_layout, "device_room", lambda device, budget: 1 << 30)


def collected(path, model=None, samples=None, **options):
    model = llama() if model is None else model
    samples = sequences() if samples is None else samples
    return sf.collect(model.double(), samples, path, config=sf.SpectralConfig(**SETTINGS | options))


def rows(run):
    return {name: run.store.rows.columns(name, 0, columns) for name, columns in run.parameters.items()}


def same(one, other, *, tolerance=0.0):
    for name in one.store.gram_members:
        expected, got = (run.store.grams.read(name)[0] for run in (one, other))
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    one, other = rows(one), rows(other)
    assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("representation", ["dense", "factors"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "convolution"])
def test_rows_and_grams_are_those_of_a_run_through_the_disk(tmp_path, monkeypatch, name, place, representation):
    make, data = MODELS[name]
    disk = collected(tmp_path / "disk", make(), data(), hold="disk", representation=representation)
    disk.build_grams()

    read_into = ChunkReader.read_into

    def refused(reader, *rest):
        if {"gradients", "packed", "factors"} & set(reader.path.parts):
            raise AssertionError("what is held is read from the disk")
        return read_into(reader, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkReader, "read_into", refused)
        both = collected(tmp_path / "both", make(), data(), hold=place, representation=representation)
    assert (both.store.run.hold, both.store.run.copy) == ("disk", place)
    same(disk, both, tolerance=0.0 if place == "host" else 1e-12)
    assert sf.verify(both) == [] and both.info()["complete"]


@pytest.mark.parametrize("place", PLACES)
def test_the_gram_does_not_wait_for_the_disk(tmp_path, monkeypatch, place):
    """No chunk can be written before the first Gram is: the run ends all the same."""
    write, mark, reduced = ChunkWriter.write, GramStore.write, threading.Event()

    def waiting(self, *arguments):
        assert reduced.wait(60), "the Gram waits for the disk"
        return write(self, *arguments)

    def marked(self, *arguments, **options):
        reduced.set()
        return mark(self, *arguments, **options)

    monkeypatch.setattr(ChunkWriter, "write", waiting)
    monkeypatch.setattr(GramStore, "write", marked)
    monkeypatch.setattr("streamfisher.collection.waves.WAITING_SHARE", 1.0)  # as with much memory
    representation = "dense" if place == "host" else "factors"
    run = collected(tmp_path / "run", hold=place, representation=representation)
    assert run.info()["complete"] and sf.verify(run) == []


@pytest.mark.parametrize("place", PLACES)
def test_a_disk_that_fails_names_the_samples_and_the_run_goes_on_through_the_disk(tmp_path, monkeypatch, place):
    whole = collected(tmp_path / "whole", hold="disk", representation="dense")
    whole.build_grams()
    write = ChunkWriter.write

    def failing(self, array, index, values):
        if index[0] == 1:  # of the second unit
            raise OSError(errno.ENOSPC, "No space left on device", str(array))
        return write(self, array, index, values)

    with monkeypatch.context() as patch:
        patch.setattr(ChunkWriter, "write", failing)
        with pytest.raises(OSError, match=r"No space left on device while samples \d+ to \d+ were written"):
            collected(tmp_path / "run", hold=place, representation="dense")
    store = RunStore(tmp_path / "run")
    assert 0 < len(store.markers.done_units()) < len(store.units)
    run = collected(tmp_path / "run", hold=place, representation="dense")
    run.build_grams()
    same(whole, run, tolerance=1e-12)
    assert sf.verify(run) == []


def test_waves_of_which_some_parameters_are_kept(tmp_path):
    options = {"keep_gradients": ["*norm*"], "representation": "dense", "stream": "layers"}
    disk = collected(tmp_path / "disk", hold="disk", **options)
    both = collected(tmp_path / "both", hold="host", **options)
    assert len(both.store.waves) > 1
    assert both.info()["gradients_deleted"] == disk.info()["gradients_deleted"] != []
    for name in disk.store.gram_members:
        assert np.array_equal(*(run.store.grams.read(name)[0] for run in (disk, both)))
    norm = next(name for name in both.parameters if "norm" in name)
    assert np.array_equal(*(run.store.rows.columns(name, 0, 9) for run in (disk, both) for name in [norm]))
    assert sf.verify(both) == []


def test_such_a_run_grows(tmp_path):
    collected(tmp_path / "run", samples=sequences()[:5], hold="host", representation="dense")
    run = collected(tmp_path / "run", hold="host", representation="dense")
    whole = collected(tmp_path / "whole", hold="disk", representation="dense")
    run.build_grams()
    whole.build_grams()
    same(whole, run, tolerance=1e-12)


@pytest.mark.parametrize("place", PLACES)
def test_samples_that_are_skipped_are_zero_in_both(tmp_path, place):
    options = {"dtype_compute": "float32", "loss": "regression", "on_nonfinite": "skip", "representation": "dense"}
    disk, both = (
        sf.collect(
            TinyRegression(),
            vectors(9, nan_at=4),
            tmp_path / hold,
            config=sf.SpectralConfig(**SETTINGS | options | {"hold": hold}),
        )
        for hold in ("disk", place)
    )
    disk.build_grams()
    assert list(both.store.samples.skipped()) == [4]
    same(disk, both, tolerance=1e-6)


def test_memory_that_is_too_small_says_so_and_auto_goes_through_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(run_layout, "device_room", lambda device, budget: 1 << 10)
    with pytest.raises(CapacityError, match="on the device"):
        collected(tmp_path / "device", hold="device", representation="dense")
    run = collected(tmp_path / "auto", representation="dense")
    assert run.store.run.copy is None


def test_auto_holds_what_is_kept_on_a_device_and_not_in_host_memory(tmp_path, monkeypatch):
    assert collected(tmp_path / "device").store.run.copy == "device"
    monkeypatch.setattr(run_layout, "device_room", lambda device, budget: None)
    assert collected(tmp_path / "host").store.run.copy is None


def test_two_ranks_give_the_bytes_of_one(tmp_path):
    options = ("--keep-gradients", "all", "--hold", "host", "--chunk-size", "4", "--representation", "dense")
    found = {}
    for count in (1, 2):
        path = tmp_path / f"{count}.zarr"
        finished(forked(count, command(path, "llama_in_float64", "twenty_one_sequences", *options)))
        found[count] = bytes_of(path)
        assert sf.open_run(path).store.run.copy == "host" and sf.verify(sf.open_run(path)) == []
    assert found[1] == found[2]
