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

#: Of an eigenvalue, relatively; of float32 it is what the model's own arithmetic leaves, see `own_rounding`.
FLOAT64_TOLERANCE = 1e-9
#: Batched sums are added up in another order than those of one sample: the same rounding, but not the same numbers.
ANOTHER_ORDER = 4.0


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
    """Return a function from a case's name to its float32 model, its samples and their rows by plain autograd loops:
    in float64, the truth; and in float32, for what this machine's arithmetic leaves of it.
    """

    @functools.cache
    def of(case):
        make_model, make_samples, loss = CASES[case]
        torch.manual_seed(0)
        model, samples = make_model(), make_samples()
        rows, single = (
            float64_loop.gradient_rows(model, samples, loss, dtype) for dtype in (torch.float64, torch.float32)
        )
        return model, samples, rows, {name: single[name] - rows[name] for name in rows}

    return of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_every_eigenvalue_above_the_noise_floor_is_exact(case, dtype, truth, tmp_path):
    model, samples, rows, rounding = truth(case)
    config = sf.SpectralConfig(chunk_size=8, batch_tokens=64, use_deterministic=True, dtype_model=dtype)
    run = sf.collect(model, samples, tmp_path / "run.zarr", config=config)
    assert set(run.parameters) == set(rows), "every trainable parameter is captured"
    for structure in STRUCTURES:
        blocks = group_blocks(assign_blocks(rows, structure))
        for center in (False, True):
            spectrum = run.spectrum(structure, center)
            assert set(spectrum.blocks) == set(blocks)
            for key, names in blocks.items():
                moved = own_rounding(rounding, names, center) if dtype == torch.float32 else 0.0
                _compare(spectrum.blocks[key], float64_loop.eigenvalues(rows, names, center), moved)


def own_rounding(rounding, names, center):
    """Return how far the model's own float32 arithmetic may move a singular value of G / sqrt(N): |dG| / sqrt(N)."""
    return ANOTHER_ORDER * np.sqrt(float64_loop.eigenvalues(rounding, names, center)[0])


def _compare(block, expected, moved):
    """Rounding of the rows moves sigma_k by `moved` at most (Weyl); a Gram in float64 knows lambda_k to
    2^-53 lambda_1 / lambda_k, relatively. Where these exceed the tolerance, they are asked for.
    """
    assert len(block.eigenvalues) == len(expected)
    above, sigma = block.above_floor, np.sqrt(expected)
    attainable = (2 * sigma * moved + moved**2 + 2.0**-51 * expected[0])[above] / expected[above]
    error = np.abs(block.eigenvalues[above] / expected[above] - 1)
    assert (error <= np.maximum(FLOAT64_TOLERANCE, attainable)).all()
    assert (error <= block.relative_errors[above]).all() or (error <= FLOAT64_TOLERANCE).all()
    # What lies below the floor is called noise by both.
    np.testing.assert_allclose(block.eigenvalues[~above], expected[~above], atol=2 * block.noise_floor)
    trace_error = (2 * sigma * moved + moved**2).sum() + FLOAT64_TOLERANCE * expected.sum() + 2 * block.noise_floor
    assert abs(block.trace - expected.sum()) <= trace_error


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
