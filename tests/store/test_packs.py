"""Small parameters share arrays: fewer files, the same rows, and what is asked of one is answered of it alone."""

import json

import numpy as np
import pytest
import torch
from small_parameters import Layers, layered

import streamfisher as sf
from streamfisher.errors import CorruptRunError, RunError
from streamfisher.runtime import write_json
from streamfisher.store.chunk_reading import ChunkReader
from streamfisher.store.pack_cache import PackCache
from streamfisher.store.packs import LEAST_SMALL, make_packs, places_of

N = 12


def collected(path, n=N, **options):
    options = {"chunk_size": 4, "representation": "dense", "keep_gradients": ("*",), **options}
    return sf.collect(Layers().double(), layered(n), path, config=sf.SpectralConfig(dtype_compute="float64", **options))


@pytest.fixture
def unpacked(monkeypatch):
    """Return a function that collects the same run without packs."""

    def collect(path, **options):
        with monkeypatch.context() as patch:
            patch.setattr("streamfisher.collection.resume.make_packs", lambda *_, **__: {})
            return collected(path, **options)

    return collect


def rows(run):
    return {name: run.store.rows.columns(name, 0, columns) for name, columns in run.parameters.items()}


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def files(path):
    return [file for file in path.rglob("c/*/*") if file.is_file()]


@pytest.mark.parametrize(
    "options", [{}, {"bitround": 9}, {"dtype_store": "bfloat16"}, {"store_centered": True}], ids=str
)
def test_a_packed_run_holds_the_same_rows_grams_and_spectra_in_fewer_files(options, tmp_path, unpacked):
    packed, plain = collected(tmp_path / "packed.zarr", **options), unpacked(tmp_path / "plain.zarr", **options)
    assert packed.store.run.packs and not plain.store.run.packs
    assert (
        len(files(packed.path / "packed")) + len(files(packed.path / "gradients"))
        < len(files(plain.path / "gradients")) / 5
    )
    assert same(rows(packed), rows(plain))
    packed.build_grams()
    plain.build_grams()
    assert all(np.array_equal(packed.gram(name), plain.gram(name)) for name in packed.parameters)
    assert sf.verify(packed) == []


def test_parts_of_rows_and_samples_are_those_of_the_parameter(tmp_path, unpacked):
    packed, plain = collected(tmp_path / "packed.zarr"), unpacked(tmp_path / "plain.zarr")
    for name, columns in packed.parameters.items():
        for start, stop, some in ((0, 1, None), (columns - 1, columns + 5, slice(3, 9)), (1, 3, slice(11, 12))):
            one, other = (run.store.rows.columns(name, start, stop, some) for run in (packed, plain))
            assert np.array_equal(one, other)


def test_a_pack_is_read_once_for_its_parameters(tmp_path, monkeypatch):
    run, read = collected(tmp_path / "run.zarr"), []
    plain = ChunkReader.read_into
    monkeypatch.setattr(
        ChunkReader, "read_into", lambda reader, *rest: (read.append(reader.path), plain(reader, *rest))[1]
    )
    rows(run)
    packed = {name for names in run.store.run.packs.values() for name in names}
    assert len(read) == len(run.parameters) - len(packed) + len(run.store.run.packs)


def test_waves_and_what_is_kept_have_packs_of_their_own(tmp_path):
    run = collected(tmp_path / "run.zarr", keep_gradients=("*.bias",))
    kept = {all(name.endswith(".bias") for name in names) for names in run.store.run.packs.values()}
    assert kept == {True, False}
    assert run.store.rows.columns("head.bias", 0, 3).shape == (N, 3)
    with pytest.raises(RunError, match="were not kept"):
        run.store.rows.columns("layers.0.0.weight", 0, 3)
    assert sf.verify(run) == []


def test_a_packed_run_grows(tmp_path):
    collected(tmp_path / "run.zarr", 10)
    grown, whole = collected(tmp_path / "run.zarr", 21), collected(tmp_path / "whole.zarr", 21)
    assert same(rows(grown), rows(whole))


@pytest.mark.parametrize("damage", ["flip", "exchange", "delete"])
def test_damage_of_a_pack_is_found_when_a_parameter_of_it_is_read_and_is_mended(damage, tmp_path):
    run = collected(tmp_path / "run.zarr")
    before = rows(run)
    key, names = next(iter(run.store.run.packs.items()))
    chunk, other = (run.path / "packed" / key / "c" / unit / "0" for unit in "01")
    content = bytearray(chunk.read_bytes())
    if damage == "flip":
        content[9] ^= 4
        chunk.write_bytes(content)
    elif damage == "exchange":
        chunk.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        chunk.unlink()
    with pytest.raises(CorruptRunError, match=r"samples|cannot be read"):
        sf.open_run(run.path).store.rows.columns(names[0], 0, 2)
    assert sf.verify(run, repair=True)
    assert same(rows(collected(tmp_path / "run.zarr")), before)


@pytest.mark.parametrize(
    "packs",
    [{"0-0": ["nobody"]}, {"0-0": ["head.bias"] * 2}, {"1-0": ["head.bias"]}, {"../x": ["head.bias"]}, {"0-0": 3}],
    ids=str,
)
def test_packs_that_no_run_has_are_refused(packs, tmp_path):
    run = collected(tmp_path / "run.zarr")
    manifest = json.loads((run.path / "manifest.json").read_text())
    del manifest["seal"]
    manifest["layout"]["packs"] = packs
    write_json(run.path / "manifest.json", manifest)
    with pytest.raises(CorruptRunError, match="packs"):
        sf.open_run(run.path)


def test_a_few_small_parameters_and_large_ones_have_arrays_of_their_own():
    columns = {f"p{i}": 10 for i in range(LEAST_SMALL - 1)} | {"large": 1 << 20}
    how = {"n_samples": 64, "chunk_rows": 32, "itemsize": 4}
    assert make_packs(columns, [list(columns)], dict.fromkeys(columns, True), **how) == {}
    columns["one more"] = 10
    packs = make_packs(columns, [list(columns)], dict.fromkeys(columns, True), **how)
    assert list(packs) == ["0-0"] and "large" not in packs["0-0"] and len(packs["0-0"]) == LEAST_SMALL


def test_two_thousand_small_parameters_are_a_hundred_columns_apart_in_few_arrays():
    columns = {f"p{i}": 100 for i in range(2000)}
    how = {"n_samples": 512, "chunk_rows": 32, "itemsize": 4}
    packs = make_packs(columns, [list(columns)], dict.fromkeys(columns, True), **how)
    assert len(packs) == 7 and [name for names in packs.values() for name in names] == list(columns)
    places = places_of(columns, packs)
    assert [place.first for place in places.values()][:3] == [0, 100, 200]
    assert all(sum(columns[name] for name in names) * 32 * 4 <= 4 << 20 for names in packs.values())


def test_at_most_two_packs_are_kept(tmp_path):
    run = collected(tmp_path / "run.zarr").store.run
    cache, key = PackCache(run), next(iter(run.packs))
    first = cache.rows(key, 0, 4)
    cache.rows(key, 4, 8)
    assert cache.rows(key, 0, 4) is first
    cache.rows(key, 8, 12)
    assert cache.rows(key, 4, 8) is not None and cache.rows(key, 0, 4) is not first
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 0


class Many(torch.nn.Module):
    """Two thousand parameters of five numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.parts = torch.nn.ParameterList(torch.randn(5) for _ in range(2000))

    def forward(self, x):
        return (x[:, :1] * torch.stack(list(self.parts)).tanh().mean(0)).cumsum(1)[:, :3]


def test_a_run_of_two_thousand_small_parameters_is_a_few_files(tmp_path):
    config = sf.SpectralConfig(chunk_size=4, representation="dense", keep_gradients=("*",), gram_per="all")
    run = sf.collect(Many().double(), layered(8), tmp_path / "run.zarr", config=config)
    assert len(run.parameters) == 2000
    assert sum(1 for path in run.path.rglob("*") if path.is_file()) < 60
    model, samples = Many().double(), layered(8)
    for number in (0, 999, 1999):
        expected = []
        for x, y in zip(*samples.tensors, strict=True):
            loss = torch.nn.functional.cross_entropy(model(x[None].double()), y[None])
            expected.append(torch.autograd.grad(loss, model.parts[number])[0])
        found = run.store.rows.columns(f"parts.{number}", 0, 5)
        np.testing.assert_allclose(found, torch.stack(expected), rtol=1e-6, atol=1e-9)
    assert sf.verify(run) == []
