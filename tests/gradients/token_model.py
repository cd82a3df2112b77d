"""A small token model, a batch for it, and its rows beside the float64 loop's."""

from __future__ import annotations

import float64_loop
import numpy as np
import torch
from torch import nn

from streamfisher.gradients import GradientEngine
from streamfisher.models import batch_size, resolve_loss


class Model(nn.Module):
    """A small token model with a tied head, a reused layer and broadcast positions."""

    def __init__(self, tied=True, vocabulary=11, width=6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(16, width)
        self.reused = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.dropout = nn.Dropout(0.5)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        x += self.position(torch.arange(input_ids.shape[1])[None])
        x = x + torch.tanh(self.reused(x)).cumsum(1)
        x = x + torch.tanh(self.reused(self.norm(x)))
        return self.head(self.dropout(x))


def double(model=None, seed=0):
    torch.manual_seed(seed)
    return (model or Model()).double()


def batch_of(n=5, length=6):
    ids = torch.randint(0, 11, (n, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for i in range(n):
        mask[i, length - i % 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def squares(model, batch):
    return model(batch["input_ids"]).square().flatten(1).sum(1)


def truth_of(model, batch, loss):
    samples = [{key: value[i] for key, value in batch.items()} for i in range(batch_size(batch))]
    return float64_loop.gradient_rows(model, samples, loss)


def rows_of(model, batch, loss=None, n_rows=None, **options):
    chosen = resolve_loss(model, batch, loss)
    with GradientEngine(model, chosen, **options) as engine:
        report = engine.probe(batch)
        out = engine.allocate(n_rows or batch_size(batch))
        result = engine.rows(batch, out)
    return out, report, result, chosen


def assert_equal(out, truth, limit=1e-10):
    assert set(out) <= set(truth)
    for name, rows in out.items():
        error = np.linalg.norm(rows.double().numpy() - truth[name])
        assert error <= limit * max(np.linalg.norm(truth[name]), 1e-12), name
