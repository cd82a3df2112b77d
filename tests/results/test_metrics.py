"""Every metric against its definition on spectra whose values are known."""

import numpy as np
import pytest
import torch

from streamfisher.config import SpectralConfig
from streamfisher.results import metrics
from streamfisher.solving import Eigenproblem, RowPrecision, solve_blocks


def block_of(G, top_k=None):
    problem = Eigenproblem(
        {"w": G.shape[1]},
        {"w": "global"},
        SpectralConfig(),
        center=False,
        precision=RowPrecision(torch.float64, 2.0**-53),
        metadata={},
        top_k=top_k,
    )
    return solve_blocks(lambda name: G @ G.T, problem).global_


def test_every_rank_of_equal_eigenvalues_is_their_number():
    values = np.full(7, 0.3)
    assert metrics.effective_rank(values) == pytest.approx(7)
    assert metrics.stable_rank(values.sum(), values[0]) == pytest.approx(7)
    assert metrics.participation_ratio(values.sum(), np.linalg.norm(values)) == pytest.approx(7)


def test_metrics_of_a_block_are_those_of_the_dense_fisher():
    G = np.random.default_rng(0).standard_normal((30, 90)) * np.arange(1, 91) ** -0.7
    values = np.linalg.eigvalsh(G.T @ G / 30)[::-1][:30]
    found = block_of(G).metrics
    assert found["stable_rank"] == pytest.approx(values.sum() / values[0])
    assert found["participation_ratio"] == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert found["cumulative_variance_1"] == pytest.approx(values[0] / values.sum())
    assert found["cumulative_variance_10"] == pytest.approx(values[:10].sum() / values.sum())
    assert found["cumulative_variance_100"] == pytest.approx(1)
    assert set(metrics.SCALAR_METRICS) <= set(found)


def test_power_law_is_found_exactly_with_its_range():
    fit = metrics.power_law(3.0 * np.arange(1, 201) ** -1.3)
    assert fit.exponent == pytest.approx(1.3, rel=1e-12)
    assert fit.stderr < 1e-12
    assert (fit.first, fit.last) == (20, 100)
    assert fit.r_squared == pytest.approx(1)


def test_standard_error_is_that_of_least_squares():
    generator = np.random.default_rng(1)
    values = np.sort(np.arange(1, 101) ** -1.0 * np.exp(0.1 * generator.standard_normal(100)))[::-1]
    fit = metrics.power_law(values, 5, 60)
    (slope, _), covariance = np.polyfit(np.log(np.arange(5, 61)), np.log(values[4:60]), 1, cov="unscaled")
    x, y = np.log(np.arange(5, 61)), np.log(values[4:60])
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    assert fit.exponent == pytest.approx(-slope)
    assert fit.stderr == pytest.approx(np.sqrt(covariance[0, 0] * (residual @ residual) / (len(x) - 2)))


def test_a_short_spectrum_has_no_power_law():
    assert metrics.power_law(np.arange(10, 0, -1.0)) is None


def test_a_truncated_list_keeps_what_is_exact_and_drops_the_rest():
    G = np.random.default_rng(0).standard_normal((30, 90))
    whole, cut = block_of(G).metrics, block_of(G, top_k=10).metrics
    for name in ("trace", "stable_rank", "participation_ratio", "cumulative_variance_10"):
        assert cut[name] == whole[name]
    assert cut["cumulative_variance_100"] is None
    assert cut["power_law_exponent"] is None


@pytest.mark.parametrize("scale", [0.0, 1e-90, 1e70])
def test_extreme_scales_have_the_same_shape(scale):
    G = np.random.default_rng(0).standard_normal((12, 20))
    found, expected = block_of(scale * G).metrics, block_of(G).metrics
    if scale == 0:
        assert found["participation_ratio"] == found["stable_rank"] == 0
        assert found["cumulative_variance_1"] is None
    else:
        assert found["participation_ratio"] == pytest.approx(expected["participation_ratio"])
