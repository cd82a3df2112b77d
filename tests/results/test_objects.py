"""What people expect of results: mapping, attributes, plots, frames, data sets, notebooks."""

import html
import re

import numpy as np
import pytest
from tiny_runs import PATTERNS, make_run

import streamfisher as sf
from streamfisher.errors import ConfigError
from streamfisher.results import SCALAR_METRICS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("objects") / "run.zarr")


@pytest.fixture(scope="module")
def spectrum(run):
    return run.spectrum(PATTERNS)


def test_a_spectrum_is_a_mapping_of_its_blocks(spectrum):
    assert list(spectrum) == spectrum.keys() == ["first", "second"] and len(spectrum) == 2
    assert spectrum["first"] is spectrum.blocks["first"] is dict(spectrum.items())["first"] is spectrum.values()[0]
    assert spectrum["global"] is spectrum.global_ and spectrum["whole_model"] is spectrum.whole
    assert "first" in spectrum and "whole_model" in spectrum and "third" not in spectrum
    assert spectrum._ipython_key_completions_() == ["first", "second", "global", "whole_model"]
    with pytest.raises(KeyError, match="there is no block 'third'; the blocks are first, second"):
        spectrum["third"]


def test_metrics_are_attributes_and_are_completed(spectrum):
    block = spectrum["first"]
    for name in SCALAR_METRICS:
        assert getattr(block, name) == block.metrics[name] and name in dir(block), name
    assert block.smallest_eigenvalue == block.metrics["smallest_eigenvalue"]
    assert repr(block).startswith("BlockSpectrum('first', 20 eigenvalues, N=24, P=20")


def test_cut_lists_have_no_ranks(run):
    block = run.spectrum("none", top_k=2)["global"]
    assert block.effective_rank is block.numerical_rank is block.condition_number is None
    assert block.stable_rank == pytest.approx(run.spectrum("none")["global"].stable_rank)


def test_plot_gives_axes(spectrum):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    assert spectrum.plot(ax=axis) is axis
    assert "empirical Fisher" in axis.get_title() and len(axis.get_lines()) >= 3


def test_frames(spectrum):
    pytest.importorskip("pandas")
    metrics = spectrum.to_frame()
    assert list(metrics.index) == ["first", "second", "global", "whole_model"] and metrics.index.name == "block"
    assert metrics.loc["first", "effective_rank"] == spectrum["first"].effective_rank
    values = spectrum.to_frame("eigenvalues")
    assert values.loc[("first", 1), "eigenvalue"] == spectrum["first"].largest_eigenvalue
    assert len(values.loc["whole_model"]) == len(spectrum.whole.eigenvalues)
    with pytest.raises(ConfigError, match=r"to_frame\('rows'\) is unknown"):
        spectrum.to_frame("rows")


def test_a_data_set_has_named_dimensions_and_coordinates(spectrum):
    pytest.importorskip("xarray")
    found = spectrum.to_xarray()
    assert found.eigenvalue.dims == ("block", "index") and found.index.values[0] == 1
    first = found.eigenvalue.sel(block="first").dropna("index")
    assert np.array_equal(first.values, spectrum["first"].eigenvalues)
    assert float(found.trace.sel(block="whole_model")) == spectrum.whole.trace
    assert "N = 24" in found.attrs["title"]


def test_notebooks_show_every_result(run, spectrum):
    drawn = run.spectrum(PATTERNS, bootstrap=8)
    results = [spectrum["first"], drawn.bootstrap, run.growth(PATTERNS), run.alignment(PATTERNS)]
    results += [run.spectral_density("first", block_structure=PATTERNS, n_vectors=2, n_steps=5), spectrum, run]
    for result in results:
        shown = result._repr_html_()
        assert "<table" in shown and "<td>" in shown, type(result)
        assert html.unescape(re.sub(r"<[^>]*>", "", shown)).strip()
    named = run.spectrum({"first.*": "<b>", "*": "x"})
    assert "<b>" not in named["<b>"]._repr_html_().replace("<b>Block", "")


def test_comparisons_are_shown(run, tmp_path):
    other = make_run(tmp_path / "other.zarr", seed=1)
    comparison = sf.compare([run, other], PATTERNS, top=2)
    assert "union of blocks" in comparison._repr_html_()
    assert "degrees" in comparison.overlaps[0]._repr_html_()


def test_dir_shows_the_public_names_and_nothing_else():
    assert dir(sf) == sorted(sf.__all__)


def test_help_on_the_config_has_every_default_and_the_units_of_sizes():
    lines = {
        line.split(":")[0].strip(): line for line in sf.SpectralConfig.__doc__.split("Attributes:")[1].splitlines()
    }
    for name in sf.SpectralConfig.names():
        assert "(default:" in lines[name], name
    assert "in bytes, or text with a unit" in lines["memory_budget"] and "(default: no)" in lines["fsync"]
