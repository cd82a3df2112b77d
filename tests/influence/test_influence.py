"""Influence of training samples on queries, against the explicit inverse in parameter space and against retraining."""

import json

import numpy as np
import pytest
import torch
from command_line import cli
from tiny_models import TinyRegression, squares, vectors
from tiny_runs import PATTERNS, make_run, rows

import streamfisher as sf
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError, ConfigError, DataError, RunError, RunMismatchError

N, Q = 24, 6


def collect_queries(path, *, seed=0, count=Q, model=None, **options):
    settings = {"chunk_size": 4, "dtype_model": "float64", "dtype_compute": "float64"} | options
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, 3, generator=generator).double()
    labels = torch.randn(count, 2, generator=generator).double()
    model = TinyRegression(seed).double() if model is None else model
    return sf.collect(model, {"x": x, "labels": labels}, path, config=SpectralConfig(**settings))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("influence")
    return make_run(folder / "run.zarr"), collect_queries(folder / "queries.zarr")


def explicit(G, queries, damping, *, w=None, center=False):
    """Return `g_q^T (F + lambda I)^-1 g_i` by the inverse of a (P, P) matrix."""
    w = np.ones(len(G)) if w is None else w
    rows = G - (w @ G) / w.sum() if center else G
    F = (rows * (w / w.sum())[:, None]).T @ rows
    return queries @ np.linalg.inv(F + damping * np.eye(len(F))) @ G.T


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dampings", [[1e-3, 1.0], np.geomspace(1e-4, 1.0, 17)], ids=["cholesky", "eigenvectors"])
@pytest.mark.parametrize("structure", ["none", "parameter", PATTERNS], ids=["none", "parameter", "patterns"])
def test_influence_is_that_of_the_explicit_inverse(runs, center, weighted, dampings, structure):
    run, queries = runs
    w = np.random.default_rng(0).uniform(0.1, 2, N) if weighted else None
    found = run.influence(queries, dampings, center=center, block_structure=structure, weights=w)
    total = 0
    for key, names in run.block_grams(structure).blocks.items():
        G, of_queries = rows(run, names), rows(queries, names)
        part = found.blocks[key]
        np.testing.assert_allclose(part.inner, of_queries @ G.T, rtol=1e-10, atol=1e-12)
        for place, damping in enumerate(dampings):
            expected = explicit(G, of_queries, damping, w=w, center=center)
            np.testing.assert_allclose(part.damped[place], expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
            total = total + (expected if place == 0 else 0)
    np.testing.assert_allclose(found.total.damped[0], total, rtol=1e-8, atol=1e-8 * np.abs(total).max())
    G, of_queries = rows(run), rows(queries)
    cosines = of_queries @ G.T / np.outer(np.linalg.norm(of_queries, axis=1), np.linalg.norm(G, axis=1))
    np.testing.assert_allclose(found.total.cosine, cosines, atol=1e-12)
    assert found.queries.tolist() == list(range(Q))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"representation": "factors"}, {"representation": "factors"}),
        ({"representation": "factors"}, {"representation": "dense"}),
        ({"store_centered": True}, {}),
        ({"store_centered": True}, {"store_centered": True}),
        ({"gram_per": "layer"}, {}),
    ],
)
@pytest.mark.parametrize("center", [False, True])
def test_products_of_two_runs_do_not_depend_on_how_either_holds_its_gradients(runs, tmp_path, ours, theirs, center):
    plain = runs[0].influence(runs[1], 1e-2, "global", center).blocks["global"]
    found = make_run(tmp_path / "run.zarr", **ours).influence(
        collect_queries(tmp_path / "queries.zarr", **theirs), 1e-2, "global", center
    )
    part = found.blocks["global"]
    np.testing.assert_allclose(part.inner, plain.inner, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(part.damped, plain.damped, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(part.query_squared_norms, plain.query_squared_norms, rtol=1e-9)
    np.testing.assert_allclose(part.squared_norms, plain.squared_norms, rtol=1e-9)


@pytest.mark.parametrize("center", [False, True])
def test_queries_may_be_samples_of_the_run_that_do_not_train(runs, center):
    run, _ = runs
    found = run.influence([3, 20, 21], [0.05], center=center, samples=slice(2, 24))
    train = np.setdiff1d(np.arange(2, 24), [3, 20, 21])
    assert found.samples.tolist() == train.tolist()
    assert found.queries.tolist() == [3, 20, 21]
    G = rows(run)
    names = run.block_grams("layer").blocks
    assert list(found.blocks) == list(names)
    whole = run.influence([3, 20, 21], [0.05], "global", center, samples=slice(2, 24)).blocks["global"]
    expected = explicit(G[train], G[[3, 20, 21]], 0.05, center=center)
    np.testing.assert_allclose(whole.damped[0], expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max())
    np.testing.assert_allclose(whole.squared_norms, np.square(G[train]).sum(axis=1), rtol=1e-12)


def test_queries_within_a_run_need_no_gradients_and_two_runs_do(runs, tmp_path):
    bare = make_run(tmp_path / "bare.zarr", keep_gradients=(), hold="host")
    same = bare.influence([1, 2], 0.1, "global").blocks["global"]
    np.testing.assert_allclose(same.damped, runs[0].influence([1, 2], 0.1, "global").blocks["global"].damped, rtol=1e-9)
    with pytest.raises(RunError, match=r"keeps no gradients of .*--queries 4000:5000"):
        bare.influence(runs[1], 0.1)


@pytest.mark.parametrize("center", [False, True])
def test_without_damping_a_regular_block_is_inverted_and_a_singular_one_on_request(runs, center):
    run, queries = runs
    names = ["second.bias"]
    found = run.influence(queries, 0.0, "second.bias", center, block_structure="parameter")
    expected = explicit(rows(run, names), rows(queries, names), 0.0, center=center)
    np.testing.assert_allclose(found.blocks["second.bias"].damped[0], expected, rtol=1e-8)
    with pytest.raises(ConfigError, match=r"damping=0: the Fisher of global has 2\d eigenvalues .*--pseudo-inverse"):
        run.influence(queries, 0.0, "global", center)
    found = run.influence(queries, 0.0, "global", center, pseudo_inverse=True).blocks["global"]
    G = rows(run)
    centered = G - G.mean(axis=0) if center else G
    expected = rows(queries) @ np.linalg.pinv(centered.T @ centered / N) @ G.T
    np.testing.assert_allclose(found.damped[0], expected, rtol=1e-6, atol=1e-8 * np.abs(expected).max())


def test_self_influence_is_the_quadratic_form_of_the_inverse(runs):
    run, _ = runs
    w = np.random.default_rng(0).uniform(0.1, 2, N)
    found = run.samples(dampings=[0.01], weights=w)
    np.testing.assert_allclose(found.self_influence[0], np.diag(explicit(rows(run), rows(run), 0.01, w=w)), rtol=1e-9)


def test_relative_dampings_are_multiples_of_each_blocks_mean_eigenvalue(runs):
    run, queries = runs
    found = run.influence(queries, 0.1, block_structure="parameter", relative=True)
    spectrum = run.spectrum("parameter")
    for key, part in found.blocks.items():
        block = spectrum.blocks[key]
        assert part.dampings[0] == pytest.approx(0.1 * block.trace / min(N, block.n_params))
    assert np.isnan(found.total.dampings).all()


# Leave-one-out retraining


def logistic_data(n, d, seed):
    rng = np.random.default_rng(seed)
    theta = rng.standard_normal(d)
    x = rng.standard_normal((n, d))
    return x, (rng.uniform(size=n) < 1 / (1 + np.exp(-x @ theta))).astype(float)


def fit(x, y, ridge, left_out=None):
    """Return the minimum of `(1/n) sum of losses + ridge/2 |theta|^2` by Newton's method; one term may be missing."""
    n, d = x.shape
    keep = np.arange(n) != left_out
    theta = np.zeros(d)
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ theta))
        gradient = x[keep].T @ (p - y)[keep] / n + ridge * theta
        H = (x[keep] * (p * (1 - p))[keep, None]).T @ x[keep] / n + ridge * np.eye(d)
        step = np.linalg.solve(H, gradient)
        theta = theta - step
        if np.abs(step).max() < 1e-13:
            break
    return theta


def losses(x, y, theta):
    return np.logaddexp(0, x @ theta) - y * (x @ theta)


def logistic_loss(model, batch):
    z = model(batch["x"]).squeeze(1)
    return torch.nn.functional.softplus(z) - batch["labels"] * z


@pytest.mark.parametrize(("weighted", "least"), [(True, 0.999), (False, 0.99)], ids=["Hessian", "empirical Fisher"])
def test_influence_predicts_leave_one_out_retraining_of_logistic_regression(tmp_path, weighted, least):
    """With weights p (1 - p) / (p - y)^2 the empirical Fisher is the Hessian; without, near it in a true model."""
    n, d, ridge = 400, 5, 0.01
    x, y = logistic_data(n, d, 0)
    x_q, y_q = logistic_data(20, d, 1)
    theta = fit(x, y, ridge)
    model = torch.nn.Linear(d, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(theta)[None])
    config = SpectralConfig(dtype_compute="float64")
    made = [
        sf.collect(
            model,
            {"x": torch.from_numpy(a), "labels": torch.from_numpy(b)},
            tmp_path / f"{name}.zarr",
            config=config,
            loss=logistic_loss,
        )
        for name, a, b in (("train", x, y), ("queries", x_q, y_q))
    ]
    p = 1 / (1 + np.exp(-x @ theta))
    w = p * (1 - p) / (p - y) ** 2 if weighted else np.ones(n)
    # H = (1/n) sum w g g^T + ridge = (sum w / n) (F + ridge n / sum w)
    found = made[0].influence(made[1], ridge * n / w.sum(), "global", weights=w).blocks["global"].damped[0]
    predicted = found / (w.sum() / n) / n
    actual = np.stack([losses(x_q, y_q, fit(x, y, ridge, i)) - losses(x_q, y_q, theta) for i in range(n)], axis=1)
    assert np.corrcoef(predicted.ravel(), actual.ravel())[0, 1] > least
    if weighted:
        slope = np.vdot(predicted, actual) / np.vdot(predicted, predicted)
        assert slope == pytest.approx(1.0, abs=0.05)


# Bad input


def test_queries_of_other_weights_parameters_or_projections_are_refused_by_name(runs, tmp_path):
    run, _ = runs
    with pytest.raises(RunMismatchError, match="the model's fingerprint is"):
        run.influence(collect_queries(tmp_path / "weights.zarr", seed=1), 0.1)
    with pytest.raises(RunMismatchError, match=r"the parameter first.bias is absent there and \(5,\) here"):
        run.influence(collect_queries(tmp_path / "fewer.zarr", exclude=("first.bias",)), 0.1)
    with pytest.raises(RunError, match="their gradients are random projections"):
        run.influence(collect_queries(tmp_path / "projected.zarr", project=2), 0.1)
    with pytest.raises(RunError, match="influence cannot be had from them"):
        make_run(tmp_path / "run.zarr", project=2).influence([1], 0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dampings": -0.1}, ConfigError, "must be finite and not negative"),
        ({"dampings": []}, ConfigError, "give at least one"),
        ({"block": "layer_7"}, ConfigError, "no block 'layer_7'"),
        ({"partial": True}, ConfigError, "finished runs only"),
        ({"queries": None}, DataError, "added as queries, and there are none"),
        ({"queries": slice(0, 23)}, DataError, "1 training samples are left beside 23 queries"),
        ({"queries": [99]}, DataError, "sample 99 was selected"),
        ({"queries": [1], "query_samples": [2]}, ConfigError, "query_samples chooses among"),
    ],
)
def test_options_that_cannot_be_used_are_refused(runs, options, error, message):
    run, queries = runs
    options = {"queries": queries, "dampings": 0.1} | options
    with pytest.raises(error, match=message):
        run.influence(**options)


def test_what_does_not_fit_the_memory_is_refused(runs):
    run, queries = runs
    with pytest.raises(CapacityError, match="the influence of 24 samples on 6 queries need"):
        run.influence(queries, 0.1, config=run.config.replace(memory_budget=10_000))


def test_dampings_below_the_noise_floor_are_said(tmp_path):
    made = sf.collect(TinyRegression(), vectors(24), tmp_path / "r.zarr", loss=squares(1.0))
    found = made.influence([0, 1], [1e-20, 1e-1], "global")
    assert found.below_floor == ["global"]
    assert made.influence([0, 1], [1e-1], "global").below_floor == []
    assert np.isfinite(found.total.damped).all()


# The command


def test_the_command_says_what_python_says(runs, capsys):
    run, queries = runs
    line = ("influence", run.path, "--queries", queries.path, "--damping", "1e-2,1", "--top", 3, "--blocks", "none")
    assert cli(*line, "--json", "--quiet") == 0
    printed = json.loads(capsys.readouterr().out)
    found = run.influence(queries, [1e-2, 1.0], block_structure="none")
    assert printed == json.loads(json.dumps(found.to_dict(3)))
    best = printed["ranked"][0]["queries"][0]["highest"][0]
    assert best["sample"] == int(found.total.damped[0, 0].argmax())
    assert cli(*line, "--quiet") == 0
    shown = capsys.readouterr().out
    assert "6 queries against 24 samples" in shown
    assert f"{best['sample']}" in shown


@pytest.mark.parametrize("score", ["inner", "cosine"])
def test_the_command_ranks_by_other_scores_and_takes_queries_of_the_run(runs, capsys, score):
    run, _ = runs
    line = ("influence", run.path, "--queries", "20:24", "--damping", "0.1", "--score", score, "--json", "--quiet")
    assert cli(*line) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["n_queries"], printed["n_samples"]) == (4, 20)
    best = printed["ranked"][0]["mean_of_queries"]["highest"][0]
    found = run.influence(slice(20, 24), 0.1)
    assert best["score"] == found.top(None, 1, score=score)[0]["score"]


@pytest.mark.parametrize("suffix", [".csv", ".npz", ".json"])
def test_scores_are_exported(runs, tmp_path, capsys, suffix):
    run, queries = runs
    path = tmp_path / f"scores{suffix}"
    line = ("influence", run.path, "--queries", queries.path, "--damping", "0.1", "--top", 2, "--out", path, "--quiet")
    assert cli(*line) == 0
    found = run.influence(queries, 0.1)
    if suffix == ".npz":
        with np.load(path) as arrays:
            np.testing.assert_array_equal(arrays["total/influence"], found.total.damped)
            np.testing.assert_array_equal(arrays["samples"], found.samples)
    elif suffix == ".csv":
        lines = path.read_text().splitlines()
        assert len(lines) == 1 + Q * 2 * 2
    else:
        assert json.loads(path.read_text())["n_queries"] == Q


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queries", "nowhere.zarr", "--damping", "1"], "nowhere.zarr"),
        (["--queries", "0:x", "--damping", "1"], "--queries '0:x' is not a slice"),
        (["--queries", "0:4", "--damping", "-1"], "must be finite and not negative"),
        (["--queries", "0:4", "--damping", "0"], "--pseudo-inverse"),
        (["--queries", "0:4", "--damping", "1", "--score", "likeness"], "choose influence, inner or cosine"),
        (["--queries", "0:4", "--damping", "1", "--top", "0"], "at least 1"),
        (["--queries", "0:4", "--damping", "1", "--out", "x.txt"], "the name must end in"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(runs, capsys, arguments, message):
    assert cli("influence", runs[0].path, *arguments, "--blocks", "none", "--quiet") == 2
    assert message in capsys.readouterr().err


def test_two_runs_of_a_language_model_give_what_one_run_of_both_gives(tmp_path):
    """Embeddings by token ids, linear layers as factors, norms as rows: each by its own kernel."""
    from streamfisher.demo import demo_samples, load_demo_model

    text = demo_samples(12, 16)
    one = sf.collect(load_demo_model(), text, tmp_path / "one.zarr")
    train, queries = (
        sf.collect(load_demo_model(), part, tmp_path / f"{name}.zarr", config=SpectralConfig(representation="factors"))
        for name, part in (("train", text[:8]), ("queries", text[8:]))
    )
    assert set(train.manifest.layout["representation"].values()) == {"factors", "dense"}
    within = one.influence(slice(8, 12), 0.1, relative=True)
    across = train.influence(queries, 0.1, relative=True)
    assert list(within.blocks) == list(across.blocks)
    for key, part in across.blocks.items():
        size = np.abs(within.blocks[key].damped).max()
        np.testing.assert_allclose(part.damped, within.blocks[key].damped, rtol=1e-4, atol=1e-4 * size)
        np.testing.assert_allclose(part.cosine, within.blocks[key].cosine, atol=1e-5)
