"""What must hold for any gradients whatever: properties of matrices that hypothesis draws, and numbers under stress."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streamfisher import FisherSpectral, SpectralConfig
from streamfisher.errors import CorruptRunError, DataError

entries = st.floats(-100, 100, allow_nan=False, width=32).map(lambda value: round(value, 3))
matrices = st.tuples(st.integers(2, 7), st.integers(1, 9)).flatmap(
    lambda shape: hnp.arrays(np.float64, shape, elements=entries)
)
quick = settings(max_examples=25, deadline=None)


def spectrum(G, block_structure="none", center=False, dtype=torch.float64, split=None, **options):
    """Return the results for rows G, as two parameters where there is more than one column."""
    split = G.shape[1] // 2 if split is None else split
    parts = {"a": G[:, :split], "b": G[:, split:]}
    gradients = [{name: torch.tensor(part[i], dtype=dtype) for name, part in parts.items()} for i in range(len(G))]
    config = SpectralConfig(n_workers=1, **options)
    return FisherSpectral(config).compute_fisher_spectrum(
        None, None, block_structure=block_structure, center_gradients=center, precomputed_gradients=gradients
    )


def values(results):
    return np.array(results["global"]["eigenvalues"])


@quick
@given(matrices)
def test_eigenvalues_are_not_negative_and_sum_to_the_trace(G):
    results = spectrum(G)
    assert (values(results) >= 0).all()
    np.testing.assert_allclose(values(results).sum(), results["global"]["trace"], rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(results["global"]["trace"], (G**2).sum() / len(G), rtol=1e-10, atol=1e-300)


@quick
@given(matrices, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(G, random):
    order = list(range(len(G)))
    random.shuffle(order)
    scale = (G**2).sum() + 1e-300
    np.testing.assert_allclose(values(spectrum(G[order])), values(spectrum(G)), atol=1e-12 * scale)


@quick
@given(matrices, st.integers(0, 9))
def test_how_the_columns_are_grouped_does_not_matter_to_the_whole(G, split):
    scale = (G**2).sum() + 1e-300
    np.testing.assert_allclose(
        values(spectrum(G, split=min(split, G.shape[1]))), values(spectrum(G)), atol=1e-12 * scale
    )


@quick
@given(matrices)
def test_the_union_of_parameter_blocks_has_the_trace_of_the_whole(G):
    np.testing.assert_allclose(
        spectrum(G, "parameter")["global"]["trace"], spectrum(G)["global"]["trace"], rtol=1e-12, atol=1e-300
    )


@quick
@given(matrices, st.sampled_from([1e-3, 0.5, 7.0, 1e4]))
def test_scaling_the_loss_by_c_scales_the_spectrum_by_c_squared(G, c):
    scale = c**2 * (G**2).sum() + 1e-300
    np.testing.assert_allclose(values(spectrum(c * G)), c**2 * values(spectrum(G)), atol=1e-12 * scale)


@quick
@given(matrices)
def test_centering_lowers_the_trace_by_the_squared_mean_gradient(G):
    difference = spectrum(G)["global"]["trace"] - spectrum(G, center=True)["global"]["trace"]
    np.testing.assert_allclose(difference, (G.mean(axis=0) ** 2).sum(), atol=1e-11 * ((G**2).sum() + 1e-300))


@quick
@given(matrices)
def test_duplicating_every_sample_changes_no_eigenvalue_and_adds_zeros(G):
    twice, once = values(spectrum(np.concatenate([G, G]))), values(spectrum(G))
    scale = (G**2).sum() + 1e-300
    np.testing.assert_allclose(twice[: len(once)], once, atol=1e-12 * scale)
    assert (twice[len(once) :] <= 1e-12 * scale).all()


@pytest.fixture
def G():
    return np.random.default_rng(5).standard_normal((8, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_extreme_scales_keep_every_eigenvalue(G, scale, dtype):
    found = spectrum(scale * G, dtype=dtype)
    expected = np.linalg.svd(G, compute_uv=False) ** 2 / 8
    np.testing.assert_allclose(values(found) / scale**2, expected, rtol=1e-5 if dtype == torch.float32 else 1e-10)
    assert found["global"]["numerical_rank"] == 8


def test_one_sample_a_million_times_larger_leaves_the_others_to_the_floor(G):
    G[3] *= 1e6
    found = spectrum(G)
    np.testing.assert_allclose(values(found)[0], (G[3] ** 2).sum() / 8, rtol=1e-9)
    assert found["global"]["numerical_rank"] >= 1
    assert (values(found) >= 0).all()


def test_rank_one_gradients_have_rank_one():
    G = np.outer(np.arange(1.0, 7.0), np.random.default_rng(0).standard_normal(40))
    for dtype in (torch.float32, torch.float64):
        found = spectrum(G, dtype=dtype)["global"]
        assert found["numerical_rank"] == 1
        assert found["condition_number"] == 1.0
        assert found["effective_rank"] == pytest.approx(1.0)


def test_a_constant_loss_has_a_zero_spectrum():
    found = spectrum(np.zeros((5, 6)))["global"]
    assert found["trace"] == 0 and found["numerical_rank"] == 0 and found["condition_number"] is None
    assert found["gd_convergence_scale"] is None


@pytest.mark.parametrize(("n", "p"), [(2, 1), (2, 5), (9, 1)])
def test_the_smallest_cases(n, p):
    G = np.random.default_rng(1).standard_normal((n, p))
    expected = np.linalg.svd(G, compute_uv=False) ** 2 / n
    np.testing.assert_allclose(values(spectrum(G)), expected, rtol=1e-12)


def test_gradients_that_are_not_finite_are_refused(G):
    G[2, 4] = np.inf
    with pytest.raises(DataError, match="gradient 2 is not finite"):
        spectrum(G)


def test_gradients_whose_squares_leave_float64_are_refused_not_turned_into_nan(G):
    with pytest.raises(CorruptRunError, match="too large for float64 products"), np.errstate(over="ignore"):
        spectrum(1e200 * G)
