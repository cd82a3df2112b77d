"""Intervals and growth curves: against subsets made by hand, and intervals by their coverage of known spectra."""

import dataclasses
import json

import numpy as np
import pytest
from command_line import build_parser, cli
from interval_coverage import SPECTRA, WITH_INTERVAL, coverage, grams_of
from tiny_runs import PATTERNS, make_run, rows

from streamfisher import SpectralConfig
from streamfisher.analysis.bootstrap import bootstrap, left_out, subset
from streamfisher.errors import ConfigError
from streamfisher.reports import table
from streamfisher.results import SCALAR_METRICS
from streamfisher.results.bootstrap import quantile


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("normalization", ["samples", "tokens"])
@pytest.mark.parametrize("width", [6, 90], ids=["fewer parameters than samples", "more"])
def test_every_subset_is_the_fisher_of_its_rows(center, normalization, width):
    G = np.random.default_rng(0).standard_normal((20, width)) + 0.2
    weights = np.linspace(0.5, 2, 20)
    grams = grams_of(G, center, weights, normalization=normalization)
    found = bootstrap(grams, grams.spectrum(), 5, seed=3).global_.values
    for r in range(5):
        drawn = subset(20, 3, r)
        assert len(set(drawn)) == 18 == 20 - left_out(20)
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


@pytest.mark.parametrize("name", SPECTRA)
def test_intervals_of_95_percent_cover_at_least_90(name):
    shares = coverage(SPECTRA[name], n=64, repeats=100, resamples=30)
    short = {metric: share for metric, share in shares.items() if share < 0.9}
    assert not short, f"{name}: {short}"
    assert len(shares) == len(WITH_INTERVAL), "all but the share of 100 of 64 eigenvalues, and the true trace"


def test_an_interval_has_the_value_that_it_is_of():
    grams = grams_of(np.random.default_rng(0).standard_normal((40, 100)) / np.arange(1, 101))
    found = bootstrap(grams, grams.spectrum(), 50).global_
    assert found.interval("cumulative_variance_100") is None, "40 samples have no 100 eigenvalues"
    for metric in sorted({*WITH_INTERVAL} - {"cumulative_variance_100"}):
        interval = found.interval(metric)
        assert interval.low < found.observed[metric] <= interval.high, metric
        assert interval.low == pytest.approx(interval.low) and interval.standard_error > 0
    assert found.interval("numerical_rank") is None and found.interval("condition_number") is None
    values = grams.spectrum().global_.eigenvalues
    known = found.eigenvalue_low > 0
    assert known[:35].all() and not known[35:].any(), "a subset has 35 eigenvalues"
    assert (found.eigenvalue_low[known] < values[known]).all() and (values[known] < found.eigenvalue_high[known]).all()


@pytest.mark.parametrize(("freedom", "expected"), [(5, 2.571), (10, 2.228), (30, 2.042), (10**6, 1.960)])
def test_quantiles_are_those_of_student(freedom, expected):
    assert quantile(0.95, freedom) == pytest.approx(expected, rel=5e-3)


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
    assert "95 % intervals at this N, from 20 subsets that lack 3 samples" in capsys.readouterr().out
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


def test_the_option_is_called_intervals_and_its_old_name_still_works(tmp_path, capsys):
    run = make_run(tmp_path / "run.zarr")
    found = []
    for name in ("--intervals", "--bootstrap"):
        assert cli("spectrum", run.path, name, 5, "--json", "--quiet") == 0
        printed = capsys.readouterr()
        found.append(json.loads(printed.out))
        assert ("--bootstrap is called --intervals" in printed.err) == (name == "--bootstrap")
    assert found[0] == found[1] and "intervals" in found[0]["global"]
    with pytest.raises(SystemExit):
        build_parser().parse_args(["spectrum", "--help"])
    shown = capsys.readouterr().out
    assert "--intervals R" in shown


@pytest.mark.parametrize(("spread", "warned"), [(0.1, False), (0.8, True)])
def test_norms_with_a_heavy_tail_are_warned_of(tmp_path, spread, warned, monkeypatch):
    run = make_run(tmp_path / "run.zarr", 32)
    run.build_grams()
    squares = np.exp(2 * spread * np.random.default_rng(0).standard_normal((32, 1))) / 4
    original = run.store.samples.per_sample
    monkeypatch.setattr(
        run.store.samples, "per_sample", lambda name: squares if name == "squared_norm" else original(name)
    )
    spectrum = run.spectrum(bootstrap=5)
    assert spectrum.bootstrap.norm_spread == pytest.approx(np.log(squares).std() / 2)
    assert ("heavy tail" in table(spectrum)) == warned
