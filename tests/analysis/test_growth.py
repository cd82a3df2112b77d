"""Growth curves: each size is the spectrum of its subset, however its Grams are read."""

import numpy as np
import pytest
from tiny_runs import make_run

import streamfisher as sf
from streamfisher.analysis import subset_sums
from streamfisher.demo import demo_samples, load_demo_model
from streamfisher.reports import layer_maps


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("growth") / "run.zarr", 64)


def subset(size, n=64):
    return np.sort(np.random.Generator(np.random.PCG64(42)).permutation(n)[:size])


@pytest.mark.parametrize("structure", ["parameter", "none", {"first.*": "first", "*": "rest"}], ids=str)
@pytest.mark.parametrize("center", [False, True])
def test_every_size_is_the_spectrum_of_its_samples(run, structure, center):
    growth = run.growth(structure, center)
    assert growth.sizes == (8, 16, 32, 64)
    for size, found in zip(growth.sizes, growth.spectra, strict=True):
        expected = run.spectrum(structure, center, samples=subset(size))
        for key, block in expected.blocks.items():
            top = block.eigenvalues[0]
            np.testing.assert_allclose(
                found[key].eigenvalues[: len(block.eigenvalues)], block.eigenvalues, atol=1e-12 * top
            )
            assert found[key].trace == pytest.approx(block.trace)
        assert found.whole.effective_rank == pytest.approx(expected.whole.effective_rank)


def test_sums_that_do_not_fit_the_memory_are_done_without(run, monkeypatch):
    with_sums = run.growth("parameter").to_dict()
    monkeypatch.setattr(subset_sums.SubsetSums, "fit", staticmethod(lambda grams: False))
    without = run.growth("parameter").to_dict()
    for metric in ("trace", "largest_eigenvalue", "effective_rank"):
        np.testing.assert_allclose(
            without["curves"]["global"][metric], with_sums["curves"]["global"][metric], rtol=1e-9
        )


def test_a_report_of_many_samples_reads_each_gram_once_for_maps_alignment_and_growth(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(layer_maps, "_MOST_SOLVED", 10)
    config = sf.SpectralConfig(include=["layers.0.*", "norm.*"])
    opened = sf.collect(load_demo_model(), demo_samples(32, 16), tmp_path / "run.zarr", config=config)
    spectrum = opened.spectrum("layer")
    small = sf.reports.html_report(opened, [spectrum], tmp_path / "solved.html").verdict
    reads = []
    store = type(opened.store.grams)
    original = store.read
    monkeypatch.setattr(store, "read", lambda self, key: reads.append(key) or original(self, key))
    page = sf.reports.html_report(opened, [spectrum], tmp_path / "page.html")
    assert page.verdict == small
    assert sorted(reads) == sorted([*opened.parameters] * 2)  # the map of samples reads them once more
