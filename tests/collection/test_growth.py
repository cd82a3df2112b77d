"""More samples for a stored run: only what is new is computed, and the end is that of a run from scratch."""

import threading

import numpy as np
import pytest
from factored_models import llama
from factored_models import sequences as lines
from tiny_models import TinyCausal, TinyRegression, sequences, vectors

import streamfisher as sf
from streamfisher.errors import CapacityError, RunError, RunMismatchError
from streamfisher.reduction import folds
from streamfisher.store import RunStore


def config(**options):
    return sf.SpectralConfig(chunk_size=4, n_workers=1, **options)


def collected(path, n, model=None, **options):
    data = options.pop("data", vectors(24))
    return sf.collect(model or TinyRegression(), data, path, config=config(**options), n_samples=n)


def rows_of(run):
    return {name: run.store.rows.columns(name, 0, columns) for name, columns in run.parameters.items()}


def assert_like(run, other, exact):
    for name, rows in rows_of(other).items():
        assert np.array_equal(rows_of(run)[name], rows), name
        K, expected = run.gram(name), other.gram(name)
        if exact:
            assert K.tobytes() == expected.tobytes(), name
        np.testing.assert_allclose(K, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    for what in ("loss", "n_targets", "valid", "squared_norm"):
        assert np.array_equal(run.store.samples.per_sample(what), other.store.samples.per_sample(what))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("before", "after"), [(8, 24), (10, 23), (3, 5), (9, 10)])
def test_a_grown_run_is_one_from_scratch(before, after, deterministic, tmp_path):
    run = collected(tmp_path / "run", before, use_deterministic=deterministic)
    run.build_grams()
    run = collected(tmp_path / "run", after, use_deterministic=deterministic)
    run.build_grams()
    whole = collected(tmp_path / "whole", after, use_deterministic=deterministic)
    whole.build_grams()
    assert run.n_samples == after and run.info()["complete"]
    assert_like(run, whole, exact=deterministic)
    eigenvalues = [r.spectrum("none").blocks["global"].eigenvalues for r in (run, whole)]
    np.testing.assert_allclose(*eigenvalues, rtol=1e-6, atol=1e-9 * eigenvalues[0][0])


def unkept(path, n, **options):
    settings = {"keep_gradients": "none", "dtype_compute": "float64", "use_deterministic": True} | options
    settings = sf.SpectralConfig(**{"chunk_size": 4, "n_workers": 1} | settings)
    return sf.collect(llama().double(), lines(21), path, config=settings, n_samples=n, progress=True)


def reduced(run):
    values = {what: run.store.samples.per_sample(what) for what in ("loss", "n_targets", "valid", "squared_norm")}
    return {key: run.gram(key).tobytes() for key in run.store.gram_members} | {
        k: v.tobytes() for k, v in values.items()
    }


@pytest.mark.parametrize(
    "options",
    [
        {"hold": "disk"},
        {"hold": "disk", "disk_budget": 280_000, "representation": "dense"},
        {"hold": "host"},
        {"hold": "host", "stream": "layers"},
    ],
    ids=str,
)
@pytest.mark.parametrize("after", [19, 21])
def test_a_run_that_kept_no_gradients_takes_its_pass_again_and_says_so(options, after, tmp_path, capsys):
    unkept(tmp_path / "run", 10, **options).spectrum("layer")
    capsys.readouterr()
    run = unkept(tmp_path / "run", after, **options)
    said = capsys.readouterr().out
    assert "The gradients of the 10 samples" in said and f"the pass over all {after} is taken again" in said
    assert run.n_samples == after and run.info()["complete"] and sf.verify(run) == []
    assert reduced(run) == reduced(unkept(tmp_path / "whole", after, **options))
    assert (len(run.store.waves) > 1) == ("disk_budget" in options or "stream" in options)


def test_stopped_while_it_takes_its_pass_again_it_goes_on(tmp_path, monkeypatch):
    whole = unkept(tmp_path / "whole", 21, hold="host")
    unkept(tmp_path / "run", 10, hold="host")
    write, count = RunStore.write_unit, iter(range(100))

    def stopped(store, record):
        if next(count) == 3:
            raise KeyboardInterrupt
        write(store, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunStore, "write_unit", stopped)
        unkept(tmp_path / "run", 21, hold="host")
    assert reduced(unkept(tmp_path / "run", 21, hold="host")) == reduced(whole)


def test_more_samples_than_fit_where_gradients_were_held_are_refused_and_the_run_stays(tmp_path):
    before = reduced(unkept(tmp_path / "run", 4, hold="host"))
    with pytest.raises(CapacityError):
        unkept(tmp_path / "run", 21, hold="host", memory_budget="5kB")
    assert reduced(sf.open_run(tmp_path / "run")) == before


def test_full_units_are_not_computed_again_and_a_partial_one_is(tmp_path):
    run = collected(tmp_path / "run", 10)
    times = {path.name: path.stat().st_mtime_ns for path in (run.path / "done").glob("rows-*")}
    collected(tmp_path / "run", 24)
    again = {path.name: path.stat().st_mtime_ns for path in (run.path / "done").glob("rows-*")}
    assert len(again) == 6
    assert {name for name, time in times.items() if again[name] != time} == {"rows-000002.json"}


def test_only_products_with_new_rows_are_formed(tmp_path, monkeypatch):
    collected(tmp_path / "run", 10).build_grams()
    seen = []
    monkeypatch.setattr(
        folds, "panel_sum", lambda n, known, device: seen.append((n, known)) or grams_panel_sum(n, known, device)
    )
    collected(tmp_path / "run", 24).build_grams()
    assert seen == [(24, 8)] * 4


grams_panel_sum = folds.panel_sum


def test_tokens_and_drawn_labels_keep_their_numbers(tmp_path):
    data = sequences(8, length=5)
    for name, options in {"token": {"sample_unit": "token"}, "model": {"labels": "model"}}.items():
        collected(tmp_path / name, 3, TinyCausal(), data=data, **options)
        run = collected(tmp_path / name, 8, TinyCausal(), data=data, **options)
        whole = collected(tmp_path / f"{name}-whole", 8, TinyCausal(), data=data, **options)
        for parameter, rows in rows_of(whole).items():
            assert np.array_equal(rows_of(run)[parameter], rows)
        assert run.metadata()["n_samples_stored"] == (32 if name == "token" else 8)


@pytest.mark.parametrize("sample", [1, 9])
def test_other_data_before_the_new_samples_is_refused_by_sample(sample, tmp_path):
    collected(tmp_path / "run", 10)
    data = vectors(24)
    data["x"][sample] += 1
    which = "samples 0 to 3" if sample == 1 else "samples 8 to 9"
    with pytest.raises(RunMismatchError, match=f"data: {which} have other contents"):
        collected(tmp_path / "run", 24, data=data)
    assert RunStore(tmp_path / "run").n_samples == 10
    assert collected(tmp_path / "run", 10).info()["complete"]


def test_other_settings_and_fewer_samples_are_refused(tmp_path):
    collected(tmp_path / "run", 10)
    with pytest.raises(RunMismatchError, match="setting seed: 42 in the run, 1 now"):
        collected(tmp_path / "run", 24, seed=1)
    with pytest.raises(RunMismatchError, match="number of samples: 10 in the run, 9 now"):
        collected(tmp_path / "run", 9)


def test_centered_rows_do_not_grow(tmp_path):
    collected(tmp_path / "run", 10, store_centered=True)
    with pytest.raises(RunMismatchError, match=r"10 in the run, 24 now.*stored centered.*cannot grow"):
        collected(tmp_path / "run", 24, store_centered=True)


class StopError(Exception):
    pass


@pytest.mark.parametrize("last", [False, True])
def test_stopped_while_it_grows_a_run_is_the_old_one_or_goes_on(last, tmp_path, monkeypatch):
    """`last`: at the manifest, the last thing that growing writes; else after the first array."""
    from streamfisher.store import growth

    collected(tmp_path / "run", 10).build_grams()
    with monkeypatch.context() as patch:
        lengthen, calls = growth._lengthen, []

        def stop(*arguments, **options):
            if last or calls:
                raise StopError
            calls.append(lengthen(*arguments))

        patch.setattr(growth, "write_marker" if last else "_lengthen", stop)
        with pytest.raises(StopError):
            collected(tmp_path / "run", 24)
    if last:
        with pytest.raises(RunError, match="8 of 10 samples"):
            sf.open_run(tmp_path / "run").spectrum()
    else:
        assert sf.open_run(tmp_path / "run").spectrum().metadata["n_samples"] == 10
    old = collected(tmp_path / "run", 10)
    old.build_grams()
    fresh = collected(tmp_path / "fresh", 10)
    fresh.build_grams()
    assert_like(old, fresh, exact=True)
    grown, whole = collected(tmp_path / "run", 24), collected(tmp_path / "whole", 24)
    grown.build_grams()
    whole.build_grams()
    assert_like(grown, whole, exact=False)


def test_stopped_among_the_new_units_a_grown_run_goes_on(tmp_path, monkeypatch):
    collected(tmp_path / "run", 10)
    with monkeypatch.context() as patch:
        write, written, one = RunStore.write_unit, [], threading.Lock()

        def stop(self, record):
            with one:  # units are written by threads, in any order
                if len(written) == 2:
                    raise StopError
                write(self, record)
                written.append(record.unit.index)

        patch.setattr(RunStore, "write_unit", stop)
        with pytest.raises(StopError):
            collected(tmp_path / "run", 24)
    assert len(written) == 2 and min(written) >= 2
    assert sf.open_run(tmp_path / "run").info()["samples_done"] == 16
    run, whole = collected(tmp_path / "run", 24), collected(tmp_path / "whole", 24)
    run.build_grams()
    whole.build_grams()
    assert_like(run, whole, exact=True)
