"""`--project K`: seeded random projections of rows, what they estimate, and what is said about it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny_models
import tiny_runs
import torch
from command_line import arrays, cli
from gradients.token_model import Model, batch_of, double, truth_of
from torch import nn

import streamfisher as sf
from streamfisher.errors import ConfigError, CorruptRunError, RunError, RunMismatchError
from streamfisher.gradients import GradientEngine, Projection
from streamfisher.gradients.projection import projected_shape, signs
from streamfisher.models import resolve_loss

SEEDS = 300


def dense(sides):
    """Return the projection of a parameter as one matrix (P, k1 k2)."""
    shape = sides.shape
    left = torch.eye(shape.m).double() if sides.left is None else sides.left
    right = torch.eye(shape.n).double() if sides.right is None else sides.right
    return torch.kron(left, right).numpy()


@pytest.mark.parametrize(
    ("shape", "numbers", "expected"),
    [
        ((8, 8), 16, (8, 8, 4, 4)),
        ((8, 8), 64, None),
        ((3, 100), 36, (3, 100, 3, 12)),
        ((100, 3), 36, (100, 3, 12, 3)),
        ((1000,), 10, (1000, 1, 10, 1)),
        ((6, 2, 3, 3), 20, (6, 18, 4, 5)),
        ((5, 7), 1, (5, 7, 1, 1)),
        ((), 1, None),
    ],
)
def test_sizes_are_as_square_as_the_parameter_allows(shape, numbers, expected):
    found = projected_shape(shape, numbers)
    if expected is None:
        assert found is None
        return
    assert (found.m, found.n, found.k1, found.k2) == expected and found.columns <= numbers


def test_a_side_that_is_not_projected_adds_no_variance():
    assert projected_shape((3, 100), 36).relative_variance == pytest.approx(2 / 12)
    assert projected_shape((8, 8), 16).relative_variance == pytest.approx(1.5 * 1.5 - 1)


def test_signs_are_a_function_of_seed_and_name():
    # Written out: a run that is resumed elsewhere, or next year, must find the same ones.
    assert signs(42, "w/L", 2, 6).tolist() == [[-1, 1, 1, -1, 1, 1], [1, 1, -1, -1, 1, -1]]
    assert not torch.equal(signs(42, "w/L", 8, 8), signs(43, "w/L", 8, 8))
    assert not torch.equal(signs(42, "w/L", 8, 8), signs(42, "w/R", 8, 8))
    many = signs(1, "balanced", 100, 1000).double()
    assert abs(float(many.mean())) < 4 / math.sqrt(1e5) and set(many.unique().tolist()) == {-1.0, 1.0}


class Convolved(nn.Module):
    """Convolutions with and without groups, and a weight that only autograd knows."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 6, 3, padding=1)
        self.grouped = nn.Conv1d(6, 4, 3, groups=2)
        self.scale = nn.Parameter(torch.randn(4, 5))
        self.last = nn.Linear(20, 3)

    def forward(self, x):
        x = torch.tanh(self.grouped(torch.relu(self.first(x))))
        return self.last((x[:, :, :5] * self.scale).flatten(1))


def token_case():
    return double(Model()), batch_of(), lambda model, batch: model(batch["input_ids"]).square().flatten(1).sum(1)


def convolution_case():
    x = torch.randn(5, 4, 9, generator=torch.Generator().manual_seed(1)).double()
    return double(Convolved()), {"x": x}, lambda model, batch: model(batch["x"]).square().sum(1)


@pytest.mark.parametrize("case", [token_case, convolution_case])
@pytest.mark.parametrize("numbers", [4, 12])
@pytest.mark.parametrize("slow", [False, True])
def test_engine_projects_what_plain_autograd_gives(case, numbers, slow):
    model, batch, loss = case()
    truth = truth_of(model, batch, loss)
    with GradientEngine(model, resolve_loss(model, batch, loss)) as engine:
        engine.projection = Projection(numbers, 0, {name: info.shape for name, info in engine.parameters.items()})
        engine.probe(batch)
        if slow:
            engine.use_groups([], dict.fromkeys(engine.parameters, "forced"))
        out = engine.allocate(5, columns=engine.projection.columns)
        engine.rows(batch, out)
        engine.rows(batch, out)  # buffers are reused
        differences = engine.guard(batch, out)
        assert engine.projection.columns
        for name, rows in out.items():
            expected = truth[name]
            if name in engine.projection.columns:
                expected = expected @ dense(engine.projection.sides(name, rows.device, torch.float64))
            assert rows.shape == expected.shape and rows.shape[1] <= max(numbers, 1)
            np.testing.assert_allclose(rows.numpy(), expected, rtol=0, atol=1e-10 * np.abs(expected).max())
        assert max(differences.values()) < engine.tolerance
        next(iter(out.values()))[0] += 1.0  # a wrong row is noticed all the same
        assert max(engine.guard(batch, out).values()) > engine.tolerance


def exact_rows():
    """Return rows of three parameters, 6 samples, with a leading direction of rank one, and their shapes."""
    random = np.random.default_rng(0)
    shapes = {"a": (12, 10), "b": (9, 16), "c": (40,)}
    rows = {}
    for name, shape in shapes.items():
        size = math.prod(shape)
        direction = np.outer(random.normal(size=shape[0]), random.normal(size=size // shape[0])).ravel()
        common = np.outer(random.normal(size=6) + 2.0, direction)
        rows[name] = common + 0.3 * random.normal(size=(6, size))
    return rows, shapes


@pytest.fixture(scope="module")
def estimates():
    """Return the exact Gram and those of many seeds: (6, 6), (SEEDS, 6, 6), and the largest v_p."""
    rows, shapes = exact_rows()
    found, variances = [], []
    for seed in range(SEEDS):
        projection = Projection(16, seed, shapes)
        gram = 0.0
        for name, values in rows.items():
            sides = projection.sides(name, torch.device("cpu"), torch.float64)
            projected = sides.project(torch.from_numpy(values)).numpy()
            gram = gram + projected @ projected.T
        found.append(gram)
        variances = {name: shape.relative_variance for name, shape in projection.shapes.items()}
    return sum(values @ values.T for values in rows.values()), np.array(found), variances, rows


def test_mean_over_seeds_is_the_exact_gram(estimates):
    exact, found, _, _ = estimates
    error = found.std(axis=0, ddof=1) / math.sqrt(SEEDS)
    assert (np.abs(found.mean(axis=0) - exact) < 4.5 * error).all()
    assert error.max() < 0.05 * exact.max()


def test_stated_error_bars_hold_and_are_not_idle(estimates):
    exact, found, variances, rows = estimates
    traces = {name: float((values**2).sum()) for name, values in rows.items()}
    stated = math.sqrt(sum(traces[name] ** 2 * variances[name] for name in rows)) / sum(traces.values())
    observed = np.trace(found, axis1=1, axis2=2).std() / np.trace(exact)
    assert stated / 4 < observed < 1.1 * stated
    largest = np.linalg.eigvalsh(found)[:, -1]
    exact_largest = np.linalg.eigvalsh(exact)[-1]
    bound = math.sqrt(max(variances.values()))
    assert bound / 4 < np.sqrt(np.mean((largest / exact_largest - 1.0) ** 2)) < bound


def projected_run(path, **options):
    return tiny_runs.make_run(path, **{"project": 4, "batch_tokens": 8} | options)


def stored_rows(run):
    return {name: run.store.rows.columns(name, 0, columns) for name, columns in run.store.parameters.items()}


def test_run_stores_the_projected_rows_of_an_exact_one(tmp_path):
    exact = tiny_runs.make_run(tmp_path / "exact.zarr")
    run = projected_run(tmp_path / "run.zarr")
    assert run.store.parameters == {"first.weight": 4, "first.bias": 4, "second.weight": 4, "second.bias": 2}
    assert run.parameters == exact.parameters and run.info()["total_params"] == 32
    assert run.info()["projected_parameters"] == ["first.weight", "first.bias", "second.weight"]
    projection = Projection(4, 42, {item["name"]: item["shape"] for item in run.manifest.parameters})
    for name, rows in stored_rows(run).items():
        expected = tiny_runs.rows(exact, [name])
        if name in projection.columns:
            expected = expected @ dense(projection.sides(name, torch.device("cpu"), torch.float64))
        np.testing.assert_allclose(rows, expected, atol=1e-12)
    G = np.concatenate(list(stored_rows(run).values()), axis=1)
    spectrum = run.spectrum("none")
    np.testing.assert_allclose(spectrum.global_.eigenvalues[:14], np.linalg.svd(G)[1] ** 2 / 24, rtol=1e-6, atol=1e-12)
    assert spectrum.global_.n_params == 32


def test_centered_store_and_waves_and_blocks_work_on_projected_rows(tmp_path):
    run = projected_run(tmp_path / "run.zarr")
    centered = projected_run(tmp_path / "centered.zarr", store_centered=True)
    for structure in ("parameter", tiny_runs.PATTERNS):
        for center in (False, True):
            one, other = run.spectrum(structure, center), centered.spectrum(structure, center)
            assert one.global_.trace == pytest.approx(other.global_.trace, rel=1e-6)
            assert all(0 < block.error_bars["trace"] < 3 for key, block in other.blocks.items() if "bias" not in key)
    budget = 24 * 24 * 8 * 4 + 24 * 8 * 5
    waves = projected_run(tmp_path / "waves.zarr", keep_gradients="none", disk_budget=budget, hold="disk")
    assert len(waves.store.waves) > 1
    held = projected_run(tmp_path / "held.zarr", keep_gradients="none", hold="host")
    for other in (waves, held):
        np.testing.assert_array_equal(other.gram("first.weight"), run.gram("first.weight"))


def test_projected_rows_keep_their_bits_through_a_resume(tmp_path):
    whole, killed = projected_run(tmp_path / "whole.zarr"), projected_run(tmp_path / "killed.zarr")
    tiny_runs.forget_last_unit(killed)
    again = projected_run(tmp_path / "killed.zarr")
    again.build_grams()
    whole.build_grams()
    assert arrays(whole.path) == arrays(again.path)
    with pytest.raises(RunMismatchError, match=r"setting project: 4 in the run, 5 now"):
        projected_run(tmp_path / "killed.zarr", project=5)
    with pytest.raises(RunMismatchError, match=r"setting project: 4 in the run, None now"):
        projected_run(tmp_path / "killed.zarr", project=None)


def test_results_say_that_they_are_estimates(tmp_path):
    run = projected_run(tmp_path / "run.zarr")
    spectrum = run.spectrum(tiny_runs.PATTERNS)
    found = spectrum.to_dict()
    said = found["metadata"]["projection"]
    assert {key: said[key] for key in ("numbers", "seed", "parameters")} == {"numbers": 4, "seed": 42, "parameters": 3}
    traces = {name: float((rows**2).sum()) for name, rows in stored_rows(run).items()}
    # first.weight (5, 3) to (2, 2), first.bias (5, 1) to (4, 1), second.weight (2, 5) to (2, 2), second.bias exact
    v = {"first.weight": 3.0, "first.bias": 0.5, "second.weight": 1.0, "second.bias": 0.0}
    for keys, block in (("first", "first"), ("second", "second"), ("", "global")):
        names = [name for name in traces if name.startswith(keys)]
        expected = math.sqrt(sum(traces[n] ** 2 * v[n] for n in names)) / sum(traces[n] for n in names)
        bars = found["global"]["error_bars"] if block == "global" else found["per_block"][block]["error_bars"]
        assert bars["trace"] == pytest.approx(expected, rel=1e-12)
        assert bars["largest_eigenvalue"] >= math.sqrt(max(v[n] for n in names))
        assert bars["effective_rank"] is None and bars["condition_number"] is None
    assert said["relative_std"] == found["global"]["error_bars"]["trace"]
    assert run.spectrum("parameter").blocks["second.bias"].error_bars["largest_eigenvalue"] == 0.0


def test_exact_runs_say_nothing_of_projections(tmp_path):
    found = tiny_runs.make_run(tmp_path / "run.zarr").spectrum(exact=True).to_dict()
    assert "projection" not in found["metadata"] and "error_bars" not in found["global"]
    large = projected_run(tmp_path / "large.zarr", project=15).spectrum("none")  # no parameter has more than 15
    assert large.global_.error_bars["largest_eigenvalue"] == 0.0
    exact = sf.open_run(tmp_path / "run.zarr").spectrum("none")
    np.testing.assert_array_equal(large.global_.eigenvalues, exact.global_.eigenvalues)


def test_exact_questions_are_refused(tmp_path, capsys):
    run = projected_run(tmp_path / "run.zarr")
    with pytest.raises(RunError, match=r"eigenvectors cannot be had.*without --project"):
        run.eigenvectors("global", top=2, block_structure="none")
    with pytest.raises(RunError, match=r"collected with --project 4.*an exact spectrum"):
        run.spectrum(exact=True)
    assert cli("spectrum", run.path, "--exact", "--quiet") != 0
    assert "--project 4" in capsys.readouterr().err
    assert cli("spectrum", run.path, "--quiet") == 0
    assert "Estimated from random projections to 4 numbers (--project), trace to" in capsys.readouterr().out
    assert cli("spectrum", run.path, "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["projection"]["numbers"] == 4


def test_what_does_not_go_with_projections_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"project=4.*representation='factors'"):
        sf.SpectralConfig(project=4, representation="factors")
    with pytest.raises(ConfigError, match=r"project=4 and stream='layers'"):
        projected_run(tmp_path / "run.zarr", stream="layers")
    fisher = sf.FisherSpectral(sf.SpectralConfig(project=4))
    with pytest.raises(ConfigError, match=r"project=4.*storage_mode='streaming'"):
        fisher.compute_fisher_spectrum(tiny_models.regression(), tiny_models.vectors())


def test_more_columns_than_elements_is_a_damaged_manifest(tmp_path):
    run = projected_run(tmp_path / "run.zarr")
    path = run.path / "manifest.json"
    manifest = json.loads(path.read_text())
    for option, columns in ((4, 16), (None, 4), (4, 0)):
        manifest["config"]["project"], manifest["parameters"][0]["columns"] = option, columns
        path.write_text(json.dumps(manifest))
        with pytest.raises(CorruptRunError, match=r"columns"):
            sf.open_run(run.path)
