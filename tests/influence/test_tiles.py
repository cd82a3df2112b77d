"""Samples and influence where the Gram does not fit the memory: tile by tile what is had in memory."""

import numpy as np
import pytest
from command_line import cli
from tiny_runs import make_run, rows

from streamfisher.analysis import tiled_samples
from streamfisher.errors import CapacityError, ConfigError, ConvergenceError
from streamfisher.influence import damped
from streamfisher.solving import tiled_gram

N = 60


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("tiles") / "run.zarr", N)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled_gram, "TILE", 16)


@pytest.fixture
def by_tiles(run, monkeypatch):
    """Return what calls `run`, with matrices of all its samples beyond the memory."""

    def call(method, *arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr("streamfisher.analysis.block_grams.BlockGrams.fits", lambda grams, needs: False)
            return getattr(run, method)(*arguments, **options)

    return call


@pytest.mark.parametrize(
    "choice", [{}, {"samples": slice(3, 50), "weights": np.linspace(0.1, 2, N)}], ids=["all", "some"]
)
@pytest.mark.parametrize("center", [False, True])
def test_samples_by_tiles_are_those_in_memory(run, by_tiles, center, choice):
    options = {"top": 5, "center": center, "threshold": 0.9} | choice
    found, whole = by_tiles("samples", "global", **options), run.samples("global", **options)
    assert found.metadata["by_tiles"] and "by_tiles" not in whole.metadata
    np.testing.assert_allclose(found.eigenvalues, whole.eigenvalues, rtol=1e-9)
    np.testing.assert_allclose(found.loadings, whole.loadings, atol=1e-8)
    np.testing.assert_allclose(found.squared_norms, whole.squared_norms, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.masses, whole.masses)
    assert found.n_pairs == whole.n_pairs > 5
    np.testing.assert_array_equal(found.pairs, whole.pairs)
    np.testing.assert_allclose(found.pair_cosines, whole.pair_cosines, rtol=1e-9)
    np.testing.assert_array_equal(found.cluster, whole.cluster)
    assert found.cluster.max() > 0
    assert (found.trace, found.noise_floor) == pytest.approx((whole.trace, whole.noise_floor), rel=1e-6)
    assert found.without is None and not len(found.leverages)


@pytest.mark.parametrize("choice", [{}, {"weights": np.linspace(0.1, 2, N)}], ids=["plain", "weighted"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("structure", ["none", "parameter"])
def test_influence_by_tiles_is_that_of_the_explicit_inverse(run, by_tiles, structure, center, choice):
    options = {"block_structure": structure, "center": center} | choice
    queries, dampings = [1, 17, 59], [1e-1, 1e-3]
    found, whole = by_tiles("influence", queries, dampings, **options), run.influence(queries, dampings, **options)
    for key, part in whole.blocks.items():
        for name in ("inner", "damped", "squared_norms", "query_squared_norms", "dampings"):
            one, other = getattr(found.blocks[key], name), getattr(part, name)
            np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-8 * np.abs(other).max(), err_msg=f"{key} {name}")
    if structure == "none" and not center and not choice:
        G = rows(run)
        train = np.setdiff1d(np.arange(N), queries)
        F = G[train].T @ G[train] / len(train)
        truth = G[queries] @ np.linalg.solve(F + 1e-3 * np.eye(len(F)), G[train].T)
        np.testing.assert_allclose(found.blocks["global"].damped[1], truth, rtol=1e-7, atol=1e-8 * np.abs(truth).max())


def test_a_small_budget_takes_tiles_and_says_what_is_left_out(run, capsys):
    assert cli("samples", run.path, "--memory-budget", "200KB", "--top", 3) == 0
    printed = capsys.readouterr().out
    assert "was read by tiles: leverage scores" in printed and "3 leading eigenvectors" in printed
    assert cli("influence", run.path, "--memory-budget", "120KB", "--queries", "0:2", "--damping", "0.1") == 0
    assert "influence at a damping of 0.1" in capsys.readouterr().out
    config = run.config.replace(memory_budget=200_000)
    with pytest.raises(CapacityError, match="leverage scores take all eigenvectors, and those of 60 samples need"):
        run.samples(dampings=[0.1], config=config)
    with pytest.raises(ConfigError, match="damping=0 takes all eigenvectors of 58 samples"):
        run.influence([0, 1], 0.0, pseudo_inverse=True, config=run.config.replace(memory_budget=120_000))


def test_what_does_not_converge_says_how_far_it_came(by_tiles, monkeypatch):
    monkeypatch.setattr(damped, "_MOST_STEPS", 2)
    with pytest.raises(ConvergenceError, match=r"the damped inverse at 0\.001 did not converge in 2 products"):
        by_tiles("influence", [1], 1e-3)


def test_clusters_join_whatever_the_order():
    label = np.arange(7)
    label = tiled_samples.joined(label, np.array([5, 0]), np.array([6, 1]))
    label = tiled_samples.joined(label, np.array([1, 3]), np.array([5, 4]))
    assert label.tolist() == [0, 0, 2, 3, 3, 0, 0]
    assert tiled_samples.numbered_clusters(label).tolist() == [0, 0, -1, 1, 1, 0, 0]
