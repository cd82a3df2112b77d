"""The promise of exactness: every eigenvalue above the noise floor against a plain float64 autograd loop.

Through the whole way of the data: collect, Zarr, Dask, eigensolve; every block structure, centered and uncentered.
"""

import functools

import float64_loop
import numpy as np
import pytest
import torch

import streamfisher as sf
from streamfisher.blocks import STRUCTURES, assign_blocks, group_blocks
from streamfisher.demo import demo_samples, load_demo_model

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}


def ragged_samples(n, vocabulary, shortest=5, longest=14):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator)
    return [{"input_ids": torch.randint(1, vocabulary, (int(length),), generator=generator)} for length in lengths]


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    return transformers.LlamaForCausalLM(config)


def tiny_bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    return transformers.BertForMaskedLM(config)


def masked_lm_loss(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none"
    ).sum(dim=1)


def masked_lm_samples(n):
    samples = []
    for index, sample in enumerate(ragged_samples(n, 50)):
        labels = torch.full_like(sample["input_ids"], -100)
        where = torch.arange(index % 2, len(labels), 2)
        labels[where] = sample["input_ids"][where]
        masked = sample["input_ids"].clone()
        masked[where] = 3
        samples.append({"input_ids": masked, "labels": labels})
    return samples


#: What forward and backward passes of a few layers multiply a unit roundoff by.
ROUNDING = 32.0
CASES = {
    "demo": (
        load_demo_model,
        lambda: list(map(demo_samples(12, 32).__getitem__, range(12))),
        float64_loop.causal_token_loss,
    ),
    "gpt2": (tiny_gpt2, lambda: ragged_samples(20, 50), float64_loop.causal_token_loss),
    "llama": (tiny_llama, lambda: ragged_samples(20, 50), float64_loop.causal_token_loss),
    "bert": (tiny_bert, lambda: masked_lm_samples(20), masked_lm_loss),
}


@pytest.fixture(scope="module")
def truth():
    """Return a function from a case's name to its float32 model, its samples and their rows by the float64 loop."""

    @functools.cache
    def of(case):
        make_model, make_samples, loss = CASES[case]
        torch.manual_seed(0)
        model, samples = make_model(), make_samples()
        return model, samples, float64_loop.gradient_rows(model, samples, loss)

    return of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_every_eigenvalue_above_the_noise_floor_is_exact(case, dtype, truth, tmp_path):
    model, samples, rows = truth(case)
    config = sf.SpectralConfig(chunk_size=8, batch_tokens=64, use_deterministic=True, dtype_model=dtype)
    run = sf.collect(model, samples, tmp_path / "run.zarr", config=config)
    assert set(run.parameters) == set(rows), "every trainable parameter is captured"
    for structure in STRUCTURES:
        blocks = group_blocks(assign_blocks(rows, structure))
        for center in (False, True):
            spectrum = run.spectrum(structure, center)
            assert set(spectrum.blocks) == set(blocks)
            for key, names in blocks.items():
                _compare(spectrum.blocks[key], float64_loop.eigenvalues(rows, names, center), dtype)


def _compare(block, expected, dtype):
    """Rounding of the rows moves sigma_k by about u sigma_1, so lambda_k by u sqrt(lambda_1 / lambda_k), relatively;
    a Gram in float64 knows it to 2^-53 lambda_1 / lambda_k. Where these exceed the tolerance, they are asked for.
    """
    assert len(block.eigenvalues) == len(expected)
    above, tolerance = block.above_floor, TOLERANCE[dtype]
    decades = expected[0] / expected[above]
    attainable = ROUNDING * UNIT_ROUNDOFF[dtype] * np.sqrt(decades) + 4 * UNIT_ROUNDOFF[torch.float64] * decades
    error = np.abs(block.eigenvalues[above] / expected[above] - 1)
    assert (error <= np.maximum(tolerance, attainable)).all()
    assert (error <= block.relative_errors[above]).all() or (error <= tolerance).all()
    # What lies below the floor is called noise by both.
    np.testing.assert_allclose(block.eigenvalues[~above], expected[~above], atol=2 * block.noise_floor)
    np.testing.assert_allclose(block.trace, expected.sum(), rtol=tolerance, atol=2 * block.noise_floor)


def test_token_unit_is_one_gradient_per_token_loss(tmp_path):
    torch.manual_seed(0)
    model, sequences = tiny_gpt2().double(), ragged_samples(3, 50)
    tokens = []
    for sample in sequences:
        for position in range(1, len(sample["input_ids"])):
            labels = torch.full_like(sample["input_ids"], -100)
            labels[position] = sample["input_ids"][position]
            tokens.append({"input_ids": sample["input_ids"], "labels": labels})
    rows = float64_loop.gradient_rows(model, tokens, float64_loop.causal_token_loss)
    run = sf.collect(model, sequences, tmp_path / "run.zarr", config=sf.SpectralConfig(sample_unit="token"))
    spectrum = run.spectrum("none")
    np.testing.assert_allclose(spectrum.global_.eigenvalues, float64_loop.eigenvalues(rows), atol=1e-9)
    assert spectrum.metadata["sample_unit"] == "token"
    assert spectrum.metadata["n_samples"] == spectrum.metadata["n_target_tokens"] == len(tokens)
    assert spectrum.metadata["n_sequences"] == 3


def test_binary_logistic_regression_has_its_closed_form(tmp_path):
    """F = X^T diag((p - y)^2) X / N."""
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (40,), generator=generator)
    model = torch.nn.Linear(5, 1, bias=False).double()

    def loss(model, batch):
        logits = model(batch["x"]).squeeze(1)
        target = batch["y"].to(logits.dtype)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")

    run = sf.collect(model, {"x": X, "y": y}, tmp_path / "run.zarr", loss=loss)
    residual = torch.sigmoid(X @ model.weight.detach()[0]) - y
    expected = torch.linalg.eigvalsh(X.T @ (residual[:, None] ** 2 * X) / 40).flip(0)
    np.testing.assert_allclose(run.spectrum("none").global_.eigenvalues, expected.numpy(), rtol=1e-12)


def test_model_labels_give_the_true_fisher_in_expectation(tmp_path):
    """A softmax over C classes of x W^T: E F = mean over x of (diag(p) - p p^T) (x) x x^T."""
    generator = torch.Generator().manual_seed(2)
    X = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    model = torch.nn.Linear(3, 3, bias=False).double()
    p = torch.softmax(X @ model.weight.detach().T, dim=1)
    expected = sum(torch.kron(torch.diag(p[i]) - torch.outer(p[i], p[i]), torch.outer(X[i], X[i])) for i in range(4))
    repeats = 500
    data = {"input_ids": X.repeat(repeats, 1), "labels": torch.zeros(4 * repeats, dtype=torch.long)}
    config = sf.SpectralConfig(labels="model", chunk_size=500, batch_tokens=500)
    run = sf.collect(model, data, tmp_path / "run.zarr", config=config)
    found = run.spectrum("none").global_
    assert found.trace == pytest.approx(float(expected.trace()) / 4, rel=0.05)
    assert run.spectrum("none").metadata["labels"] == "model"
