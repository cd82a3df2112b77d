"""A Gram read by tiles gives the spectrum of the whole one: blocks, samples, weights, centering, stored means."""

import numpy as np
import pytest
import tiny_models
import tiny_runs

import streamfisher as sf
from streamfisher.byte_sizes import format_bytes
from streamfisher.errors import CapacityError, ConfigError, CorruptRunError
from streamfisher.solving import center, select, tiled_gram, tiled_solve
from streamfisher.store import node_name

N = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_runs.make_run(tmp_path_factory.mktemp("tiled") / "run.zarr", N)


@pytest.fixture(scope="module")
def centered_run(tmp_path_factory):
    return tiny_runs.make_run(tmp_path_factory.mktemp("tiled") / "centered.zarr", N, store_centered=True)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiled_gram, "TILE", 9)


CHOICES = {
    "all": {},
    "some samples": {"samples": np.arange(3, 35, 2)},
    "weights": {"weights": np.linspace(0.0, 2.0, N)},
    "tokens": {"normalization": "tokens"},
    "samples and weights": {"samples": slice(5, 30), "weights": np.linspace(0.5, 2.0, N)},
}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("which", ["run", "centered_run"])
def test_the_operator_is_the_dense_matrix(request, which, choice, center):
    grams = request.getfixturevalue(which).block_grams(tiny_runs.PATTERNS, center, **CHOICES[choice])
    K, operator = grams.gram("second"), grams.operator(grams.blocks["second"])
    scale = np.abs(K).max()
    np.testing.assert_allclose(operator.matvec(np.eye(len(K))), K, rtol=0, atol=1e-13 * scale)
    np.testing.assert_allclose([operator.trace, operator.squared_norm], [np.trace(K), np.vdot(K, K)], rtol=1e-12)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_spectrum_by_tiles_is_that_in_memory(run, choice, center, monkeypatch):
    options = CHOICES[choice]
    dense = run.spectrum("parameter", center, top_k=4, **options)
    monkeypatch.setattr(tiled_solve, "fits_dense", lambda *_: False)
    monkeypatch.setattr("streamfisher.analysis.block_grams.fits_dense", lambda *_: False)
    tiled = run.spectrum("parameter", center, top_k=4, **options)
    for key, block in dense.blocks.items():
        found = tiled.blocks[key]
        scale = block.eigenvalues[0]
        np.testing.assert_allclose(found.eigenvalues, block.eigenvalues, rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose([found.trace, found.norm], [block.trace, block.norm], rtol=1e-11)
        assert found.truncated == block.truncated and found.residuals.max() < 1e-10 * scale
    np.testing.assert_allclose(tiled.global_.eigenvalues, dense.global_.eigenvalues, rtol=1e-11)
    for fact in ("block_diagonal_error", "mean_dominance") if center else ("block_diagonal_error",):
        np.testing.assert_allclose(tiled.metadata[fact], dense.metadata[fact], rtol=1e-9)
    assert tiled.metadata.keys() == dense.metadata.keys()


def test_a_budget_below_the_dense_solve_takes_tiles(run):
    config = run.config.replace(memory_budget=1_200_000)
    needed = tiled_solve.dense_bytes(1000, 1000)
    assert not tiled_solve.fits_dense(1000, 1000, config)
    with pytest.raises(CapacityError, match=rf"a dense solve of 1000 samples needs {format_bytes(needed)}.*--solver"):
        tiled_solve.fits_dense(1000, 1000, config.replace(solver="dense"))


def test_other_analyses_say_that_they_need_the_whole_gram(run):
    grams = run.block_grams("layer", config=run.config.replace(memory_budget=30_000_000))
    small = grams.__class__(**{**vars(grams), "config": run.config.replace(memory_budget=20_000)})
    with pytest.raises(CapacityError, match=r"the Gram of 40 samples needs .* in memory and the budget is 20 kB"):
        small.rows_gram(next(iter(grams.blocks)))


def test_a_damaged_tile_is_refused(tmp_path):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N)
    grams = run.block_grams("none")
    name = next(iter(run.parameters))
    (run.path / "gram" / node_name(name) / "c" / "0" / "0").unlink()
    with pytest.raises(CorruptRunError, match=rf"the Gram of {name} is not what was written; .*--rebuild"):
        grams.operator(list(run.parameters)).matvec(np.ones((N, 1)))
    with pytest.raises(CorruptRunError, match=r"is not finite in samples 0 to 8: a part is missing.*--rebuild"):
        tiled_gram.TiledGram(
            lambda *part: np.full((9, 9), np.nan), [name], 9, select(9, np.ones(9, dtype=bool)), center=False
        ).matvec(np.ones((9, 1)))


def test_unfinished_runs_have_no_tiles(tmp_path):
    run = tiny_runs.make_run(tmp_path / "run.zarr", N)
    tiny_runs.forget_last_unit(run)
    with pytest.raises(CapacityError, match="unfinished run do not fit the memory budget; finish it first"):
        run.block_grams("none", partial=True).operator(list(run.parameters))


def test_the_union_of_truncated_blocks_lists_no_more_than_is_certain(run):
    whole, cut = run.spectrum("parameter"), run.spectrum("parameter", top_k=3)
    assert len(cut.global_.eigenvalues) == 3 and cut.global_.truncated
    np.testing.assert_allclose(cut.global_.eigenvalues, whole.global_.eigenvalues[:3], rtol=1e-12)


def test_the_solver_is_an_option(run):
    assert run.spectrum("none", config=run.config.replace(solver="iterative")).metadata["solver"] == "iterative"
    with pytest.raises(ConfigError, match=r"solver='arpack' is unknown; choose one of auto, dense, iterative"):
        sf.SpectralConfig(solver="arpack")


@pytest.mark.parametrize("centered_store", [False, True])
@pytest.mark.parametrize("n", [16, 24, 40])
@pytest.mark.parametrize("choice", ["all", "weights", "some samples"])
def test_identical_samples_have_a_covariance_of_zero_however_it_is_solved(tmp_path, centered_store, n, choice):
    data = {
        key: values[:1].double().repeat(n, *[1] * (values.dim() - 1)) for key, values in tiny_models.vectors(n).items()
    }
    config = sf.SpectralConfig(
        chunk_size=8, dtype_model="float64", dtype_compute="float64", store_centered=centered_store
    )
    run = sf.collect(tiny_models.TinyRegression(0).double(), data, tmp_path / "run.zarr", config=config)
    options = {"all": {}, "weights": {"weights": np.linspace(1, 2, n)}, "some samples": {"samples": slice(0, 12)}}[
        choice
    ]
    for budget in ("1GiB", "5kB"):
        for structure in ("none", "parameter"):
            spectrum = run.spectrum(structure, True, config=run.config.replace(memory_budget=budget), **options)
            for block in spectrum.blocks.values():
                assert not block.eigenvalues.any() and not block.above_floor.any() and block.trace == 0
            uncentered = run.spectrum(structure, False, config=run.config.replace(memory_budget=budget), **options)
            assert all(block.above_floor.sum() == 1 for block in uncentered.blocks.values())


def test_rows_that_hardly_differ_keep_their_covariance():
    rows = np.ones((30, 5)) + 1e-6 * np.random.default_rng(0).standard_normal((30, 5))
    expected = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    found = np.linalg.eigvalsh(center(rows @ rows.T))[::-1][:5]
    np.testing.assert_allclose(found, expected, rtol=1e-2)
    assert not center(np.full((30, 30), 5.0)).any()
