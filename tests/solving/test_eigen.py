"""The eigensolver is exact, scale-free, and fails in the open."""

import numpy as np
import pytest
import torch

from streamfisher.errors import CorruptRunError
from streamfisher.solving import eigen


def gram(n=20, p=50, scale=1.0):
    rows = scale * np.random.default_rng(1).standard_normal((n, p))
    return rows @ rows.T, np.linalg.svd(rows, compute_uv=False) ** 2


def test_eigenvalues_descend_and_match_the_singular_values():
    K, expected = gram()
    np.testing.assert_allclose(eigen.solve(K).values, expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-120, 1e-30, 1e30, 1e120])
def test_scale_does_not_matter(scale):
    K, expected = gram(scale=scale)
    np.testing.assert_allclose(eigen.solve(K).values, expected, rtol=1e-11)


def test_a_zero_matrix_has_a_zero_spectrum():
    assert np.array_equal(eigen.solve(np.zeros((4, 4))).values, np.zeros(4))


def test_rank_deficiency_gives_no_negative_eigenvalues():
    K, _ = gram(n=20, p=3)
    values = eigen.solve(K).values
    assert (values >= 0).all()
    assert (values[3:] < 1e-12 * values[0]).all()


def test_a_matrix_that_is_no_gram_is_refused():
    with pytest.raises(CorruptRunError, match="not the Gram of any gradients"):
        eigen.solve(np.diag([1.0, -0.5]))


def test_a_negative_definite_matrix_is_refused():
    with pytest.raises(CorruptRunError, match="not the Gram of any gradients"):
        eigen.solve(np.diag([-1.0, -0.5]))


def test_negative_rounding_counts_against_what_the_matrix_was_made_from():
    K = np.diag([1e-9, -2e-9, -1e-9])
    assert np.array_equal(eigen.solve(K, size=1.0).values, [1e-9, 0.0, 0.0])
    with pytest.raises(CorruptRunError, match=r"-2\.0e-03 times the trace of what it was made from"):
        eigen.solve(K, size=1e-6)


def test_nan_is_refused():
    with pytest.raises(CorruptRunError, match="NaN"):
        eigen.solve(np.full((2, 2), np.nan))


def test_regularization_is_used_only_when_the_solver_fails_and_then_said(monkeypatch):
    K, expected = gram()
    assert eigen.solve(K, regularization=0.1).jitter == 0.0
    drive = eigen._drive
    calls = []

    def fail_without_jitter(driver, matrix):
        calls.append(driver)
        if len(calls) <= 2:
            raise np.linalg.LinAlgError("did not converge")
        return drive(driver, matrix)

    monkeypatch.setattr(eigen, "_drive", fail_without_jitter)
    solved = eigen.solve(K, regularization=1e-6)
    assert calls == ["lapack-syevd", "torch-cpu", "lapack-syevd"]
    assert solved.solver == "lapack-syevd+jitter"
    assert solved.jitter == 1e-6
    np.testing.assert_allclose(solved.values, expected, rtol=1e-9)


def test_when_every_solver_fails_nothing_is_made_up(monkeypatch):
    def fail(driver, matrix):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(eigen, "_drive", fail)
    with pytest.raises(CorruptRunError, match="no eigensolver succeeded"):
        eigen.solve(gram()[0])


def test_float32_solve_is_close():
    K, expected = gram()
    np.testing.assert_allclose(eigen.solve(K, dtype=torch.float32).values, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("failing", "solver"),
    [(1, "torch-cpu"), (2, "lapack-syevd+jitter")],
)
def test_a_spectrum_says_which_solver_gave_it_when_others_failed(failing, solver, monkeypatch):
    from streamfisher import FisherSpectral, SpectralConfig

    rows = np.random.default_rng(2).standard_normal((6, 9))
    gradients = [{"a": torch.tensor(row)} for row in rows]

    def solve():
        fisher = FisherSpectral(SpectralConfig(n_workers=1))
        return fisher.compute_fisher_spectrum(None, None, block_structure="none", precomputed_gradients=gradients)

    expected, drive, calls = solve()["global"], eigen._drive, []

    def fail_first(driver, matrix):
        calls.append(driver)
        if len(calls) <= failing:
            raise np.linalg.LinAlgError("did not converge")
        return drive(driver, matrix)

    monkeypatch.setattr(eigen, "_drive", fail_first)
    found = solve()["global"]
    assert found["solver"] == solver and expected["solver"] == "lapack-syevd"
    assert (found["jitter"] > 0) == ("jitter" in solver)
    np.testing.assert_allclose(found["eigenvalues"], expected["eigenvalues"], rtol=1e-6)
    assert min(found["eigenvalues"]) > 0
