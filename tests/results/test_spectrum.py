"""From Grams to metrics: definitions, centering, the union, and the error of the block-diagonal approximation."""

import functools
import json

import numpy as np
import pytest
import torch
from tiny_runs import make_run

import streamfisher as sf
from streamfisher import SpectralConfig
from streamfisher.reports import table
from streamfisher.results import noise_floor
from streamfisher.results import spectrum as spectra
from streamfisher.solving import Eigenproblem, RowPrecision, solve_blocks, uncenter

PRECISION = RowPrecision(torch.float64, 2.0**-53)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("spectrum") / "run.zarr")


@pytest.fixture
def rows():
    generator = np.random.default_rng(2)
    return {
        "a": generator.standard_normal((15, 40)) + 0.3,
        "b": generator.standard_normal((15, 4)),
        "c": np.zeros((15, 6)),
    }


def solve(rows, assignment, center=False, top_k=None, **options):
    problem = Eigenproblem(
        {name: values.shape[1] for name, values in rows.items()},
        assignment,
        SpectralConfig(**options),
        center=center,
        precision=PRECISION,
        metadata={},
        top_k=top_k,
    )
    return solve_blocks(lambda name: rows[name] @ rows[name].T, problem)


def dense_fisher(rows, center=False):
    G = np.concatenate(list(rows.values()), axis=1)
    G = G - G.mean(axis=0) if center else G
    return G.T @ G / len(G)


@pytest.mark.parametrize("center", [False, True])
def test_whole_spectrum_is_that_of_the_parameter_side_fisher(rows, center):
    found = solve(rows, dict.fromkeys(rows, "global"), center).global_.eigenvalues
    expected = np.linalg.eigvalsh(dense_fisher(rows, center))[::-1][:15]
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-12 * expected[0])


def test_global_eigenvalues_are_the_union_of_the_blocks(rows):
    spectrum = solve(rows, {name: name for name in rows})
    union = np.sort(np.concatenate([block.eigenvalues for block in spectrum.blocks.values()]))[::-1]
    assert np.array_equal(spectrum.global_.eigenvalues, union)
    assert spectrum.global_.n_params == 50
    assert len(union) == 15 + 4 + 6


def test_a_block_smaller_than_n_has_as_many_eigenvalues_as_parameters(rows):
    block = solve(rows, {name: name for name in rows}).blocks["b"]
    np.testing.assert_allclose(block.eigenvalues, np.linalg.eigvalsh(rows["b"].T @ rows["b"] / 15)[::-1], rtol=1e-10)


def test_an_all_zero_block_has_a_zero_spectrum_with_numbers_and_a_reason(rows):
    metrics = solve(rows, {name: name for name in rows}).blocks["c"].metrics
    assert metrics["trace"] == metrics["largest_eigenvalue"] == metrics["numerical_rank"] == 0
    assert metrics["condition_number"] == np.inf and metrics["effective_rank"] == 1.0
    assert metrics["reason"] == "no gradient reached its parameters"


def test_parameters_without_a_gradient_are_named_once_and_are_no_block(rows, tmp_path):
    spectrum = solve(rows, {name: name for name in rows})
    found = spectrum.to_dict()
    assert list(found["per_block"]) == ["a", "b"] and list(spectrum.blocks) == ["a", "b", "c"]
    assert found["metadata"]["parameters_without_gradient"] == ["c"]
    assert found["global"]["n_params"] == 50
    for metrics in (*found["per_block"].values(), found["global"]):
        assert f"{metrics['condition_number']:.2e}"
    assert "No gradient in any sample: c." in table(spectrum)
    together = solve(rows, {"a": "layer", "b": "layer", "c": "layer"}).to_dict()
    assert list(together["per_block"]) == ["layer"] and together["metadata"]["parameters_without_gradient"] == ["c"]


def test_a_spectrum_of_nothing_is_all_numbers_and_null_in_files(rows, tmp_path):
    nothing = solve({"c": rows["c"]}, {"c": "c"})
    found = nothing.to_dict()
    assert list(found["per_block"]) == ["c"]
    assert found["global"]["condition_number"] == found["global"]["gd_convergence_scale"] == np.inf
    written = json.loads(nothing.to_json(tmp_path / "nothing.json").read_text())
    assert written["global"]["condition_number"] is None
    assert written["global"]["reason"] == "no gradient reached its parameters"


def test_a_block_of_rounding_says_that_nothing_lies_above_the_floor(rows):
    rows["c"] = 1e-18 * rows["a"]
    metrics = solve(rows, {name: name for name in rows}).to_dict()["per_block"]["c"]
    assert metrics["reason"] == "no eigenvalue lies above the noise floor"
    assert metrics["condition_number"] == np.inf and metrics["effective_rank"] == 1.0


def test_centering_lowers_the_trace_by_the_squared_mean_gradient(rows):
    names = dict.fromkeys(rows, "global")
    difference = solve(rows, names).global_.trace - solve(rows, names, center=True).global_.trace
    mean = np.concatenate([values.mean(axis=0) for values in rows.values()])
    np.testing.assert_allclose(difference, mean @ mean, rtol=1e-12)


def test_block_diagonal_error_is_that_of_the_dense_matrices(rows):
    spectrum = solve(rows, {name: name for name in rows})
    F = dense_fisher(rows)
    blockdiag = np.zeros_like(F)
    start = 0
    for values in rows.values():
        stop = start + values.shape[1]
        blockdiag[start:stop, start:stop] = F[start:stop, start:stop]
        start = stop
    expected = np.linalg.norm(F - blockdiag) / np.linalg.norm(F)
    np.testing.assert_allclose(spectrum.metadata["block_diagonal_error"], expected, rtol=1e-10)


def test_metrics_follow_their_definitions(rows):
    block = solve(rows, dict.fromkeys(rows, "global"), top_k_eigenvalues=3).global_
    values, metrics = block.eigenvalues, block.metrics
    p = values / values.sum()
    assert metrics["spectral_gap"] == values[0] - values[1]
    assert metrics["condition_number"] == values[0] / values[metrics["numerical_rank"] - 1]
    np.testing.assert_allclose(metrics["effective_rank"], np.exp(-(p * np.log(p)).sum()), rtol=1e-12)
    np.testing.assert_allclose(metrics["trace"], values.sum(), rtol=1e-12)
    assert metrics["top_eigenvalues"] == [float(value) for value in values[:3]]
    assert metrics["n_eigenvalues"] == 15


def test_effective_rank_of_equal_eigenvalues_is_their_number():
    np.testing.assert_allclose(spectra.effective_rank(np.ones(7)), 7)


def test_truncation_says_so_and_keeps_the_exact_trace(rows):
    full = solve(rows, dict.fromkeys(rows, "global")).global_
    cut = solve(rows, dict.fromkeys(rows, "global"), top_k=2).global_
    assert cut.truncated
    assert np.array_equal(cut.eigenvalues, full.eigenvalues[:2])
    assert cut.trace == full.trace
    assert cut.metrics["condition_number"] is None


def test_noise_floor_is_relative_so_small_gradients_keep_their_spectrum(rows):
    tiny = {name: 1e-9 * values for name, values in rows.items()}
    names = dict.fromkeys(rows, "global")
    assert (
        solve(tiny, names).global_.metrics["numerical_rank"]
        == solve(rows, names).global_.metrics["numerical_rank"]
        == 15
    )


def test_a_block_that_is_only_rounding_is_called_noise(rows):
    rows["c"] = 1e-18 * rows["a"]  # what a gradient that cancels leaves in float64
    blocks = solve(rows, {name: name for name in rows}).blocks
    assert blocks["c"].metrics["numerical_rank"] == 0
    assert blocks["a"].metrics["numerical_rank"] == 15


def test_own_eps_sets_the_floor(rows):
    block = solve(rows, dict.fromkeys(rows, "global"), eps=0.5).global_
    assert block.noise_floor == 0.5 * block.eigenvalues[0]


def test_rounding_of_stored_rows_raises_the_floor():
    options = {"largest": 1.0, "trace": 256.0, "n_samples": 256, "product": torch.float64}
    bf16 = noise_floor(**options, roundoff=2.0**-9).value
    assert 1e-4 < bf16 < 1e-3  # measured: 3e-4 of the mean eigenvalue
    assert noise_floor(**options, roundoff=2.0**-24).value < 1e-10


@pytest.mark.parametrize("center", [False, True])
def test_the_whole_model_is_the_full_matrix_whatever_the_blocks(run, center):
    none = run.spectrum("none", center)
    for structure in ("layer", "module", "parameter"):
        spectrum = run.spectrum(structure, center)
        whole = spectrum.whole
        np.testing.assert_allclose(
            whole.eigenvalues, none.global_.eigenvalues, rtol=1e-9, atol=1e-12 * whole.eigenvalues[0]
        )
        assert whole.metrics["numerical_rank"] == none.global_.metrics["numerical_rank"] <= run.n_samples
        assert whole.noise_floor == pytest.approx(none.global_.noise_floor, rel=1e-9)
        assert whole.trace == pytest.approx(spectrum.global_.trace, rel=1e-12)
        found = spectrum.to_dict()
        assert found["whole_model"]["eigenvalues"] == whole.eigenvalues.tolist()
        assert found["global"]["eigenvalues"] == spectrum.global_.eigenvalues.tolist()
    assert none.whole is none.global_ and none.to_dict()["whole_model"]["block_name"] == "whole_model"


def test_tables_say_which_row_is_the_union_and_which_the_whole(run):
    rows = table(run.spectrum("parameter")).splitlines()
    ends = {row.split("  ")[0]: row.split()[-1] for row in rows}
    n = run.n_samples
    assert int(ends["union of blocks"].split("/")[0]) > n >= int(ends["whole model"].split("/")[0])
    assert not any(row.startswith("global") for row in rows)
    assert any("block-diagonal matrix, which may have a rank above N" in row for row in rows)
    alone = table(run.spectrum("none"))
    assert "whole model" in alone and "union" not in alone and "global" not in alone


def test_blocks_of_different_samples_have_no_whole():
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, 4, generator=generator)
    gradients = [{"a.w": draw()}, {"a.w": draw(), "b.w": draw()}, {"b.w": draw()}]
    config = sf.SpectralConfig(block_structure="parameter")
    found = sf.FisherSpectral(config).compute_fisher_spectrum(None, None, precomputed_gradients=gradients)
    assert found["whole_model"] is None and found["global"]["n_eigenvalues"] == 4


def test_json_is_strict_and_the_same_every_time(rows, tmp_path):
    first = solve(rows, {name: name for name in rows}).to_json(tmp_path / "a.json").read_bytes()
    second = solve(rows, {name: name for name in rows}).to_json(tmp_path / "b.json").read_bytes()
    assert first == second
    content = json.loads(first)
    assert set(content) == {"global", "whole_model", "per_block", "metadata"}
    assert content["global"]["n_total_eigenvalues"] == 25
    assert content["global"]["total_params"] == 50
    np.testing.assert_allclose(content["global"]["gd_convergence_scale"], 1 / content["global"]["largest_eigenvalue"])


def test_uncentering_undoes_storing_centered(rows):
    G = rows["a"]
    mean = G.mean(axis=0)
    C = G - mean
    products = np.append(C @ mean, mean @ mean)
    np.testing.assert_allclose(uncenter(C @ C.T, products), G @ G.T, rtol=1e-11, atol=1e-11)
