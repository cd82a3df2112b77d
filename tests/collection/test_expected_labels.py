"""labels='expected': every class of an input by the root of its probability, which is the generalised Gauss-Newton."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

import streamfisher as sf
from streamfisher.collection import model_producer, survey
from streamfisher.errors import ConfigError
from streamfisher.gradients import Asked, Wave, factors, shared_forward

N, C = 9, 4


class Classifier(nn.Module):
    """Two linear layers, from vectors of 5 to 4 classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, C)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Convolutional(nn.Module):
    """A convolution, a norm without batch statistics and a linear layer, from images of 6 x 6 to 4 classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Linear(3 * 16, C)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


class Causal(nn.Module):
    """A causal model of 11 tokens: each position sees the mean of those up to it."""

    is_causal = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.embedding, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

    def forward(self, input_ids):
        x = self.embedding(input_ids).cumsum(1)
        return self.head(torch.tanh(x / torch.arange(1, x.shape[1] + 1)[:, None]))


def vectors(n=N):
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, C, (n,), generator=generator)
    return {"x": 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64), "labels": labels}


def images(n=N):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, C, (n,), generator=generator)
    return {"x": torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64), "labels": labels}


def tokens(n=3):
    generator = torch.Generator().manual_seed(4)
    return {"input_ids": torch.randint(0, 11, (n, 6), generator=generator)}


MODELS = {"vectors": (Classifier, vectors), "images": (Convolutional, images)}
TOKENS = {"sample_unit": "token", "chunk_size": 64}


def config(**options):
    return sf.SpectralConfig(labels="expected", dtype_compute="float64", **({"chunk_size": 8} | options))


def logits_jacobian(model, inputs):
    """Return logits (n, C) and their derivatives by all parameters (n, C, P), as plain autograd gives them."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    model.eval()

    def logits(values):
        output = functional_call(model, values, (inputs,))
        return getattr(output, "logits", output)

    jacobian = jacrev(logits)(parameters)
    found = logits(parameters)
    return found, torch.cat([part.flatten(found.dim()) for part in jacobian.values()], dim=-1)


def gauss_newton(logits, jacobian, kept=None):
    """Return `(1/n) sum_i J_i^T (diag p - p p^T) J_i`, of the classes that are kept: one part `p_c g_c g_c^T` each."""
    p = logits.softmax(-1)
    if kept is None:
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("ncp,ncd,ndq->pq", jacobian, hessian, jacobian) / len(p)
    gradients = jacobian - torch.einsum("nc,ncp->np", p, jacobian)[:, None]  # of log p_c
    return torch.einsum("nc,ncp,ncq->pq", p * kept, gradients, gradients) / len(p)


def leading(matrix):
    return torch.linalg.eigvalsh(matrix).flip(0).numpy()


def agree(block, truth):
    clear = block.above_floor
    assert clear.sum() >= 3
    np.testing.assert_allclose(block.eigenvalues[clear], leading(truth)[: len(clear)][clear], rtol=1e-9, atol=1e-16)
    assert block.trace == pytest.approx(float(torch.trace(truth)), rel=1e-12)


@pytest.mark.parametrize("hold", ["disk", "host"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_spectrum_is_that_of_the_generalised_gauss_newton_matrix(tmp_path, kind, hold):
    make, data = MODELS[kind]
    model = make().double()
    options = {} if hold == "disk" else {"keep_gradients": "none", "hold": "host"}
    run = sf.collect(model, data(), tmp_path / "run.zarr", config=config(**options))
    truth = gauss_newton(*logits_jacobian(model, data()["x"]))
    agree(run.spectrum("none").global_, truth)
    sizes = np.cumsum([0, *run.parameters.values()])
    places = zip(run.parameters, sizes[:-1], sizes[1:], strict=True)
    for name, start, stop in places:
        block = run.spectrum("parameter").blocks[name]
        part = leading(truth[start:stop, start:stop])
        clear = block.above_floor
        np.testing.assert_allclose(block.eigenvalues[clear], part[: len(clear)][clear], rtol=1e-9, err_msg=name)
    assert sf.verify(run) == []


def test_n_counts_inputs_and_results_say_so(tmp_path):
    run = sf.collect(Classifier().double(), vectors(), tmp_path / "run.zarr", config=config())
    facts = run.spectrum("none").metadata
    assert run.n_samples == N * C and facts["n_inputs"] == N and facts["classes_per_input"] == C
    assert facts["normalization"].startswith(f"({C}/N) * G^T G") and facts["labels"] == "expected"
    fields = run.store.samples.fields()
    np.testing.assert_array_equal(fields["input"], np.repeat(np.arange(N), C))
    np.testing.assert_array_equal(fields["class"], np.tile(np.arange(C), N))
    p = logits_jacobian(Classifier().double(), vectors()["x"])[0].softmax(-1)
    np.testing.assert_allclose(np.exp(-run.losses), p.reshape(-1), rtol=1e-12)


def agree_with_tokens(spectrum, model, samples, kept=None):
    """Hold a spectrum against the Gauss-Newton matrix of every target token, one after the other."""
    total, n = 0, 0
    for sample in samples:
        logits, jacobian = logits_jacobian(model, sample[None])
        for place in range(len(sample) - 1):
            total, n = total + gauss_newton(logits[:, place], jacobian[:, place], kept), n + 1
    agree(spectrum.global_, total / n)
    return n


def test_of_a_language_model_the_tokens_are_the_inputs(tmp_path):
    model = Causal().double()
    with pytest.raises(ConfigError, match="Give sample_unit='token'"):
        sf.collect(model, tokens(), tmp_path / "sequences.zarr", config=config())
    run = sf.collect(model, tokens(), tmp_path / "run.zarr", config=config(**TOKENS))
    assert run.n_samples == 11 * agree_with_tokens(run.spectrum("none"), model, tokens()["input_ids"])
    drawn = config(tokens_per_sequence=2, classes_per_sample=3, **TOKENS)
    some = sf.collect(model, tokens(), tmp_path / "some.zarr", config=drawn)
    assert some.n_samples == 18 and some.manifest.data["n_inputs"] == 6 and some.manifest.data["n_sequences"] == 3


def test_of_the_most_probable_classes_the_rest_is_a_bound(tmp_path):
    model, k = Classifier().double(), 2
    run = sf.collect(model, vectors(), tmp_path / "run.zarr", config=config(classes_per_sample=k))
    logits, jacobian = logits_jacobian(model, vectors()["x"])
    p = logits.softmax(-1)
    kept = torch.zeros_like(p).scatter(1, p.topk(k).indices, 1.0)
    agree(run.spectrum("none").global_, gauss_newton(logits, jacobian, kept))
    rest = 1 - p.topk(k).values.sum(-1)
    facts = run.spectrum("none").metadata["left_out_probability"]
    assert facts == pytest.approx({"mean": float(rest.mean()), "largest": float(rest.max())})
    np.testing.assert_allclose(run.store.samples.fields()["left_out"], rest.repeat_interleave(k), rtol=1e-9)
    # what is missing is at most twice that probability, carried to the parameters by each input's Jacobian
    missing = gauss_newton(logits, jacobian) - gauss_newton(logits, jacobian, kept)
    bound = sum(2 * m * torch.linalg.matrix_norm(J, 2) ** 2 for m, J in zip(rest, jacobian, strict=True)) / N
    assert 0 < leading(missing)[0] <= bound


def test_logistic_regression_has_a_closed_form(tmp_path):
    torch.manual_seed(5)
    model = nn.Linear(5, C, bias=False).double()
    x = vectors()["x"]
    run = sf.collect(model, {"input": x, "labels": vectors()["labels"]}, tmp_path / "run.zarr", config=config())
    p = torch.softmax(x @ model.weight.detach().T, -1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    truth = torch.einsum("ncd,ni,nj->cidj", hessian, x, x).reshape(5 * C, 5 * C) / N
    agree(run.spectrum("none").global_, truth)


def test_a_classifier_in_training_has_an_outlier_for_each_class_but_one(tmp_path):
    generator = torch.Generator().manual_seed(6)
    labels = torch.arange(40) % C
    x = 1 + torch.nn.functional.one_hot(labels, 5) + 0.3 * torch.randn(40, 5, generator=generator, dtype=torch.float64)
    model = Classifier().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    run = sf.collect(model, {"x": x, "labels": labels}, tmp_path / "run.zarr", config=config(chunk_size=32))
    values = run.spectrum("none").global_.eigenvalues
    ratios = values[:8] / values[1:9]
    assert ratios.argmax() == C - 2 and ratios[C - 2] > 4


def gradients(model, data, settings, factored=()):
    """Return the gradients of every sample, and how many samples the forward passes saw."""
    seen = []
    found = survey.survey(model, data, settings)
    with model_producer(model, found, settings) as producer:
        producer.probe()
        batches = found.batches(model, settings)
        producer.begin(Wave(0, tuple(producer.parameters), batches, tuple(batches)))
        hook = model.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        rows = []
        for batch in batches:
            asked = producer.allocate(len(batch), [name for name in producer.parameters if name not in factored])
            taken = producer.gradients(batch, Asked(asked, factored))
            shapes = {name: producer.parameters[name].shape for name in factored}
            formed = {n: factors.product(pairs, shapes[n], torch.float64) for n, pairs in taken.factors.items()}
            together = {**asked, **formed}
            rows.append(torch.cat([together[name] for name in producer.parameters], dim=1))
        hook.remove()
    return torch.cat(rows), sum(seen)


@pytest.mark.parametrize("factored", [(), ("first.weight", "head.weight", "conv.weight", "embedding.weight")])
@pytest.mark.parametrize("kind", [*MODELS, "tokens"])
def test_one_forward_pass_serves_all_classes_of_an_input(monkeypatch, kind, factored):
    make, data = {**MODELS, "tokens": (Causal, tokens)}[kind]
    options = {**TOKENS, "classes_per_sample": 7} if kind == "tokens" else {}
    settings = config(**(options | {"chunk_size": 30, "batch_tokens": 60}))  # cut in the middle of an input
    model, found = make().double(), []
    factored = [name for name, _ in model.named_parameters() if name in factored]
    for least in (1, 10**9):
        monkeypatch.setattr(shared_forward, "LEAST_INPUTS", least)
        monkeypatch.setattr(shared_forward, "LEAST_TOKENS", 10**9)
        found.append(gradients(model, data(), settings, factored))
    (shared, few), (plain, many) = found
    assert few <= many / 2 and shared.shape == plain.shape
    np.testing.assert_allclose(shared, plain, rtol=0, atol=1e-13 * float(plain.abs().max()))
