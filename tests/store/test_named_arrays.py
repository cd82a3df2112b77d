"""What other programs see: eigenvalues, Grams and values of samples, with names for dimensions and coordinates."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from command_line import cli
from tiny_runs import make_run

import streamfisher as sf
from streamfisher.demo import demo_samples, load_demo_model
from streamfisher.reports import write_named_spectra

xarray = pytest.importorskip("xarray", reason="xarray is not installed (extra `tables`)")
PAGE = Path(__file__).parents[2] / "docs" / "format.md"


def tree(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of files that are no arrays
        return xarray.open_datatree(path, engine="zarr", consolidated=False)


@pytest.fixture
def run(tmp_path):
    made = make_run(tmp_path / "run.zarr")
    write_named_spectra(made, [made.spectrum("parameter"), made.spectrum("none", center=True)])
    return made


def test_the_tree_of_a_run_has_eigenvalues_grams_and_samples_with_coordinates(run):
    found = tree(run.path)
    spectrum = run.spectrum("parameter")
    stored = found["spectra/parameter"].to_dataset()
    assert list(stored.block.values) == [*spectrum, "whole_model"]
    assert list(stored.index.values) == list(range(1, 25))
    values = stored.eigenvalue.sel(block="first.weight").dropna("index")
    np.testing.assert_array_equal(values, spectrum["first.weight"].eigenvalues)
    assert float(stored.effective_rank.sel(block="whole_model")) == spectrum.whole.effective_rank
    assert stored.attrs["n_samples"] == 24 and "blocks: parameter" in stored.attrs["title"]
    centered = found["spectra/none.centered"].eigenvalue.sel(block="global")
    np.testing.assert_array_equal(centered, run.spectrum("none", center=True).global_.eigenvalues)
    K = found["gram"]["second.bias"]
    assert float(K.sel(sample=3, sample_j=7)) == run.store.grams.read("second.bias")[0][3, 7]
    assert K.dims == ("sample", "sample_j")
    norms = found["samples"].squared_norm
    assert norms.attrs["parameters"] == list(run.parameters)
    assert float(norms.sel(sample=5)[3]) == run.store.samples.per_sample("squared_norm")[5, 3]
    assert sf.verify(run) == []


def test_run_and_report_write_them_and_choices_of_samples_do_not(tmp_path):
    path = tmp_path / "run.zarr"
    words = ["tiny_models:regression", "tiny_models:vectors", "--blocks", "layer,none", "--center", "both"]
    assert cli("run", *words, "--out", path, "--quiet") == 0
    names = {folder.name for folder in (path / "spectra").iterdir() if folder.is_dir()}
    assert names == {"layer", "layer.centered", "none", "none.centered"}
    assert tree(path)["samples"].loss.sample.size == 8
    assert cli("report", path, "--blocks", "parameter", "--samples", "0:6", "--quiet") == 0
    assert not (path / "spectra" / "parameter").exists()


def test_a_run_that_grows_or_whose_grams_are_made_again_has_none_until_they_are_right(tmp_path):
    path = tmp_path / "run.zarr"
    model, samples = load_demo_model(), demo_samples(12, 16)
    config = sf.SpectralConfig(include=["norm.*"])
    run = sf.collect(model, samples, path, config=config, n_samples=8)
    write_named_spectra(run, [run.spectrum("layer")])
    assert tree(path)["spectra/layer"].attrs["n_samples"] == 8
    run = sf.collect(model, samples, path, config=config)
    assert not (path / "sample").exists() and not (path / "spectra" / "layer").exists()
    assert tree(path)["samples"].sizes["sample"] == 12
    write_named_spectra(run, [run.spectrum("layer")])
    assert tree(path)["samples"].sample.size == 12
    run.rebuild_grams()
    assert not (path / "spectra" / "layer").exists()


def test_arrays_of_other_lengths_are_given_no_coordinates(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    run.build_grams()
    run.store.grams.write("first.bias", np.eye(20), None, {})
    run.store.named.write_coordinates()
    assert not (run.path / "sample").exists()


@pytest.mark.parametrize("where", ["spectra/parameter/eigenvalue/c/0/0", "sample/zarr.json", "done/named.json"])
def test_what_is_altered_is_found_removed_and_written_again(run, where):
    data = bytearray((run.path / where).read_bytes())
    data[len(data) // 2] ^= 0x04
    (run.path / where).write_bytes(data)
    assert [problem.what for problem in sf.verify(run)] == ["named"]
    sf.verify(run, repair=True)
    assert sf.verify(run) == []
    write_named_spectra(run, [run.spectrum("parameter")])
    assert sf.verify(run) == [] and tree(run.path)["spectra/parameter"].sizes["block"] == 5


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run = sf.collect(
        load_demo_model(), demo_samples(8, 16), "run.zarr", config=sf.SpectralConfig(include=["layers.0.*"])
    )
    write_named_spectra(run, [run.spectrum("layer")])
    code = next(c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL) if "xarray" in c)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, PAGE.name, "exec"), names)
    assert names["K"].shape == (8,) and len(names["hard"]) == 8
