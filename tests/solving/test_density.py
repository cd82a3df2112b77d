"""The spectral density agrees with the eigenvalues of the dense solver within its own error, and counts them all."""

import json

import numpy as np
import pytest
import tiny_runs
from command_line import main

from streamfisher.errors import ConfigError, CorruptRunError
from streamfisher.solving import DenseOperator, quadrature, spectral_density, tiled_gram

N = 400


def matrix(eigenvalues, seed=0):
    Q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))
    K = (Q * eigenvalues) @ Q.T
    return (K + K.T) / 2


POWER_LAW = np.arange(1, N + 1) ** -1.5


def smoothed(values, grid, sigma):
    return sum(np.exp(-0.5 * ((grid - value) / sigma) ** 2) for value in values) / (sigma * (2 * np.pi) ** 0.5)


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_the_density_is_that_of_the_eigenvalues_within_its_error(scale):
    found = spectral_density(
        DenseOperator(N * matrix(POWER_LAW)),
        block="b",
        n_vectors=40,
        n_steps=120,
        sigma=0.2 if scale == "log" else 0.02,
        scale=scale,
    )
    exact = smoothed(np.log10(POWER_LAW) if scale == "log" else POWER_LAW, found.grid, found.sigma)
    error = np.abs(found.density - exact)
    assert np.mean(error <= 3 * found.standard_error + 0.01 * exact.max()) > 0.95
    assert np.trapezoid(error, found.grid) < 0.1 * N


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_the_density_integrates_to_the_number_of_eigenvalues(scale):
    K = N * matrix(np.r_[POWER_LAW[: N - 50], np.zeros(50)])
    found = spectral_density(DenseOperator(K), block="b", scale=scale, zeros=50)
    assert found.n_eigenvalues == N - 50
    np.testing.assert_allclose(found.integral + found.below, N - 50, rtol=1e-10)
    np.testing.assert_allclose(found.counts.sum() + found.below, N - 50, rtol=1e-10)


def test_with_as_many_steps_as_eigenvalues_each_quadrature_is_exact():
    values = np.linspace(1, 2, 6)
    K = matrix(values)
    (nodes, weights), _ = quadrature(DenseOperator(K), 3, 6, seed=0)
    np.testing.assert_allclose(np.sort(nodes, axis=1), np.tile(values, (3, 1)), rtol=1e-10)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)


def test_quadrature_has_the_moments_of_each_vector():
    K = matrix(POWER_LAW)
    rules = quadrature(DenseOperator(K), 4, 10, seed=7)
    V = np.random.Generator(np.random.PCG64(7)).standard_normal((N, 4))
    V /= np.linalg.norm(V, axis=0)
    for (nodes, weights), powers in zip(rules, (range(1, 20), range(1, 10)), strict=True):  # 10 steps, and 5
        for power in powers:
            exact = np.einsum("nr,nr->r", V, np.linalg.matrix_power(K, power) @ V)
            np.testing.assert_allclose((weights * nodes**power).sum(axis=1), exact, rtol=1e-9)


def test_too_few_steps_show_in_the_quadrature_error():
    K = N * matrix(POWER_LAW)
    exact = np.histogram(POWER_LAW, 10.0 ** np.arange(-4, 2))[0]
    few, many = (spectral_density(DenseOperator(K), block="b", n_vectors=20, n_steps=m) for m in (12, 200))
    for found in (few, many):
        places = np.searchsorted(10.0 ** np.arange(-4, 2), found.edges[:-1] * 1.01) - 1
        error = np.abs(found.counts - exact[places])
        assert (error <= 4 * found.count_errors + 2 * found.count_quadrature_errors + 1).all()
    assert few.count_quadrature_errors.max() > 10 * many.count_quadrature_errors.max()


def test_few_distinct_eigenvalues_end_the_recurrence():
    found = spectral_density(DenseOperator(matrix(np.r_[np.ones(30), np.full(70, 2.0)])), block="b", n_vectors=50)
    np.testing.assert_allclose(found.counts.sum() + found.below, 100)
    error = found.standard_error.max()
    assert error > 0 and abs(found.integral - 100) < 1e-8


def test_a_zero_block_has_all_its_eigenvalues_below():
    found = spectral_density(DenseOperator(np.zeros((30, 30))), block="b")
    assert found.below == pytest.approx(30) and found.integral == 0.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_vectors": 1}, "1 vectors leave no error to estimate"),
        ({"n_steps": 1}, "1 Lanczos steps are too few"),
        ({"sigma": 0.0}, "sigma=0.0 is the width of a Gaussian and must be positive"),
        ({"scale": "sqrt"}, "scale='sqrt' is unknown; choose log or linear"),
    ],
)
def test_what_cannot_be_used_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        spectral_density(DenseOperator(np.eye(5)), block="b", **options)


def test_a_damaged_matrix_is_refused():
    with pytest.raises(CorruptRunError, match="not finite"):
        spectral_density(DenseOperator(np.full((5, 5), np.inf)), block="b")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_runs.make_run(tmp_path_factory.mktemp("density") / "run.zarr", 40)


def test_a_run_gives_the_density_of_a_block_on_its_smaller_side(run):
    found = run.spectral_density("second.weight", block_structure="parameter", n_vectors=4)
    assert (found.solved_side, found.n_eigenvalues, found.n_steps) == ("parameters", 10, 10)
    np.testing.assert_allclose(found.integral + found.below, 10)
    joined = run.spectral_density("second", block_structure=tiny_runs.PATTERNS, n_vectors=4)
    assert (joined.solved_side, joined.n_eigenvalues) == ("samples", 12)


def test_tiles_give_the_same_density(run, monkeypatch):
    monkeypatch.setattr(tiled_gram, "TILE", 9)
    dense = run.spectral_density("global", True, block_structure="none", n_vectors=4)
    monkeypatch.setattr("streamfisher.analysis.block_grams.fits_dense", lambda *_: False)
    tiled = run.spectral_density("global", True, block_structure="none", n_vectors=4)
    np.testing.assert_allclose(tiled.counts, dense.counts, atol=1e-6)


def test_an_unknown_block_is_named(run):
    with pytest.raises(ConfigError, match="there is no block 'layer_9'; the blocks are first, second"):
        run.spectral_density("layer_9", block_structure=tiny_runs.PATTERNS)


def test_the_command_prints_counts_and_writes_the_density(run, tmp_path, capsys):
    out = tmp_path / "density.json"
    command = ["density", str(run.path), "--blocks", "none", "--block", "global", "--vectors", "4", "--out", str(out)]
    assert main([*command, "--quiet"]) == 0
    assert "32 eigenvalues of global, 4 vectors, 40 steps" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["integral"] + content["below"] == pytest.approx(32)
    assert len(content["grid"]) == len(content["density"]) == len(content["standard_error"])
    assert main([*command, "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_eigenvalues"] == 32
