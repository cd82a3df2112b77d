"""Block Lanczos finds the leading eigenvalues of any spectrum, bounds their error, and fails in the open."""

import numpy as np
import pytest
import torch

from streamfisher import SpectralConfig
from streamfisher.errors import ConvergenceError, CorruptRunError
from streamfisher.solving import DenseOperator, block_spectrum, blocksolver, lanczos, leading

N = 300
SPECTRA = {
    "power law": np.arange(1, N + 1) ** -1.0,
    "slow power law": np.arange(1, N + 1) ** -0.3,
    "outliers over a bulk": np.r_[np.logspace(4, 1, 7), np.linspace(1.1, 1.0, N - 7)],
    "thirty times the same": np.r_[np.full(30, 2.0), np.full(N - 30, 1e-3)],
    "all the same": np.ones(N),
    "rank 5": np.r_[np.logspace(0, -6, 5), np.zeros(N - 5)],
    "zero": np.zeros(N),
}


def matrix(eigenvalues, seed=0):
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))
    K = (Q * eigenvalues) @ Q.T
    return (K + K.T) / 2


@pytest.mark.parametrize("k", [1, 20])
@pytest.mark.parametrize("name", SPECTRA)
def test_leading_eigenvalues_are_those_of_the_dense_solver(name, k):
    K = matrix(SPECTRA[name])
    exact = np.linalg.eigvalsh(K)[::-1][:k]
    found = leading(DenseOperator(K), k)
    scale = max(exact[0], 1e-300)
    np.testing.assert_allclose(found.values, np.maximum(exact, 0), rtol=0, atol=2e-14 * scale)
    assert found.residuals.max() <= 1e-10 * scale
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(k), atol=1e-13)


def test_residuals_are_those_of_the_pairs_and_bound_the_error():
    K = matrix(SPECTRA["slow power law"])
    found = leading(DenseOperator(K), 10, tolerance=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(K @ found.vectors - found.vectors * found.values, axis=0), found.residuals, rtol=1e-6, atol=1e-14
    )
    exact = np.linalg.eigvalsh(K)
    nearest = np.abs(exact[None, :] - found.values[:, None]).min(axis=1)
    assert (nearest <= found.residuals + 1e-14).all()


def test_a_direction_that_the_start_does_not_have_is_found(monkeypatch):
    K = np.diag(np.r_[np.linspace(1.0, 2.0, N - 1), 3.0])
    random, calls = np.random.Generator.standard_normal, []

    class BlindAtFirst(np.random.Generator):
        def standard_normal(self, *args, **options):
            values = random(self, *args, **options)
            if not calls:
                values[-1] = 0.0  # the start is orthogonal to the leading eigenvector
            calls.append(1)
            return values

    monkeypatch.setattr(np.random, "Generator", BlindAtFirst)
    assert leading(DenseOperator(K), 3).values[0] == pytest.approx(3.0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_scale_does_not_matter(scale):
    K = matrix(SPECTRA["power law"])
    exact = scale * np.linalg.eigvalsh(K)[::-1][:5]
    np.testing.assert_allclose(leading(DenseOperator(scale * K), 5).values, exact, rtol=1e-12)


def test_the_same_seed_gives_the_same_bits():
    K = matrix(SPECTRA["power law"])
    first, again = (leading(DenseOperator(K), 5, seed=3) for _ in range(2))
    assert np.array_equal(first.values, again.values) and np.array_equal(first.vectors, again.vectors)


def test_too_few_steps_say_how_far_it_came():
    with pytest.raises(
        ConvergenceError, match=r"10 leading eigenvalues of a 300 x 300 matrix did not converge in 2 .*"
    ):
        leading(DenseOperator(matrix(SPECTRA["slow power law"])), 10, max_steps=2)


def test_a_product_that_is_not_finite_is_refused():
    with pytest.raises(ConvergenceError, match="a product with the matrix is not finite"):
        leading(DenseOperator(np.full((50, 50), np.nan)), 3)


def test_an_operator_that_does_not_repeat_itself_is_refused():
    class Drifting(DenseOperator):
        calls = 0

        def matvec(self, X):
            self.calls += 1
            return (1 + 1e-3 * self.calls) * (self.K @ X)

    K = matrix(SPECTRA["rank 5"])
    with pytest.raises(ConvergenceError, match=r"does not repeat its products|did not converge"):
        leading(Drifting(K), 5, max_steps=30)


def solve(K, n_params=1000, top_k=None, **options):
    config = SpectralConfig(**options)
    return block_spectrum("b", K, n_params, config, product=torch.float64, roundoff=0.0, top_k=top_k)


def test_an_iterative_block_is_marked_as_truncated_and_carries_residuals():
    K = N * matrix(SPECTRA["power law"])
    whole, cut = solve(K), solve(K, top_k=7, solver="iterative")
    np.testing.assert_allclose(cut.eigenvalues, whole.eigenvalues[:7], rtol=1e-12)
    assert cut.truncated and cut.solver == "block-lanczos" and cut.residuals.shape == (7,)
    assert cut.trace == whole.trace and cut.norm == whole.norm
    metrics = cut.metrics
    assert [metrics[name] for name in ("condition_number", "effective_rank", "numerical_rank")] == [None] * 3
    assert metrics["largest_residual"] < 1e-10
    assert "largest_residual" not in whole.metrics


def test_the_iterative_solver_lists_as_many_as_the_metrics_do_unless_told():
    assert len(solve(matrix(SPECTRA["power law"]), solver="iterative", top_k_eigenvalues=9).eigenvalues) == 9


def test_auto_is_dense_where_all_are_asked_for_and_iterative_where_few_of_many_are(monkeypatch):
    monkeypatch.setattr(blocksolver, "_ITERATIVE_SIZE", 200)
    K = matrix(SPECTRA["power law"])
    assert solve(K).solver == "lapack-syevd"
    assert solve(K, top_k=5).solver == "block-lanczos"
    assert solve(K, top_k=5, solver="dense").solver == "lapack-syevd"
    assert solve(K, top_k=200).solver == "lapack-syevd"


def test_a_solver_that_does_not_converge_falls_back_to_all_eigenvalues_and_says_so(monkeypatch):
    monkeypatch.setattr(lanczos, "leading", lambda *_, **__: (_ for _ in ()).throw(ConvergenceError("it did not.")))
    K = matrix(SPECTRA["power law"])
    with pytest.warns(UserWarning, match=r"block b: it did not. All eigenvalues are solved for instead"):
        found = solve(K, top_k=5, solver="iterative")
    assert found.solver == "lapack-syevd (block-lanczos did not converge)" and found.residuals is None
    np.testing.assert_allclose(found.eigenvalues, solve(K).eigenvalues[:5])


def test_nan_is_refused():
    with pytest.raises(CorruptRunError, match="NaN"):
        solve(np.full((50, 50), np.nan), top_k=3, solver="iterative")
