"""The bootstrap and growth curves against resamples and subsets made by hand."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from command_line import cli
from tiny_runs import PATTERNS, make_run, rows

from streamfisher import SpectralConfig
from streamfisher.analysis import BlockGrams
from streamfisher.analysis.bootstrap import bootstrap, multiplicities
from streamfisher.errors import ConfigError
from streamfisher.results import SCALAR_METRICS
from streamfisher.solving import RowPrecision, select


def grams_of(G, center=False, weights=None, **options):
    return BlockGrams(
        gram_of=lambda name: G @ G.T,
        parameters={"w": G.shape[1]},
        assignment={"w": "global"},
        selection=select(len(G), np.ones(len(G), bool), weights=weights, n_targets=np.arange(len(G)) + 1, **options),
        center=center,
        config=SpectralConfig(n_workers=1),
        precision=RowPrecision(torch.float64, 2.0**-53),
        metadata={},
    )


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("normalization", ["samples", "tokens"])
@pytest.mark.parametrize("width", [6, 90], ids=["fewer parameters than samples", "more"])
def test_every_resample_is_the_fisher_of_the_drawn_rows(center, normalization, width):
    G = np.random.default_rng(0).standard_normal((20, width)) + 0.2
    weights = np.linspace(0.5, 2, 20)
    grams = grams_of(G, center, weights, normalization=normalization)
    found = bootstrap(grams, grams.spectrum(), 5, seed=3).global_.values
    for r in range(5):
        drawn = np.repeat(np.arange(20), multiplicities(20, 3, r))
        assert len(drawn) == 20
        sample, w = G[drawn], weights[drawn]
        sample = sample - (w @ sample) / w.sum() if center else sample
        Z = w.sum() if normalization == "samples" else w @ (drawn + 1)
        values = np.linalg.eigvalsh((sample * w[:, None]).T @ sample / Z)[::-1]
        assert found["trace"][r] == pytest.approx(values.sum())
        assert found["largest_eigenvalue"][r] == pytest.approx(values[0])
        assert found["participation_ratio"][r] == pytest.approx(values.sum() ** 2 / (values**2).sum())
        p = values[values > 1e-12 * values[0]] / values.sum()
        assert found["effective_rank"][r] == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def test_workers_change_no_bit_and_seeds_do():
    G = np.random.default_rng(0).standard_normal((20, 30))
    grams = grams_of(G)
    spectrum = grams.spectrum()
    two = dataclasses.replace(grams, config=SpectralConfig(n_workers=2))
    first, same, other = (
        bootstrap(grams, spectrum, 40),
        bootstrap(two, spectrum, 40),
        bootstrap(grams, spectrum, 40, seed=1),
    )
    assert first.global_.to_dict() == same.global_.to_dict()
    assert first.global_.to_dict() != other.global_.to_dict()


def test_intervals_cover_the_true_trace_and_largest_eigenvalue():
    generator = np.random.default_rng(4)
    scales = np.array([3.0, 1.0, 0.5])
    inside = {"trace": 0, "largest_eigenvalue": 0}
    truth = {"trace": (scales**2).sum(), "largest_eigenvalue": 9.0}
    for repeat in range(60):
        grams = grams_of(generator.standard_normal((80, 3)) * scales)
        found = bootstrap(grams, grams.spectrum(), 100, seed=repeat, level=0.9).global_
        for metric, value in truth.items():
            interval = found.interval(metric)
            inside[metric] += interval.low <= value <= interval.high
    for metric, count in inside.items():
        assert 45 <= count <= 60, f"{metric}: {count} of 60 at a level of 0.9"


def test_metrics_without_a_solve_are_the_same():
    G = np.random.default_rng(0).standard_normal((20, 30))
    grams = grams_of(G, center=True)
    spectrum = grams.spectrum()
    cheap = bootstrap(grams, spectrum, 20, metrics=["trace", "participation_ratio"]).global_
    full = bootstrap(grams, spectrum, 20).global_
    for metric in cheap.values:
        np.testing.assert_allclose(cheap.values[metric], full.values[metric], rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_resamples": 1}, "too few"),
        ({"level": 1.5}, "between 0 and 1"),
        ({"metrics": ["traces"]}, "'traces' is no metric"),
    ],
)
def test_what_cannot_be_resampled_is_refused(options, message):
    grams = grams_of(np.eye(4))
    with pytest.raises(ConfigError, match=message):
        bootstrap(grams, grams.spectrum(), **options)


def test_a_run_has_intervals_for_every_block_and_the_union(tmp_path, capsys):
    run = make_run(tmp_path / "run.zarr")
    spectrum = run.spectrum(PATTERNS, bootstrap=30)
    found = spectrum.to_dict()
    assert set(found["per_block"]) == {"first", "second"}
    for block in (found["global"], *found["per_block"].values()):
        assert set(block["intervals"]) == set(SCALAR_METRICS)
        interval = block["intervals"]["trace"]
        assert interval["low"] < block["trace"] < interval["high"]
    assert found["metadata"]["bootstrap"]["n_resamples"] == 30
    json.dumps(found, allow_nan=False)
    assert cli("spectrum", run.path, "--bootstrap", 20, "--quiet") == 0
    assert "95 % intervals from 20 bootstrap resamples" in capsys.readouterr().out
    assert cli("report", run.path, "--bootstrap", 20, "--quiet", "--out", tmp_path / "picture.png") == 0


def test_growth_is_that_of_nested_subsets(tmp_path):
    run = make_run(tmp_path / "run.zarr")
    growth = run.growth("none", False, sizes=[6, 12, 24], seed=5)
    order = np.random.Generator(np.random.PCG64(5)).permutation(24)
    G = rows(run)
    for size, trace in zip(growth.sizes, growth.curve("trace"), strict=True):
        assert trace == pytest.approx((G[order[:size]] ** 2).sum() / size)
    assert run.growth("none").sizes == (12, 24)
    with pytest.raises(ConfigError, match="between 2 and the 24"):
        run.growth("none", sizes=[30])
    json.dumps(growth.to_dict(), allow_nan=False)
