"""Noise floors: below them is rounding, above them is truth, and each says what it is made of."""

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

import streamfisher as sf
from streamfisher.reduction.folds import WIDE
from streamfisher.results import noise_floor
from streamfisher.results.noise import RawScale, backward_noise

N = 16
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def precomputed(rows, **options):
    """Return the results of `{name: (N, P)}` given as gradients."""
    gradients = [{name: torch.as_tensor(values[i]) for name, values in rows.items()} for i in range(N_of(rows))]
    config = sf.SpectralConfig(eigensolve_device="cpu", **options)
    return sf.FisherSpectral(config).compute_fisher_spectrum(None, None, precomputed_gradients=gradients)


def N_of(rows):
    return len(next(iter(rows.values())))


def with_spectrum(values, columns, seed=0):
    """Return (n, columns) float32 whose Fisher has the eigenvalues `values`, to rounding."""
    generator = np.random.default_rng(seed)
    left, _ = np.linalg.qr(generator.standard_normal((len(values),) * 2))
    right, _ = np.linalg.qr(generator.standard_normal((columns, len(values))))
    return (left * np.sqrt(len(values) * np.asarray(values)) @ right.T).astype(np.float32)


def fisher_eigenvalues(G):
    return np.linalg.svd(np.asarray(G, dtype=np.float64), compute_uv=False) ** 2 / len(G)


# eps raises the floor and never lowers it


def low_rank_wide():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(32, 3, generator=generator), torch.randn(3, 200_000, generator=generator)
    return {"layers.0.weight": (left @ right).numpy()}


@pytest.mark.parametrize("eps", [None, 0.0, 1e-9])
def test_eps_cannot_put_the_floor_under_rounding(eps):
    rows = low_rank_wide()
    metrics = precomputed(rows, eps=eps)["per_block"]["layer_0"]
    truth = fisher_eigenvalues(rows["layers.0.weight"])
    assert metrics["numerical_rank"] == 3
    assert metrics["condition_number"] == pytest.approx(truth[0] / truth[2], rel=1e-3)
    assert metrics["noise_floor_source"] == "float32 products"


def test_eps_raises_the_floor_and_the_result_says_so():
    metrics = precomputed(low_rank_wide(), eps=0.9)["per_block"]["layer_0"]
    assert metrics["numerical_rank"] == 1
    assert metrics["noise_floor"] == 0.9 * metrics["largest_eigenvalue"]
    assert metrics["noise_floor_source"] == "eps"


# the floor follows the products that were made


def test_few_columns_are_multiplied_in_float64_and_have_its_floor():
    truth = np.geomspace(1e-9, 1e-9 / 8.48e7, N)
    rows = {"layers.0.mlp.weight": with_spectrum(truth, 165)}
    single, double = (
        precomputed(rows, dtype_gram=dtype)["per_block"]["layer_0"] for dtype in (torch.float32, torch.float64)
    )
    assert single == double
    assert single["numerical_rank"] == N
    assert single["condition_number"] == pytest.approx(8.48e7, rel=1e-2)
    np.testing.assert_allclose(single["eigenvalues"], fisher_eigenvalues(rows["layers.0.mlp.weight"]), rtol=1e-6)


@pytest.mark.parametrize("columns", [WIDE - 1, WIDE])
def test_the_floor_changes_where_the_products_do(columns):
    rows = {"layers.0.weight": with_spectrum(np.geomspace(1, 1e-9, N), columns)}
    metrics = precomputed(rows)["per_block"]["layer_0"]
    assert (metrics["numerical_rank"] == N) == (columns < WIDE)
    assert metrics["noise_floor_source"] == ("rounding of the rows" if columns < WIDE else "float32 products")


def test_a_mixed_block_has_the_floor_of_its_mixture():
    """A wide parameter of tiny gradients beside a narrow one: float32 products of the tiny ones hide little."""
    narrow, wide = with_spectrum(np.geomspace(1, 1e-7, N), 500), with_spectrum(np.full(N, 1e-9), WIDE, seed=1)
    rows = {"layers.0.narrow.weight": narrow, "layers.0.wide.weight": wide}
    metrics = precomputed(rows)["per_block"]["layer_0"]
    truth = fisher_eigenvalues(np.concatenate([narrow, wide], axis=1))
    assert metrics["numerical_rank"] == N
    np.testing.assert_allclose(metrics["eigenvalues"], truth, rtol=1e-4)
    heavy = precomputed({"layers.0.narrow.weight": narrow, "layers.0.wide.weight": 1e3 * wide})["per_block"]["layer_0"]
    assert heavy["noise_floor_source"] == "float32 products"
    assert heavy["noise_floor"] == pytest.approx(EPS[torch.float32] * N * (N * 1e-3), rel=0.1)  # N eps of its trace


def test_a_run_knows_the_products_of_each_of_its_grams(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 2))
    data = {"x": torch.randn(12, 300), "labels": torch.arange(12) % 2}

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    for representation in ("dense", "factors"):
        config = sf.SpectralConfig(batch_tokens=10**6, representation=representation)
        run = sf.collect(model, data, tmp_path / representation, config=config, loss=loss)
        blocks = run.spectrum("parameter").blocks
        # 12 positions of factors are multiplied pairwise, in float64
        wide = "float32 products" if representation == "dense" else "rounding of the rows"
        assert blocks["0.weight"].floor_source == wide
        assert blocks["2.weight"].floor_source == "rounding of the rows"
        double = run.spectrum("parameter", config=run.config.replace(dtype_gram=torch.float64)).blocks
        assert double["0.weight"].floor_source == "rounding of the rows"


def test_a_float32_eigensolver_has_a_floor_of_its_own():
    rows = {"layers.0.weight": with_spectrum(np.geomspace(1, 1e-10, N), 200)}
    metrics = precomputed(rows, dtype_eigensolve=torch.float32)["per_block"]["layer_0"]
    assert metrics["noise_floor_source"] == "float32 eigensolver"
    assert metrics["noise_floor"] == pytest.approx(N * EPS[torch.float32] * metrics["largest_eigenvalue"])


# rounding of the backward pass reaches a block from its own layers


def test_a_large_layer_does_not_hide_the_eigenvalues_of_a_small_one():
    truth = np.geomspace(1e-10, 1e-15, N)
    rows = {"layers.0.weight": with_spectrum(truth, 100), "head.weight": with_spectrum(np.full(N, 1e2), 100, seed=1)}
    results = precomputed(rows)
    assert (truth < 2.0**-48 * N * 1e2).sum() == 12  # what the whole's trace would hide
    block = results["per_block"]["layer_0"]
    assert block["numerical_rank"] == N
    np.testing.assert_allclose(block["eigenvalues"], fisher_eigenvalues(rows["layers.0.weight"]), rtol=1e-4)


def test_a_parameter_whose_gradient_is_rounding_of_its_layer_is_noise():
    rows = {"layers.0.k.weight": with_spectrum(np.full(N, 1.0), 100)}
    rows["layers.0.k.bias"] = 1e-8 * with_spectrum(np.full(N, 1.0), 30, seed=1)
    blocks = precomputed(rows, block_structure="parameter")["per_block"]
    assert blocks["layers.0.k.bias"]["numerical_rank"] == 0
    assert blocks["layers.0.k.bias"]["noise_floor_source"] == "rounding of the backward pass"
    assert blocks["layers.0.k.weight"]["numerical_rank"] == N


def test_a_layer_that_rounding_of_the_whole_could_make_is_held_against_the_whole():
    u = 2.0**-24
    assert backward_noise(torch.float32, 3 * u**2, 1.0) == u**2
    assert backward_noise(torch.float32, 5 * u**2, 1.0) == 5 * u**4


# errors, block by block


def test_errors_of_a_union_are_those_of_the_blocks(tmp_path):
    blocks = {"a": torch.nn.Linear(300, 300, bias=False), "b": torch.nn.Linear(300, 2)}
    model = nn.Sequential(*blocks.values())
    data = {"x": torch.randn(12, 300), "labels": torch.arange(12) % 2}

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    config = sf.SpectralConfig(batch_tokens=10**6, representation="dense")
    spectrum = sf.collect(model, data, tmp_path / "run", config=config, loss=loss).spectrum("parameter")
    expected = {
        value: error
        for block in spectrum.blocks.values()
        for value, error in zip(block.eigenvalues, block.relative_errors, strict=True)
    }
    whole = spectrum.global_
    assert [expected[value] for value in whole.eigenvalues] == whole.relative_errors.tolist()


# centering and weights


def exact_eigenvalues(G, weights, center):
    """Return the eigenvalues of the weighted (co)variance of float rows, by arithmetic of 120 digits."""
    with mpmath.workdps(120):
        w = [mpmath.mpf(float(weight)) for weight in weights]
        total, M = sum(w), mpmath.matrix(np.asarray(G, dtype=np.float64).tolist())
        for j in range(M.cols):
            mean = sum(w[i] * M[i, j] for i in range(M.rows)) / total if center else mpmath.mpf(0)
            for i in range(M.rows):
                M[i, j] = (M[i, j] - mean) * mpmath.sqrt(w[i] / total)
        values = mpmath.eigsy(M * M.T, eigvals_only=True)
        return np.array(sorted((float(value) for value in values), reverse=True))


def hard_rows(case, seed):
    generator = np.random.default_rng(seed)
    base, decades = generator.standard_normal((12, 20)), 10.0 ** generator.permutation(np.linspace(-38, 30, 12))
    return {
        "plain": base,
        "mean": base + 30.0,
        "decades": base * decades[:, None],
        "mean of decades": (1 + 1e-3 * base) * decades[:, None],
        "columns": base[:, :12] * decades[None, :],
        "huge": 1e28 * (1 + 1e-3 * base * 10.0 ** generator.uniform(-7, 0, (12, 1))),
    }[case].astype(np.float32)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("case", ["plain", "mean", "decades", "mean of decades", "columns", "huge"])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_eigenvalue_above_the_floor_is_wrong_by_more_than_it_says(case, center, seed, tmp_path):
    """Rows over 68 decades; weights over 24 where rows are tame."""
    G = torch.from_numpy(hard_rows(case, seed))
    weighted = case in ("plain", "mean")
    weights = 10.0 ** np.random.default_rng(seed).permutation(np.linspace(-12, 12, 12)) if weighted else np.ones(12)
    model = nn.Linear(G.shape[1], 1, bias=False)

    def loss(model, batch):
        return model(batch["x"]).squeeze(1)

    for store_centered in (False, True) if center and not weighted else (False,):
        config = sf.SpectralConfig(store_centered=store_centered, batch_tokens=10**6, chunk_size=12)
        run = sf.collect(model, {"x": G}, tmp_path / f"{store_centered}", config=config, loss=loss)
        block = run.spectrum("none", center, weights=weights if weighted else None).global_
        above = block.above_floor
        truth = exact_eigenvalues(G, weights, center)[: len(above)]
        assert above.any()
        error = np.abs(block.eigenvalues[above] / truth[above] - 1)
        assert (error <= block.relative_errors[above]).all(), (error, block.relative_errors[above])


def test_what_centering_subtracts_counts():
    scale = {"largest": 1.0, "trace": 2.0, "n_samples": 8, "product": torch.float32, "roundoff": 0.0}
    before = noise_floor(**scale, raw=RawScale(1e6, 1e6, True, True))
    assert before.value == 4 * EPS[torch.float32] * 1e6
    assert before.error == EPS[torch.float32] * 1e6
    double = noise_floor(**scale, raw=RawScale(1e6, 0.0, False, True))
    assert double.value == 4 * EPS[torch.float64] * 1e6
    assert double.source == "float64 products"
