"""Looking at a run with other settings changes nothing that is stored, and answers as if Grams had been stored so."""

import os

import numpy as np
import pytest
from command_line import contents
from tiny_runs import make_run

from streamfisher import open_run
from streamfisher.analysis.compare import compare
from streamfisher.errors import CapacityError, CorruptRunError, RunError


def other(run, **options):
    return run.config.replace(**({"dtype_gram": "float64"} | options))


@pytest.mark.parametrize("options", [{}, {"store_centered": True}, {"representation": "factors"}], ids=str)
@pytest.mark.parametrize("center", [False, True])
def test_answers_are_those_of_stored_grams_and_nothing_changes(options, center, tmp_path):
    run = make_run(tmp_path / "run.zarr", **options)
    run.build_grams()
    before, config = contents(run.path), other(run)
    found = run.spectrum("layer", center, config=config)
    assert run.spectral_density("global", center, block_structure="none", config=config).n_eigenvalues
    assert run.growth("layer", center, config=config).sizes
    assert contents(run.path) == before

    run.build_grams(config)  # which is what replaces them
    assert contents(run.path) != before
    assert open_run(run.path).spectrum("layer", center, config=config).to_dict() == found.to_dict()


def test_what_is_missing_is_stored_in_the_runs_own_settings_only(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    before = contents(run.path)
    run.spectrum("layer", config=other(run))
    assert contents(run.path) == before
    run.spectrum("layer")
    assert open_run(run.path).info()["grams_done"] == len(run.store.gram_members)


def test_comparing_leaves_grams_of_other_settings_where_they_are(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    run.build_grams(other(run))
    before = contents(run.path)
    again = open_run(run.path)
    assert compare([again, again], labels=["a", "b"]).overlaps[0].mean_squared_cosine == pytest.approx(1)
    assert contents(run.path) == before


def test_eigenvectors_are_of_the_stored_grams(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    run.build_grams()
    before = contents(run.path)
    with pytest.raises(RunError, match=r"`streamfisher gram` with the same options"):
        run.eigenvectors("global", 2, block_structure="none", config=other(run))
    assert contents(run.path) == before


def test_grams_that_do_not_fit_are_refused_with_what_to_do(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    run.build_grams()
    with pytest.raises(CapacityError, match=r"`streamfisher gram` with the same options stores them"):
        run.spectrum("layer", config=other(run, memory_budget="10kB"))


def test_damaged_rows_are_refused_as_for_stored_grams(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    run.build_grams()
    chunk = run.path / "gradients/first.weight/c/0/0"
    chunk.write_bytes((run.path / "gradients/first.weight/c/1/0").read_bytes())
    with pytest.raises(CorruptRunError, match=r"first\.weight"):
        open_run(run.path).spectrum("layer", config=other(run))


def test_a_run_that_cannot_be_written_is_answered_from_memory(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run.zarr")
    before = contents(run.path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = run.spectrum("layer")
    assert contents(run.path) == before
    monkeypatch.undo()
    expected = open_run(run.path).spectrum("layer")
    np.testing.assert_array_equal(found.global_.eigenvalues, expected.global_.eigenvalues)
