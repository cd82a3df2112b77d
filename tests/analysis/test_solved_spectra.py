"""What took long to solve is kept in the run: to the bit, of this question and these Grams, or it is solved again."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from command_line import cli, contents
from tiny_runs import PATTERNS, make_run

import streamfisher as sf
from streamfisher.analysis import block_grams, solved_spectra, subset_sums
from streamfisher.errors import CorruptRunError
from streamfisher.runtime import read_json, write_json


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("kept") / "run.zarr")
    run.spectrum("parameter", keep=True)
    return run.path


@pytest.fixture
def run(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


@pytest.fixture
def solved(monkeypatch):
    """Return the numbers of samples that were solved for since."""
    found = []
    original = block_grams.block_solutions

    def counting(gram_of, problem, **options):
        found.append(len(problem.selection))
        return original(gram_of, problem, **options)

    for module in (block_grams, subset_sums):
        monkeypatch.setattr(module, "block_solutions", counting)
    return found


def same(one, other):
    """Return whether two spectra are the same in every field, to the bit."""
    mine, theirs = ([*s.blocks.values(), s.global_, s.solved_whole] for s in (one, other))
    for a, b in zip(mine, theirs, strict=True):
        for field in dataclasses.fields(a):
            x, y = getattr(a, field.name), getattr(b, field.name)
            if isinstance(x, np.ndarray):
                if x.dtype != y.dtype or not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
                    return False
            elif x != y or type(x) is not type(y):
                return False
    return list(one.blocks) == list(other.blocks) and one.metadata == other.metadata


def file_of(run):
    (path,) = (run / "done" / "spectra").glob("*.json")
    return path


def test_a_kept_spectrum_is_the_solved_one_to_the_bit_without_an_eigensolve(run, solved):
    found = sf.open_run(run).spectrum("parameter")
    assert solved == []
    assert same(found, sf.open_run(run).spectrum("parameter", keep=False)) and solved == []
    shutil.rmtree(run / "done" / "spectra")
    assert same(found, sf.open_run(run).spectrum("parameter")) and solved == [24]


@pytest.mark.parametrize(
    "options",
    [
        {"center": True},
        {"samples": slice(0, 12)},
        {"weights": np.arange(24.0)},
        {"normalization": "tokens"},
        {"top_k": 3},
        {"block_structure": PATTERNS},
        {"config": {"regularization": 1e-3}},
        {"config": {"dtype_eigensolve": "float32"}},
    ],
    ids=str,
)
def test_another_question_is_another_spectrum(run, solved, options):
    opened = sf.open_run(run)
    if "config" in options:
        options = {"config": opened.config.replace(**options["config"])}
    opened.spectrum(**{"block_structure": "parameter"} | options)
    assert len(solved) == 1


def test_what_is_quick_to_solve_leaves_nothing_in_a_run(run, monkeypatch):
    opened, before = sf.open_run(run), contents(run)
    opened.spectrum("layer")
    assert contents(run) == before
    monkeypatch.setattr(solved_spectra, "_WORTH", 0.0)
    opened.spectrum("layer", keep=False)
    assert contents(run) == before
    opened.spectrum("layer")
    new = set(contents(run)) - set(before)
    assert len(new) == 1 and next(iter(new)).startswith("done/spectra/")


def test_grams_that_changed_since_are_solved_anew(run, solved):
    opened = sf.open_run(run)
    before = opened.spectrum("parameter")
    store, name = opened.store.grams, "first.bias"
    marker = store.marker(name)
    store.write(name, 4 * store.read(name)[0], None, marker["settings"], single=marker["float32_products"])
    after = sf.open_run(run).spectrum("parameter")
    assert solved == [24]
    np.testing.assert_allclose(after[name].eigenvalues, 4 * before[name].eigenvalues, rtol=1e-9)


def test_damaged_grams_are_noticed_as_ever(run):
    shutil.copy(run / "gram/first.bias/c/0/0", run / "gram/second.bias/c/0/0")
    with pytest.raises(CorruptRunError, match=r"Gram of second\.bias is not what was written"):
        sf.open_run(run).spectrum("parameter")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x04
    path.write_bytes(data)


def sealed(change):
    """Return what rewrites a kept file with a right seal, as an older or a hostile program may have left it."""

    def rewrite(path):
        content = read_json(path)
        change(content)
        write_json(path, content)

    return rewrite


DAMAGE = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[]"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "of another question": sealed(lambda content: content["asked"].update(center=True)),
    "without blocks": sealed(lambda content: content["solved"].pop("blocks")),
    "a block without eigenvalues": sealed(lambda content: content["solved"]["blocks"][0][1].pop("eigenvalues")),
    "another dtype": sealed(lambda content: content["solved"]["blocks"][0][1]["eigenvalues"].update(dtype="<f4")),
    "no base64": sealed(lambda content: content["solved"]["blocks"][0][1]["eigenvalues"].update(data="!")),
    "words": sealed(lambda content: content["solved"]["traces"].update({"first.bias": "much"})),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_solved_again_and_never_believed(run, solved, damage):
    right = sf.open_run(run).spectrum("parameter")
    damage(file_of(run))
    assert same(sf.open_run(run).spectrum("parameter"), right) and solved == [24]


def test_verify_finds_and_removes_what_is_damaged(run):
    assert sf.verify(sf.open_run(run)) == []
    flip(file_of(run))
    (problem,) = sf.verify(sf.open_run(run))
    assert problem.what == "spectrum"
    sf.verify(sf.open_run(run), repair=True)
    assert sf.verify(sf.open_run(run)) == [] and not list((run / "done" / "spectra").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_that_cannot_be_written_does_without(run):
    (run / "done").chmod(0o500)
    try:
        assert len(sf.open_run(run).spectrum("layer", keep=True)) == 4
    finally:
        (run / "done").chmod(0o700)


def test_a_disk_that_fails_is_no_reason_not_to_answer(run, monkeypatch):
    from streamfisher.store import spectra

    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spectra, "write_json", full)
    assert len(sf.open_run(run).spectrum("layer", keep=True).blocks) == 1


def test_growth_curves_are_kept_size_by_size(run, solved, monkeypatch):
    monkeypatch.setattr(solved_spectra, "_WORTH", 0.0)
    first = sf.open_run(run).growth("layer").to_dict()
    assert solved == [12, 24]
    assert sf.open_run(run).growth("layer").to_dict() == first and solved == [12, 24]


def test_run_keeps_its_spectra_and_more_samples_make_them_stale(tmp_path, solved, capsys):
    words = ["run", "tiny_models:regression", "rank_models:thirty_vectors", "--out", tmp_path / "run.zarr", "--quiet"]
    assert cli(*words, "--blocks", "layer,none", "--samples", 16) == 0
    solved.clear()
    assert cli("spectrum", tmp_path / "run.zarr", "--blocks", "layer,none", "--json", "--quiet") == 0
    assert solved == []
    assert cli(*words, "--blocks", "layer,none", "--samples", 24) == 0
    assert solved[0] == 24
    capsys.readouterr()
    assert cli("spectrum", tmp_path / "run.zarr", "--blocks", "layer", "--json", "--quiet") == 0
    assert json.loads(capsys.readouterr().out)["whole_model"]["n_samples"] == 24
