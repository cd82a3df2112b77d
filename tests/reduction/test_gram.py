"""Grams from column slabs are those of the whole matrix, at any budget and with any number of workers."""

import os
import pickle

import numpy as np
import pytest
import torch

import streamfisher as sf
from streamfisher import SpectralConfig
from streamfisher.errors import CapacityError, CorruptRunError
from streamfisher.reduction import FOLD, SlabPlan, build_grams, draw_columns, folds, plan_slabs
from streamfisher.reduction import gram as grams
from streamfisher.reduction.slabs import SlabBuffers, read_slabs
from streamfisher.sinks import MemoryRows
from streamfisher.store import PANEL


def random_rows(n=12, widths=(5, PANEL + 7, 3 * PANEL), dtype=np.float64, scale=1.0):
    generator = np.random.default_rng(0)
    return {f"p{i}": (scale * generator.standard_normal((n, width))).astype(dtype) for i, width in enumerate(widths)}


def grams_of(rows, **options):
    config = SpectralConfig(**{"dtype_gram": torch.float64, "n_workers": 1, **options})
    return {parameter.name: parameter.gram for parameter in build_grams(MemoryRows(rows), config, lambda gram: gram)}


def test_float64_grams_match_numpy():
    rows = random_rows()
    for name, gram in grams_of(rows).items():
        np.testing.assert_allclose(gram, rows[name] @ rows[name].T, rtol=1e-12)


def test_float32_products_are_added_up_in_float64():
    rows = random_rows(dtype=np.float32, widths=(8 * PANEL,))
    exact = rows["p0"].astype(np.float64) @ rows["p0"].astype(np.float64).T
    error = np.abs(grams_of(rows, dtype_gram="float32")["p0"] - exact).max() / np.abs(exact).max()
    assert error < 1e-7


def test_grams_are_exactly_symmetric():
    for gram in grams_of(random_rows(dtype=np.float32), dtype_gram="float32").values():
        assert np.array_equal(gram, gram.T)


@pytest.mark.parametrize(
    "options", [{"n_workers": 2}, {"memory_budget": "9MB"}, {"n_workers": 2, "memory_budget": "4MB"}]
)
def test_neither_workers_nor_budget_change_a_bit(options):
    rows = random_rows(widths=(FOLD + PANEL + 3,), dtype=np.float32)
    reference = grams_of(rows, dtype_gram="float32", use_deterministic=True)["p0"]
    other = grams_of(rows, dtype_gram="float32", use_deterministic=True, **options)["p0"]
    assert np.array_equal(reference, other)


class WideChunks(MemoryRows):
    """Rows in chunks of three folds, which tells what is read."""

    def __init__(self, rows):
        super().__init__(rows)
        self.read = []

    def chunk_columns(self, name):
        return 3 * FOLD

    def columns(self, name, start, stop, rows=None, *, out=None):
        self.read.append((start, stop))
        return super().columns(name, start, stop, rows)


@pytest.mark.parametrize("subset", [False, True])
def test_chunks_of_several_folds_are_read_once_and_change_no_bit(subset):
    rows = random_rows(n=3, widths=(4 * FOLD + PANEL + 5,), dtype=np.float32)
    config = SpectralConfig(dtype_gram="float32", n_workers=1, use_deterministic=True)
    subsets = draw_columns({"p0": rows["p0"].shape[1]}, {"b": ["p0"]}, 1000, seed=3) if subset else None
    wide = WideChunks(rows)
    (found,) = build_grams(wide, config, lambda gram: gram, subsets=subsets)
    (reference,) = build_grams(MemoryRows(rows), config, lambda gram: gram, subsets=subsets)
    assert np.array_equal(found.gram, reference.gram)
    assert sorted(wide.read) == [(0, 3 * FOLD), (3 * FOLD, 4 * FOLD + PANEL + 5)]


def test_tasks_begin_in_the_order_of_the_columns_and_the_disk_is_told_of_those_that_come(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, data = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 2)), torch.randn(6, 300)
    settings = {"chunk_size": 2, "representation": "dense", "keep_gradients": ("*",)}
    run = sf.collect(
        model, {"x": data, "labels": torch.arange(6) % 2}, tmp_path / "run", config=SpectralConfig(**settings)
    )
    wide, begun, hinted = next(iter(run.parameters)), [], []
    monkeypatch.setattr("streamfisher.reduction.folds.FOLD", PANEL)
    monkeypatch.setattr(type(run.store.rows), "chunk_columns", lambda self, name: PANEL)
    plain = type(run.store.rows).columns

    def columns(self, name, start, stop, rows=None, **options):
        begun.append((name, start))
        return plain(self, name, start, stop, rows, **options)

    monkeypatch.setattr(type(run.store.rows), "columns", columns)
    monkeypatch.setattr(
        type(run.store.rows), "files", lambda self, name, start, stop: hinted.append((name, start)) or []
    )
    build_grams(run.store.rows, SpectralConfig(n_workers=1), lambda gram: None)
    expected = [(wide, start) for start in range(0, 90_000, PANEL)]
    assert begun[: len(expected)] == expected
    assert set(begun) == set(hinted)


@pytest.mark.parametrize("representation", ["dense", "factors"])
def test_the_files_of_some_columns_are_those_that_are_read(tmp_path, representation, monkeypatch):
    torch.manual_seed(0)
    data = {"x": torch.randn(6, 300), "labels": torch.arange(6) % 2}
    settings = {"chunk_size": 2, "representation": representation, "keep_gradients": ("*",)}
    run = sf.collect(torch.nn.Linear(300, 2), data, tmp_path / "run", config=SpectralConfig(**settings))
    rows, read = run.store.rows, set()
    plain = os.open
    monkeypatch.setattr(os, "open", lambda path, *more, **by: read.add(str(path)) or plain(path, *more, **by))
    rows.columns("weight", 0, 600)
    chunks = {path for path in read if "/c/" in path and ("gradients" in path or "factors" in path)}
    packed = rows.run.places["weight"].pack is not None
    assert {str(path) for path in rows.files("weight", 0, 600)} == (set() if packed else chunks)
    assert packed or chunks


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_gradients_near_the_ends_of_the_range_neither_vanish_nor_overflow(scale):
    rows = random_rows(widths=(PANEL + 1,), dtype=np.float32, scale=scale)
    wide = rows["p0"].astype(np.float64)
    np.testing.assert_allclose(grams_of(rows, dtype_gram="float32")["p0"], wide @ wide.T, atol=1e-5 * scale**2 * PANEL)


def test_missing_rows_are_refused_by_sample():
    rows = random_rows(widths=(10,))
    rows["p0"][3] = np.nan
    with pytest.raises(CorruptRunError, match=r"Gram of p0 is not finite: the gradient rows of samples .*3"):
        grams_of(rows)


def test_a_budget_below_one_panel_says_what_would_do():
    with pytest.raises(CapacityError, match=r"1000 samples need .* with 2 workers .* budget is 1 MB. Lower n_workers"):
        grams_of(random_rows(n=1000, widths=(3,)), n_workers=2, memory_budget="1MB")


class CopiedRows(MemoryRows):
    """Rows that are copied into the buffer, as those of a store are."""

    def __init__(self, rows, chunk):
        super().__init__(rows)
        self.chunk = chunk

    def chunk_columns(self, name):
        return self.chunk

    def columns(self, name, start, stop, rows=None, *, out=None):
        if out is None:
            return super().columns(name, start, stop, rows)
        out[...] = self.rows[name][:, start:stop]
        return out


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("panels", [1, 2, 7])
def test_slabs_follow_each_other_without_a_gap(panels, ahead):
    rows = CopiedRows(random_rows(widths=(5 * PANEL + 3,), dtype=np.float32), 2 * PANEL)
    plan = SlabPlan(panels * PANEL, ahead, 0)
    parts = []
    for left, slab in read_slabs(rows, "p0", PANEL, 5 * PANEL + 3, plan):
        assert left == PANEL + sum(part.shape[1] for part in parts)
        parts.append(slab.copy())
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), rows.rows["p0"][:, PANEL:])


def test_buffers_go_from_fold_to_fold_and_stay_behind_when_pickled():
    spare = SlabBuffers()
    first = spare.take((4, 6), np.dtype("float32"))
    first[...] = 1.0
    spare.give_back(first)
    assert pickle.loads(pickle.dumps(spare)).take((4, 6), np.dtype("float32")).base is not first.base
    again = spare.take((6, 4), np.dtype("float32"))
    assert again.shape == (6, 4) and np.shares_memory(first, again)
    other = spare.take((6, 4), np.dtype("float64"))
    assert other.dtype == np.float64 and not np.shares_memory(first, other)
    spare.give_back(first)
    larger = spare.take((7, 6), np.dtype("float32"))  # what does not fit is let go
    assert larger.shape == (7, 6) and not np.shares_memory(first, larger)


def test_an_error_while_reading_ahead_is_raised_where_the_slab_is_asked_for():
    class Torn(CopiedRows):
        def columns(self, name, start, stop, rows=None, *, out=None):
            if start:
                raise CorruptRunError("a chunk cannot be read")
            return super().columns(name, start, stop, rows, out=out)

    rows = Torn(random_rows(widths=(4 * PANEL,)), PANEL)
    slabs = read_slabs(rows, "p0", 0, 4 * PANEL, SlabPlan(PANEL, True, 0))
    assert next(slabs)[0] == 0
    with pytest.raises(CorruptRunError, match="a chunk cannot be read"):
        next(slabs)


def test_slabs_are_whole_chunks_read_ahead_where_the_budget_allows_it():
    rows = CopiedRows({"p0": np.zeros((16, 40 * PANEL), dtype=np.float32)}, 4 * PANEL)
    single = np.dtype("float32")
    panel, sums = 16 * PANEL, 24 * 16**2
    assert plan_slabs(rows, "p0", single, 10**9) == SlabPlan(4 * PANEL, True, 4 * panel * 8)
    assert plan_slabs(rows, "p0", single, sums + 4 * panel * 8 - 1) == SlabPlan(4 * PANEL, False, 4 * panel * 4)
    assert plan_slabs(rows, "p0", single, sums + 3 * panel * 4) == SlabPlan(3 * PANEL, False, 3 * panel * 4)
    assert plan_slabs(rows, "p0", np.dtype("float64"), sums + 20 * panel).columns == PANEL


def test_the_sums_of_many_folds_do_not_pile_up(monkeypatch):
    alive, most = 0, 0
    fold_rows = grams.fold_rows

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def counted(*arguments):
        nonlocal alive, most
        ((found, products),) = fold_rows(*arguments)
        alive += 1
        most = max(most, alive)
        return [(found.view(Counted), products)]

    monkeypatch.setattr(folds, "FOLD", PANEL)
    monkeypatch.setattr(grams, "fold_rows", counted)
    rows = random_rows(n=4, widths=(30 * PANEL,))
    np.testing.assert_allclose(grams_of(rows, n_workers=2)["p0"], rows["p0"] @ rows["p0"].T, rtol=1e-12)
    assert 0 < most <= 8


def test_subsampling_is_the_same_in_every_process_and_unbiased_in_scale():
    parameters = {"a": 300, "b": 700}
    first = draw_columns(parameters, {"block": ["a", "b"]}, 100, seed=1)
    again = draw_columns(parameters, {"block": ["a", "b"]}, 100, seed=1)
    other = draw_columns(parameters, {"another": ["a", "b"]}, 100, seed=1)
    assert all(np.array_equal(first[name].columns, again[name].columns) for name in parameters)
    assert not np.array_equal(first["b"].columns, other["b"].columns)
    assert sum(len(subset.columns) for subset in first.values()) == 100
    assert first["a"].scale == 10.0


def test_subsampled_gram_is_the_rescaled_gram_of_the_drawn_columns():
    rows = random_rows(widths=(2 * PANEL + 5,))
    subsets = draw_columns({"p0": 2 * PANEL + 5}, {"b": ["p0"]}, 50, seed=3)
    (finished,) = build_grams(
        MemoryRows(rows), SpectralConfig(dtype_gram="float64"), lambda gram: gram, subsets=subsets
    )
    drawn = rows["p0"][:, subsets["p0"].columns]
    np.testing.assert_allclose(finished.gram, drawn @ drawn.T * subsets["p0"].scale, rtol=1e-12)
    assert 0.5 < np.trace(finished.gram) / np.trace(rows["p0"] @ rows["p0"].T) < 2


def test_a_block_that_is_small_enough_is_not_subsampled():
    assert draw_columns({"a": 10}, {"b": ["a"]}, 10, seed=0) == {}


@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16", "float16"])
def test_float64_rows_are_multiplied_as_they_were_stored(tmp_path, stored):
    model = torch.nn.Linear(300, 7).double()
    generator = torch.Generator().manual_seed(0)
    data = {"input_ids": torch.randn(6, 300, generator=generator).double(), "labels": torch.zeros(6, 7).double()}
    run = sf.collect(model, data, tmp_path / "run.zarr", config=SpectralConfig(dtype_store=stored))
    run.build_grams()
    rows = run.store.rows.columns("weight", 0, 2100)
    assert rows.dtype == (np.float64 if stored == "float64" else np.float32)
    buffer = np.full((6, 2100), np.nan, dtype=rows.dtype)
    np.testing.assert_array_equal(run.store.rows.columns("weight", 0, 2100, out=buffer), rows)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(run.store.grams.read("weight")[0], wide @ wide.T, rtol=1e-13)


def test_rebuilding_says_how_far_the_old_grams_were(tmp_path):
    model = torch.nn.Linear(3, 2)
    data = {"input_ids": torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), "labels": torch.zeros(6, 2)}
    run = sf.collect(model, data, tmp_path / "run.zarr")
    assert run.rebuild_grams() == {"weight": None, "bias": None}
    assert run.rebuild_grams() == {"weight": 0.0, "bias": 0.0}
    K, _ = run.store.grams.read("bias")
    run.store.grams.write("bias", 2 * K, None, {"dtype_gram": "float32"})
    assert run.rebuild_grams() == {"weight": 0.0, "bias": pytest.approx(1.0)}
    np.testing.assert_array_equal(run.store.grams.read("bias")[0], K)
