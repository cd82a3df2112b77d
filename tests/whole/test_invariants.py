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
    assert found["trace"] == 0 and found["numerical_rank"] == 0 and found["condition_number"] == np.inf
    assert found["gd_convergence_scale"] == np.inf


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


def test_a_block_of_zeros_is_named_and_leaves_the_other_as_it_is(G):
    G[:, :10] = 0.0
    found = spectrum(G, "parameter", split=10)
    assert found["metadata"]["parameters_without_gradient"] == ["a"] and list(found["per_block"]) == ["b"]
    other = found["per_block"]["b"]
    assert other["numerical_rank"] == 8
    np.testing.assert_allclose(found["global"]["trace"], other["trace"], rtol=1e-12)


def test_logistic_regression_has_its_closed_form():
    generator = torch.Generator().manual_seed(4)
    X = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    y = (torch.rand(12, generator=generator) > 0.5).double()
    model = torch.nn.Linear(5, 1, bias=False).double()

    def loss(module, batch):
        logits = module(batch["x"])[:, 0]
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none")

    import tempfile

    from streamfisher import collect

    with tempfile.TemporaryDirectory() as folder:
        run = collect(
            model, {"x": X, "labels": y}, f"{folder}/run.zarr", loss=loss, config=SpectralConfig(chunk_size=5)
        )
        found = run.spectrum("none").global_.eigenvalues
    p = torch.sigmoid(X @ model.weight.detach()[0])
    F = (X.T * (p - y) ** 2) @ X / 12  # X^T diag((p - y)^2) X / N
    np.testing.assert_allclose(found[:5], np.linalg.eigvalsh(F.numpy())[::-1], rtol=1e-10)


@pytest.mark.parametrize("batch_tokens", [1, 3, 4096])
def test_the_batch_size_changes_no_eigenvalue(batch_tokens, tmp_path):
    from tiny_runs import make_run

    one = make_run(tmp_path / "one.zarr", batch_tokens=7).spectrum("none").global_.eigenvalues
    other = make_run(tmp_path / "other.zarr", batch_tokens=batch_tokens).spectrum("none").global_.eigenvalues
    np.testing.assert_allclose(other, one, rtol=1e-11, atol=1e-12 * one[0])


def test_gradients_that_leave_float16_are_refused_or_skipped_never_infinite(tmp_path):
    import tiny_models

    from streamfisher import collect
    from streamfisher.errors import NonFiniteError, StreamfisherError

    data = tiny_models.vectors()
    data["labels"][3] = 1e5  # float16 ends at 65504
    config = SpectralConfig(chunk_size=4, dtype_model="float16")
    with pytest.raises(StreamfisherError, match="sample 3") as caught:
        collect(tiny_models.regression(), data, tmp_path / "a.zarr", config=config)
    assert isinstance(caught.value, NonFiniteError)
    run = collect(tiny_models.regression(), data, tmp_path / "b.zarr", config=config.replace(on_nonfinite="skip"))
    found = run.spectrum("none").global_
    assert set(run.store.samples.skipped()) == {3} and len(found.eigenvalues) == 7
    assert np.isfinite(found.eigenvalues).all() and (found.eigenvalues >= 0).all()
