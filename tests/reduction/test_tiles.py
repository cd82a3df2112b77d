"""Grams built tile by tile are the whole ones, survive kills, grow, and are checked like them."""

import shutil

import numpy as np
import pytest
import tiny_models
import tiny_runs

import streamfisher as sf
from streamfisher import verify
from streamfisher.errors import CapacityError, CorruptRunError
from streamfisher.reduction import build_grams, build_tiled_grams, draw_columns
from streamfisher.reduction import stored_grams as gram_stage
from streamfisher.reduction.tiles import needs_tiles, tile_bytes, tile_workers, tiles_of, whole_bytes
from streamfisher.sinks import MemoryRows
from streamfisher.solving import TILE
from streamfisher.store import PANEL, SampleStore, node_name
from streamfisher.store.arrays import CHUNK

N = 30
SIZE = 8


class Collecting:
    """Puts tiles together in memory."""

    def __init__(self, n):
        self.gram = np.full((n, n), np.nan)

    def todo(self, key, tiles):
        return list(tiles)

    def write(self, key, finished):
        rows, columns = finished.tile.rows, finished.tile.columns
        self.gram[rows, columns], self.gram[columns, rows] = finished.values, finished.values.T

    def finish(self, key, tiles):
        assert np.isfinite(self.gram).all()


def rows_of(n=N, widths=(5, PANEL + 7, 17 * PANEL), dtype=np.float32):
    generator = np.random.default_rng(0)
    return MemoryRows({f"p{i}": generator.standard_normal((n, width)).astype(dtype) for i, width in enumerate(widths)})


def tiled(rows, names, budget=1 << 30, subsets=None, **options):
    sink = Collecting(rows.n_samples)
    config = sf.SpectralConfig(**options)
    build_tiled_grams(rows, config, sink, {"key": names}, budget=budget, subsets=subsets, size=SIZE)
    return sink.gram


@pytest.mark.parametrize("name", ["p0", "p1", "p2"])
def test_tiles_make_the_whole_gram(name):
    rows = rows_of()
    K = tiled(rows, [name], dtype_gram="float64")
    exact = rows.rows[name].astype(np.float64)
    np.testing.assert_allclose(K, exact @ exact.T, rtol=0, atol=1e-12 * np.abs(K).max())
    assert np.array_equal(K, K.T)


def test_float32_products_keep_their_precision():
    rows = rows_of()
    exact = rows.rows["p2"].astype(np.float64)
    K = tiled(rows, ["p2"])
    assert 0 < np.abs(K - exact @ exact.T).max() < 1e-7 * np.abs(K).max()
    assert np.array_equal(K, K.T)


def test_neither_workers_nor_budget_change_a_bit():
    rows = rows_of()
    reference = tiled(rows, ["p2"], use_deterministic=True, n_workers=1)
    for options in ({"n_workers": 2}, {"n_workers": 2, "budget": 1}):
        assert np.array_equal(tiled(rows, ["p2"], use_deterministic=True, **options), reference)


def test_several_parameters_share_a_gram():
    rows = rows_of()
    total = sum(rows.rows[name].astype(np.float64) @ rows.rows[name].astype(np.float64).T for name in ("p0", "p1"))
    np.testing.assert_allclose(tiled(rows, ["p0", "p1"], dtype_gram="float64"), total, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_gradients_near_the_ends_of_the_range_neither_vanish_nor_overflow(scale):
    rows = MemoryRows({"p": (scale * np.random.default_rng(0).standard_normal((N, 17 * PANEL))).astype(np.float32)})
    wide = rows.rows["p"].astype(np.float64)
    np.testing.assert_allclose(tiled(rows, ["p"]), wide @ wide.T, rtol=0, atol=1e-6 * scale**2 * 17 * PANEL)


def test_drawn_columns_are_those_of_the_whole_gram():
    rows = rows_of()
    subsets = draw_columns(rows.parameters, {"all": list(rows.parameters)}, 5000, 1)
    config = sf.SpectralConfig(dtype_gram="float64")
    (whole,) = build_grams(rows, config, lambda gram: gram.gram, keys={"p2": ["p2"]}, subsets=subsets)
    np.testing.assert_allclose(tiled(rows, ["p2"], subsets=subsets, dtype_gram="float64"), whole, rtol=1e-10)


def test_missing_rows_are_refused():
    rows = rows_of()
    rows.rows["p0"][9] = np.nan
    with pytest.raises(CorruptRunError, match=r"Gram of p0 is not finite between samples .*8 to 15"):
        tiled(rows, ["p0"], n_workers=1)


def test_tiles_are_chosen_only_where_one_worker_cannot_hold_the_whole():
    n = 20_000
    assert not needs_tiles(n, whole_bytes(n, 1), PANEL)
    assert needs_tiles(n, whole_bytes(n, 1) - 1, PANEL)
    assert tile_workers(8, 3 * tile_bytes(1, PANEL), PANEL) == 3
    with pytest.raises(CapacityError, match=r"20000 samples needs .* by tiles, and the budget is 1 MB. Raise"):
        needs_tiles(n, 1_000_000, PANEL)
    assert TILE % CHUNK == 0
    assert [tile.key for tile in tiles_of(17, 8)] == ["0-0", "0-1", "0-2", "1-1", "1-2", "2-2"]


@pytest.fixture
def by_tiles(monkeypatch):
    monkeypatch.setattr(gram_stage, "needs_tiles", lambda *_: True)
    monkeypatch.setattr(gram_stage, "TILE", SIZE)


@pytest.mark.parametrize("options", [{}, {"store_centered": True}])
def test_a_run_by_tiles_has_the_grams_of_a_run_in_memory(tmp_path, by_tiles, monkeypatch, options):
    run = tiny_runs.make_run(tmp_path / "tiled.zarr", N, **options)
    assert run.build_grams() == list(run.parameters)
    assert verify(run) == []
    spectrum = run.spectrum("none", False)
    monkeypatch.undo()
    whole = tiny_runs.make_run(tmp_path / "whole.zarr", N, **options)
    whole.build_grams()
    for name in run.parameters:
        (K, products), (expected, expected_products) = run.store.grams.read(name), whole.store.grams.read(name)
        np.testing.assert_allclose(K, expected, rtol=0, atol=1e-13 * np.abs(expected).max())
        if expected_products is not None:
            np.testing.assert_allclose(products, expected_products, rtol=0, atol=1e-13 * np.abs(expected).max())
    expected = whole.spectrum("none").global_.eigenvalues
    np.testing.assert_allclose(spectrum.global_.eigenvalues, expected, rtol=0, atol=1e-13 * expected[0])
    assert run.build_grams() == []


class Killed(BaseException):
    """Not an `Exception`: nothing may catch it and go on."""


def test_a_killed_reduction_goes_on_with_the_tiles_that_are_missing(tmp_path, by_tiles, monkeypatch):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N, use_deterministic=True, n_workers=1)
    shutil.copytree(run.path, tmp_path / "again.zarr")
    run.build_grams()
    write, written = gram_stage.StoredTiles.write, []

    def dying(sink, key, finished):
        if len(written) in (5, 13):
            written.append("killed")
            raise Killed
        written.append((key, finished.tile.key))
        return write(sink, key, finished)

    monkeypatch.setattr(gram_stage.StoredTiles, "write", dying)
    again = sf.open_run(tmp_path / "again.zarr")
    for _ in range(2):
        with pytest.raises(Killed):
            again.build_grams()
    again.build_grams()
    done = [entry for entry in written if entry != "killed"]
    assert len(done) == len(set(done)) == len(run.parameters) * len(tiles_of(N, SIZE))  # none was built twice
    for name in run.parameters:
        assert np.array_equal(again.store.grams.read(name)[0], run.store.grams.read(name)[0])


def test_a_grown_run_keeps_the_tiles_of_its_first_samples(tmp_path, by_tiles, monkeypatch):
    model = tiny_models.TinyRegression(0).double()
    data = {key: values.double() for key, values in tiny_models.vectors(N).items()}
    config = sf.SpectralConfig(chunk_size=8, dtype_compute="float64", dtype_model="float64")
    run = sf.collect(model, data, tmp_path / "run.zarr", config=config, n_samples=20)
    run.build_grams()
    run = run.add(model, data)
    write, written = gram_stage.StoredTiles.write, []
    monkeypatch.setattr(
        gram_stage.StoredTiles, "write", lambda s, k, f: (written.append((k, f.tile.key)), write(s, k, f))[1]
    )
    run.build_grams()
    assert {tile for _, tile in written} == {"0-2", "0-3", "1-2", "1-3", "2-2", "2-3", "3-3"}  # 16 rows stand
    rows = tiny_runs.rows(run, ["first.weight"])
    np.testing.assert_allclose(run.gram("first.weight"), rows @ rows.T, rtol=1e-11, atol=1e-14)


def test_a_damaged_tile_is_named_and_made_again(tmp_path, by_tiles):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N)
    run.build_grams()
    name = next(iter(run.parameters))
    before = run.store.grams.read(name)[0]
    (run.path / "gram" / node_name(name) / "c" / "0" / "1").unlink()
    with pytest.raises(CorruptRunError, match=rf"Gram of {name} is not what was written between samples 0 to 7 and 8"):
        run.store.grams.read(name)
    assert [problem.parameter for problem in verify(run, repair=True)] == [name]
    assert run.build_grams() == [name]
    assert np.array_equal(run.store.grams.read(name)[0], before)


def test_rebuilt_tiles_are_compared(tmp_path, by_tiles):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N)
    assert set(run.rebuild_grams().values()) == {None}
    assert set(run.rebuild_grams().values()) == {0.0}


def test_rows_of_other_norms_are_refused(tmp_path, by_tiles, monkeypatch):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N)
    per_sample = SampleStore.per_sample

    def altered(samples, what):
        values = per_sample(samples, what)
        if what == "squared_norm":
            values[9, 0] = 1e3
        return values

    monkeypatch.setattr(SampleStore, "per_sample", altered)
    with pytest.raises(
        CorruptRunError, match=r"first.weight do not have the norms they were collected with \(samples 9"
    ):
        run.build_grams()


def test_coarser_grams_and_waves_are_built_by_tiles_too(tmp_path, by_tiles):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N, gram_per="all", keep_gradients="none", hold="disk")
    kept = tiny_runs.make_run(tmp_path / "kept.zarr", N)
    assert list(run.store.gram_members) == ["all"] and (run.path / "done" / "tiles-all").is_dir()
    assert all(run.store.kept.is_deleted(name) for name in run.parameters)
    rows, K = tiny_runs.rows(kept), run.store.grams.read("all")[0]
    np.testing.assert_allclose(K, rows @ rows.T, rtol=0, atol=1e-12 * np.abs(K).max())
