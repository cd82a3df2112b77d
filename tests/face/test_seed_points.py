"""The thirteen corrections of the module that streamfisher grew out of, and what it still got wrong: one test each."""

import os
import subprocess
import sys
from types import SimpleNamespace

import float64_loop
import numpy as np
import pytest
import torch
from torch import nn

from streamfisher import FisherSpectral, SpectralConfig
from streamfisher.blocks import assign_blocks
from streamfisher.reduction import draw_columns


class TinyCausalModel(nn.Module):
    """A causal bag of embeddings: position t sees the mean of tokens 0 to t."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(6, 11, bias=False)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed_tokens(input_ids)
        x = x.cumsum(dim=1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.lm_head(self.dropout(x))


@pytest.fixture
def model():
    return TinyCausalModel().double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 11, (7, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    labels = ids.clone()
    labels[4, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def truth(model, batch, names=None, center=False):
    samples = [{key: value[i] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]
    rows = float64_loop.gradient_rows(model, samples, float64_loop.causal_token_loss)
    return float64_loop.eigenvalues(rows, names, center)


def compute(model, batch, **options):
    arguments = {
        key: options.pop(key) for key in ("block_structure", "center_gradients", "n_samples") if key in options
    }
    return FisherSpectral(config=SpectralConfig(**options)).compute_fisher_spectrum(model, batch, **arguments)


def eigenvalues(results, block="global"):
    return np.array(results["per_block"][block]["eigenvalues"])


def test_01_loss_is_the_masked_shifted_sum_over_tokens(model, batch):
    found = eigenvalues(compute(model, batch, block_structure="none"))
    np.testing.assert_allclose(found, truth(model, batch), rtol=1e-9, atol=1e-15)


def test_01_a_sum_not_a_mean(model, batch):
    """Repeating a position-wise model's sequence doubles its gradient; a mean would leave it unchanged."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).double()
    ids = torch.tensor([[1, 2], [3, 4]])
    once = {"input_ids": ids, "labels": torch.tensor([[2, 3], [4, 1]])}
    twice = {key: value.repeat(1, 2) for key, value in once.items()}
    one = compute(model, once, block_structure="none", loss="token")["global"]["trace"]
    two = compute(model, twice, block_structure="none", loss="token")["global"]["trace"]
    np.testing.assert_allclose(two, 4 * one, rtol=1e-12)


def test_02_subsampling_is_seeded_by_a_stable_hash():
    """Python salts `hash()` differently in every process; SHA-1 of the block's name it is not."""
    code = (
        "from streamfisher.reduction.subsets import draw_columns; "
        "print(draw_columns({'a': 1000}, {'layer_0': ['a']}, 5, 42)['a'].columns.tolist())"
    )
    here = draw_columns({"a": 1000}, {"layer_0": ["a"]}, 5, 42)["a"].columns.tolist()
    for salt in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": salt}, capture_output=True, text=True
        )
        assert there.stdout.strip() == str(here)


def test_03_regularization_never_touches_a_solve_that_succeeds(model, batch):
    small = compute(model, batch, block_structure="none", regularization=0.0)
    large = compute(model, batch, block_structure="none", regularization=1.0)
    assert small["global"]["eigenvalues"] == large["global"]["eigenvalues"]
    assert large["global"]["jitter"] == 0.0


def test_03_regularization_as_jitter_on_failure_is_said(model, batch, monkeypatch):
    from streamfisher.solving import eigen

    drive, calls = eigen._drive, []

    def fail_first(driver, matrix):
        calls.append(driver)
        if len(calls) <= 2:
            raise np.linalg.LinAlgError("did not converge")
        return drive(driver, matrix)

    monkeypatch.setattr(eigen, "_drive", fail_first)
    results = compute(model, batch, block_structure="none", regularization=0.0)
    assert results["per_block"]["global"]["jitter"] == 10 * np.finfo(np.float64).eps
    assert "jitter" in results["per_block"]["global"]["solver"]


@pytest.mark.parametrize("center", [False, True])
def test_04_streaming_is_out_of_core_and_honours_centering(model, batch, center, tmp_path):
    options = {"block_structure": "layer", "center_gradients": center}
    reference = compute(model, batch, **options)
    for mode in ("chunked", "streaming"):
        other = compute(
            model, batch, storage_mode=mode, chunk_size=3, store_path=str(tmp_path / f"{mode}.zarr"), **options
        )
        for block in reference["per_block"]:
            np.testing.assert_allclose(eigenvalues(other, block), eigenvalues(reference, block), rtol=1e-10, atol=1e-18)
    assert (tmp_path / "streaming.zarr" / "gradients").is_dir()
    np.testing.assert_allclose(
        eigenvalues(compute(model, batch, block_structure="none", center_gradients=center)),
        truth(model, batch, center=center),
        atol=1e-12,
    )


def test_05_determinism_is_complete_and_hands_the_global_state_back(model, batch):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    environment = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    first = compute(model, batch, use_deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == environment
    assert torch.equal(torch.get_rng_state(), before)
    assert first == compute(model, batch, use_deterministic=True)


@pytest.mark.parametrize("storage_mode", ["full", "chunked", "streaming"])
def test_06_empty_input_warns_and_returns_an_empty_result(model, batch, storage_mode):
    spectral = FisherSpectral(config=SpectralConfig(storage_mode=storage_mode))
    empty = {"input_ids": torch.zeros(0, 4, dtype=torch.long)}
    single = {key: value[:1] for key, value in batch.items()}
    cases = [
        ((model, batch), {"precomputed_gradients": []}),
        ((model, empty), {}),
        ((model, {}), {}),
        ((model, single), {}),
    ]
    for arguments, options in cases:
        with pytest.warns(UserWarning, match="empty Fisher spectrum"):
            results = spectral.compute_fisher_spectrum(*arguments, **options)
        assert results["per_block"] == {}
        assert "at least 2" in results["metadata"]["error"]


def test_07_layers_of_many_families_are_found():
    names = ["model.layers.3.a", "encoder.layer.3.a", "transformer.h.3.a", "blocks.3.a", "encoder.block.3.layer.0.a"]
    for name in names:
        assert list(assign_blocks([name], "layer").values()) == ["layer_3"]


def test_08_gated_mlps_and_their_kin_are_mlp():
    for part in (
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "mlp.c_fc",
        "fc1",
        "feed_forward.w1",
        "moe.experts.0.w2",
    ):
        assert list(assign_blocks([f"model.layers.0.{part}.weight"], "module").values()) == ["mlp"]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_09_eigensolve_device_is_a_choice(model, batch, device):
    """Without a GPU, 'cuda' solves on the CPU and the result says with what."""
    results = compute(model, batch, block_structure="none", eigensolve_device=device)
    expected = "torch-cuda" if device == "cuda" and torch.cuda.is_available() else "lapack-syevd"
    assert results["per_block"]["global"]["solver"] == expected


def test_10_rank_guard_one_parameter_and_no_parameters():
    gradients = [{"w": torch.tensor([float(i)]), "empty": torch.zeros(0)} for i in range(4)]
    results = FisherSpectral().compute_fisher_spectrum(None, None, None, "parameter", precomputed_gradients=gradients)
    assert results["per_block"]["w"]["eigenvalues"] == [3.5]  # (0 + 1 + 4 + 9) / 4
    assert results["per_block"]["empty"]["n_eigenvalues"] == 0
    assert results["per_block"]["empty"]["reason"] == "no parameters in this block"


def test_11_metadata_says_what_n_counts_and_how_it_was_normalised(model, batch):
    facts = compute(model, batch)["metadata"]
    assert facts["sample_unit"] == "sequence"
    assert facts["n_samples"] == 7
    assert facts["normalization"] == "(1/N) * G^T G"
    assert facts["dtype_model"] == facts["dtype_row"] == "float64"
    assert facts["n_target_tokens"] == 7 * 8 - 4 - 2


def test_12_gradients_are_taken_in_eval_mode_and_the_mode_is_restored(batch):
    model = TinyCausalModel(dropout=0.5).double()
    model.train()
    model.layers[0].eval()
    found = eigenvalues(compute(model, batch, block_structure="none"))
    np.testing.assert_allclose(found, truth(model, batch), rtol=1e-9, atol=1e-15)
    assert model.training and model.lm_head.training and not model.layers[0].training
    assert (
        "eval" in FisherSpectral.__doc__
        and "BatchNorm" in FisherSpectral.__doc__
        and "dropout" in FisherSpectral.__doc__
    )


def test_13_there_are_no_dead_flags():
    """Every field of the config is read somewhere outside of `config.py`."""
    from dataclasses import fields
    from pathlib import Path

    import streamfisher

    assert "use_vmap" not in {field.name for field in fields(SpectralConfig)}
    package = Path(streamfisher.__file__).parent
    text = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name not in ("config.py", "options.py"))
    unused = [field.name for field in fields(SpectralConfig) if f"config.{field.name}" not in text]
    assert unused == []


# What the module still got wrong


def test_unit_token_is_one_gradient_per_token(model, batch):
    results = compute(model, batch, block_structure="none", sample_unit="token")
    facts = results["metadata"]
    assert facts["sample_unit"] == "token"
    assert facts["n_samples"] == facts["n_target_tokens"] == 7 * 8 - 4 - 2
    assert facts["n_sequences"] == 7
    sequences = compute(model, batch, block_structure="none")
    assert results["global"]["trace"] != pytest.approx(sequences["global"]["trace"] / 8, rel=1e-3)


def test_small_gradients_keep_their_spectrum(batch):
    gradients = [{"w": 1e-12 * torch.randn(20, generator=torch.Generator().manual_seed(i))} for i in range(6)]
    results = FisherSpectral().compute_fisher_spectrum(None, None, None, "none", precomputed_gradients=gradients)
    assert results["global"]["numerical_rank"] == 6
    assert 0 < results["global"]["largest_eigenvalue"] < 1e-20


def test_more_samples_than_parameters_are_still_solved_exactly():
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(300, 7, generator=generator, dtype=torch.float64)
    results = FisherSpectral().compute_fisher_spectrum(
        None, None, None, "none", precomputed_gradients=[{"w": row} for row in G]
    )
    expected = np.linalg.eigvalsh((G.T @ G / 300).numpy())[::-1]
    np.testing.assert_allclose(results["per_block"]["global"]["eigenvalues"], expected, rtol=1e-12)
    np.testing.assert_allclose(results["global"]["trace"], expected.sum(), rtol=1e-12)


def test_parameter_subsampling_is_off_unless_asked_for_and_rescaled(model, batch):
    exact = compute(model, batch, block_structure="none")
    assert exact["metadata"]["parameter_subsampling"] is None
    traces = []
    for seed in range(16):
        results = compute(model, batch, block_structure="none", max_params_per_block=40, seed=seed)
        assert results["metadata"]["parameter_subsampling"] == 40
        traces.append(results["global"]["trace"])
    assert np.mean(traces) == pytest.approx(
        exact["global"]["trace"], rel=4 * np.std(traces) / exact["global"]["trace"] / 6
    )


def test_a_bad_sample_is_an_error_or_counted_and_named(batch):
    from streamfisher.errors import NonFiniteError

    class Breaks(TinyCausalModel):
        def forward(self, input_ids, attention_mask=None):
            logits = super().forward(input_ids, attention_mask)
            return logits * torch.where(input_ids[:, :1, None] == 10, torch.nan, 1.0)

    model = Breaks().double()
    batch["input_ids"][:, 0] = 1
    batch["input_ids"][3, 0] = 10
    batch = {"input_ids": batch["input_ids"]}
    with pytest.raises(NonFiniteError, match="sample 3"):
        compute(model, batch)
    for mode in ("full", "chunked", "streaming"):
        facts = compute(model, batch, on_nonfinite="skip", storage_mode=mode, chunk_size=2)["metadata"]
        assert facts["n_samples"] == 6
        assert list(facts["skipped_samples"]) == ["3"]


# The face it had


def test_the_call_of_the_old_module_works_with_the_import_line_changed(model, batch):
    config = SpectralConfig(
        seed=42,
        use_deterministic=True,
        eigensolve_device="cpu",
        regularization=1e-10,
        dtype_eigensolve=torch.float64,
    )
    spectral = FisherSpectral(config=config)
    results = spectral.compute_fisher_spectrum(model, batch, block_structure="layer")
    assert list(results["per_block"]) == ["embedding", "layer_0", "layer_1", "output"]
    expected = {
        "n_samples",
        "n_params",
        "n_eigenvalues",
        "largest_eigenvalue",
        "second_eigenvalue",
        "spectral_gap",
        "condition_number",
        "effective_rank",
        "top_eigenvalues",
        "trace",
    }
    for metrics in results["per_block"].values():
        assert expected <= metrics.keys()
    assert expected | {"n_total_eigenvalues", "total_params"} <= results["global"].keys()
    assert results["global"]["gd_convergence_scale"] == 1 / results["global"]["largest_eigenvalue"]
    union = sorted((v for block in results["per_block"].values() for v in block["eigenvalues"]), reverse=True)
    assert results["global"]["eigenvalues"] == union


def test_vectors_as_inputs(batch):
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    generator = torch.Generator().manual_seed(0)
    vectors = {"input_ids": torch.randn(9, 5, generator=generator).double(), "labels": torch.arange(9) % 3}
    results = compute(model, vectors, block_structure="none")

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")

    samples = [{key: value[i] for key, value in vectors.items()} for i in range(9)]
    rows = float64_loop.gradient_rows(model, samples, loss)
    np.testing.assert_allclose(results["global"]["eigenvalues"], float64_loop.eigenvalues(rows), rtol=1e-9)
    assert results["metadata"]["sample_unit"] == "example"


def test_a_model_that_returns_only_a_loss_is_taken_one_sample_at_a_time():
    class LossOnly(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(4, 1).double()

        def forward(self, input_ids, labels=None):
            return SimpleNamespace(loss=((self.linear(input_ids).squeeze(-1) - labels) ** 2).mean())

    model = LossOnly()
    generator = torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randn(6, 4, generator=generator).double(), "labels": torch.arange(6.0).double()}
    results = compute(model, batch, block_structure="none")
    residual = (model.linear(batch["input_ids"]).squeeze(-1) - batch["labels"]).detach()
    G = 2 * residual[:, None] * torch.cat([batch["input_ids"], torch.ones(6, 1).double()], dim=1)
    expected = torch.linalg.eigvalsh(G.T @ G / 6).flip(0).numpy()
    np.testing.assert_allclose(results["global"]["eigenvalues"], expected, rtol=1e-9)
    assert results["metadata"]["loss_reduction"] == "model"


def test_precomputed_gradients_and_the_gradient_cache_give_the_same(model, batch):
    generator = torch.Generator().manual_seed(0)
    gradients = [{"layers.0.weight": torch.randn(3, 4, generator=generator)} for _ in range(5)]
    direct = FisherSpectral().compute_fisher_spectrum(None, None, precomputed_gradients=gradients)
    cached = FisherSpectral(gradient_cache=SimpleNamespace(per_sample_gradients=gradients))
    assert cached.compute_fisher_spectrum(None, None) == direct
    empty = FisherSpectral(gradient_cache=SimpleNamespace(per_sample_gradients=[]))
    assert empty.compute_fisher_spectrum(model, batch)["metadata"]["n_samples"] == 7


def test_n_samples_takes_the_first(model, batch):
    first = {key: value[:4] for key, value in batch.items()}
    assert compute(model, batch, n_samples=4)["global"] == compute(model, first)["global"]
