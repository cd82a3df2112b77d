"""Runs that the code of before wrote are read, checked, solved, resumed and grown by the code of now."""

import json

import golden_runs
import numpy as np
import pytest

import streamfisher as sf
from streamfisher import verify

#: What is deleted is not rebuilt, and what is centered cannot grow.
REBUILT = ("dense", "factors", "centered", "version-1")
GROWN = ("dense", "factors")
RESUMED = ("dense", "factors", "centered")
#: The code of before took all products for float32 where `dtype_gram` says so, and parameters of fewer than 65,536
#: columns were multiplied in float64 all along: floors are lower now, and more eigenvalues count as above them.
#: Nothing else may differ: eigenvalues, traces and what is made of all of them stay as they were, to the byte.
FLOOR_FOLLOWS_PRODUCTS = {
    "noise_floor",
    "numerical_rank",
    "condition_number",
    "effective_rank",
    "power_law_exponent",
    "power_law_stderr",
    "power_law_first",
    "power_law_last",
    "power_law_r_squared",
}
SAME_ARITHMETIC = golden_runs.arithmetic() == (golden_runs.FOLDER / "arithmetic.txt").read_text().strip()


@pytest.fixture
def golden(request, tmp_path):
    return golden_runs.unpacked(request.param, tmp_path)


def of_each(names):
    return pytest.mark.parametrize("golden", names, indirect=True)


def spectra(run):
    return [run.spectrum(blocks, center) for blocks in ("layer", "module", "none") for center in (False, True)]


def as_json(run):
    """Return `spectrum.json` as it is written now, `analysed_with` being what is stored; and the stored one."""
    content = {"spectra": [spectrum.to_dict() for spectrum in spectra(run)]}
    stored = json.loads((run.path / "spectrum.json").read_text())
    for now, before in zip(content["spectra"], stored["spectra"], strict=True):
        assert now["metadata"]["analysed_with"].keys() == before["metadata"]["analysed_with"].keys()
        now["metadata"]["analysed_with"] = before["metadata"]["analysed_with"]
    return content, stored


def assert_near(now, before, where="spectrum"):
    """Eigenvalues to 1e-12 of the largest, as LAPACK promises them; what is derived from small ones to less."""
    assert type(now) is type(before), where
    if isinstance(before, dict):
        assert now.keys() == before.keys(), where
        for key in before:
            assert_near(now[key], before[key], f"{where}.{key}")
    elif isinstance(before, list) and before and isinstance(before[0], float):
        assert np.allclose(now, before, rtol=1e-12, atol=1e-12 * max(map(abs, before))), where
    elif isinstance(before, list):
        assert len(now) == len(before), where
        for number, (one, other) in enumerate(zip(now, before, strict=True)):
            assert_near(one, other, f"{where}[{number}]")
    elif isinstance(before, float):
        assert now == pytest.approx(before, rel=1e-12 if where.endswith((".trace", "_eigenvalue")) else 1e-6), where
    else:
        assert now == before, where


def known_before(now, before):
    """Return `now` without the keys that the code of before did not write."""
    if isinstance(before, dict):
        return {key: known_before(now[key], value) for key, value in before.items()}
    if isinstance(before, list):
        return [known_before(one, other) for one, other in zip(now, before, strict=True)]
    return now


@of_each(golden_runs.SETTINGS)
def test_nothing_is_wrong_with_it(golden):
    run = sf.open_run(golden)
    assert run.info()["complete"] and run.info()["grams_done"] == 6
    assert verify(run) == []


def without_floors(content):
    """Return it without what follows the noise floor."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key not in FLOOR_FOLLOWS_PRODUCTS}
        return {key: without_floors(value) for key, value in kept.items()}
    return [without_floors(one) for one in content] if isinstance(content, list) else content


def assert_same(content, stored):
    """Everything that does not hang on the floor is the same to the byte, on the same arithmetic; floors only fell."""
    now, before = without_floors(known_before(content, stored)), without_floors(stored)
    if SAME_ARITHMETIC:
        assert json.dumps(now, indent=1) == json.dumps(before, indent=1)
    assert_near(now, before)
    for one, other in zip(content["spectra"], stored["spectra"], strict=True):
        for key, block in other["per_block"].items():
            assert one["per_block"][key]["noise_floor"] <= block["noise_floor"]
            assert one["per_block"][key]["numerical_rank"] >= block["numerical_rank"]


@of_each(["dense", "factors", "waves", "centered"])
def test_its_spectrum_json_is_the_same(golden):
    assert_same(*as_json(sf.open_run(golden)))


@of_each(["version-1"])
def test_the_spectrum_of_format_version_1_is_the_same(golden):
    run = sf.open_run(golden)
    assert run.manifest.format_version == 1
    assert_same(*as_json(run))


@of_each(REBUILT)
def test_its_grams_are_built_again(golden):
    run = sf.open_run(golden)
    differences = run.rebuild_grams()
    assert len(differences) == 6
    assert max(differences.values()) <= (0.0 if SAME_ARITHMETIC else 1e-6)


def test_all_hold_the_same_gradients(tmp_path):
    dense, *others = (sf.open_run(golden_runs.unpacked(name, tmp_path)) for name in golden_runs.SETTINGS)
    for other in others:
        for name in dense.parameters:
            K = dense.gram(name)
            assert np.linalg.norm(other.gram(name) - K) <= 1e-5 * np.linalg.norm(K), (other.path.name, name)


@of_each(RESUMED)
def test_it_is_resumed(golden):
    whole = sf.open_run(golden)
    grams = {name: whole.gram(name) for name in whole.parameters}
    (golden / "done" / "rows-000001.json").unlink()
    for marker in (golden / "done").glob("gram-*.json"):
        marker.unlink()
    assert not sf.open_run(golden).info()["complete"]
    run = golden_runs.collect(golden, golden.name)
    assert run.info()["complete"]
    assert_same_grams(run, grams)
    assert verify(run) == []


@of_each(["waves"])
def test_reduced_waves_are_not_collected_again(golden):
    def finished():
        return {
            path: path.stat().st_mtime_ns for kind in ("rows", "gram") for path in golden.glob(f"done/{kind}*.json")
        }

    before = finished()
    run = golden_runs.collect(golden, golden.name)
    assert run.info()["complete"] and len(run.info()["gradients_deleted"]) == 6
    assert finished() == before and len(before) == 12


@of_each(GROWN)
def test_it_grows(golden, tmp_path):
    run = golden_runs.collect(golden, golden.name, golden_runs.N + 4)
    assert run.n_samples == golden_runs.N + 4 and run.info()["complete"]
    assert verify(run) == []
    fresh = golden_runs.collect(tmp_path / "fresh", golden.name, golden_runs.N + 4)
    run.build_grams()
    fresh.build_grams()
    assert_same_grams(run, {name: fresh.gram(name) for name in fresh.parameters})


def assert_same_grams(run, grams):
    """As rows are computed again, in float32, on another machine to its rounding."""
    run.build_grams()
    for name, K in grams.items():
        now = run.gram(name)
        assert np.linalg.norm(now - K) <= 1e-5 * np.linalg.norm(K), name
