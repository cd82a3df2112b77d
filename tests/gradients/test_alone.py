"""What a sample alone is, where a batch of one is not what it seems."""

import json

import numpy as np
import pytest
import torch
from gradients.token_model import assert_equal, batch_of, truth_of
from torch import nn

from streamfisher.errors import LossError
from streamfisher.gradients import GradientEngine, ProbeReport
from streamfisher.models import resolve_loss


class MaskedInBatches(nn.Module):
    """A recurrence that heeds its mask only if there are several samples, as some linear attentions do."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        if attention_mask is not None and len(x) > 1:
            x = x * attention_mask[..., None]
        return self.head(x + torch.tanh(self.mix(x)).sum(1, keepdim=True))


def unbiased():
    torch.manual_seed(0)
    model = MaskedInBatches().double()
    nn.init.zeros_(model.mix.bias)
    model.mix.bias.requires_grad_(False)  # what is masked before it is not masked behind it
    return model


def stripped(batch, i):
    kept = batch["attention_mask"][i] != 0
    return {"input_ids": batch["input_ids"][i][kept]}


@pytest.mark.parametrize("left", [False, True])
def test_a_model_that_masks_larger_batches_only_is_held_against_the_unpadded_sample(left):
    model, batch = unbiased(), batch_of(5, 6)
    if left:
        batch = {key: value.flip(1) for key, value in batch.items()}
    loss = resolve_loss(model, batch, "causal")
    with GradientEngine(model, loss) as engine:
        report = engine.probe(batch)
        out = engine.allocate(5)
        engine.rows(batch, out)
        one = {key: value[1:2] for key, value in batch.items()}
        single = engine.allocate(1)
        engine.rows(one, single)
    assert report.alone == "unpadded"
    truth = {name: [] for name in out}
    for i in range(5):
        sample = stripped(batch, i)
        for name, rows in truth_of(model, {key: value[None] for key, value in sample.items()}, loss).items():
            truth[name].append(rows[0])
    assert_equal(out, {name: np.stack(rows) for name, rows in truth.items()})
    assert all(torch.allclose(single[name][0], out[name][1], rtol=1e-10, atol=1e-14) for name in out)


def test_the_report_says_how_samples_are_taken_alone():
    model, batch = unbiased(), batch_of(4, 6)
    with GradientEngine(model, resolve_loss(model, batch, "causal")) as engine:
        report = engine.probe(batch)
    stored = ProbeReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert stored == report
    with GradientEngine(model, resolve_loss(model, batch, "causal")) as engine:
        engine.apply_routes(stored)
        assert engine.plain.alone == stored.alone == "unpadded"


class WrongAlone(torch.autograd.Function):
    """As some kernels: the gradient of a batch of one is garbage."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if len(grad) > 1 else 3 * grad


class Kernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(WrongAlone.apply(torch.tanh(self.first(x))))


class RightKernel(Kernel):
    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_where_a_batch_of_one_has_a_wrong_gradient_a_sample_is_taken_twice():
    torch.manual_seed(0)
    model, batch = Kernel().double(), {"x": torch.randn(5, 6).double(), "labels": torch.arange(5) % 3}
    loss = resolve_loss(model, batch)
    with GradientEngine(model, loss) as engine:
        report = engine.probe(batch)
        out, single = engine.allocate(5), engine.allocate(1)
        engine.rows(batch, out)
        engine.rows({key: value[3:4] for key, value in batch.items()}, single)
    assert report.alone == "twice"
    right = RightKernel().double()
    right.load_state_dict(model.state_dict())
    assert_equal(out, truth_of(right, batch, loss))
    assert all(torch.allclose(single[name][0], out[name][3], rtol=1e-12) for name in out)


@pytest.mark.parametrize("by", ["count", "mean"])
def test_a_loss_that_counts_the_samples_of_its_batch_is_not_excused(by):
    def loss(model, batch):
        y = model(batch["x"]).square().sum(1)
        return y / len(y) if by == "count" else y - 0.1 * y.mean()

    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(6, 3)).double(), {"x": torch.randn(4, 6).double()}
    with GradientEngine(model, resolve_loss(model, batch, loss)) as engine, pytest.raises(LossError, match="couples"):
        engine.probe(batch)
