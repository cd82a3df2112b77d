"""Whole runs whose first samples mislead the probe, by every producer; and parameters that no sample reaches."""

import float64_loop
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

import streamfisher as sf
from streamfisher.gradients import PlainAutograd

N, LATE = 12, 8


class EqualLinear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight * 0.25, self.bias)


class Layer(nn.Module):
    """Goes through `odd`, and through `a` once more without calling it, where a sample is `on`."""

    def __init__(self):
        super().__init__()
        self.a, self.odd = nn.Linear(4, 4), EqualLinear(4, 4)

    def forward(self, h, on):
        h = h + torch.tanh(self.a(h))
        h = h + on[:, None, None] * self.odd(h)
        return h + on[:, None, None] * linear(h, self.a.weight) if bool(on.any()) else h


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.layers = nn.Linear(4, 4), nn.ModuleList([Layer() for _ in range(3)])
        self.out, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x, on):
        h = self.inp(x)
        for layer in self.layers:
            h = layer(h, on)
        return self.out(h.mean(1))


def loss(model, batch):
    return cross_entropy(model(batch["x"], batch["on"]), batch["labels"], reduction="none")


def samples():
    x = torch.randn(N, 5, 4, generator=torch.Generator().manual_seed(1)).double()
    return [{"x": x[i], "on": torch.tensor(float(i >= LATE)).double(), "labels": torch.tensor(i % 3)} for i in range(N)]


@pytest.mark.parametrize("stream, representation", [("none", "dense"), ("none", "factors"), ("layers", "factors")])
def test_later_samples_are_right_by_every_producer(stream, representation, tmp_path, monkeypatch, capsys):
    slow, one_by_one = [], PlainAutograd.one_by_one

    def count(self, batch, out, tensors, projected=None):
        slow.append(sorted(tensors))
        return one_by_one(self, batch, out, tensors, projected)

    monkeypatch.setattr(PlainAutograd, "one_by_one", count)
    config = sf.SpectralConfig(chunk_size=4, stream=stream, representation=representation)
    run = sf.collect(Stack().double(), samples(), tmp_path / "run.zarr", loss=loss, config=config)
    assert "every row of unused.weight, unused.bias is zero" in capsys.readouterr().err
    assert bool(run.manifest.layout["streamed"]) == (stream == "layers")
    truth = float64_loop.gradient_rows(Stack().double(), samples(), loss)
    for name, rows in truth.items():
        stored = run.store.rows.columns(name, 0, run.parameters[name])
        assert np.linalg.norm(stored - rows) <= 1e-10 * np.linalg.norm(rows), name
    assert slow and not any("inp" in name or "out" in name for names in slow for name in names)
    assert '"zero rows", "parameters": ["unused.weight", "unused.bias"]' in (run.path / "log.jsonl").read_text()


def test_nothing_is_said_where_every_parameter_has_a_gradient(tmp_path, capsys):
    config = sf.SpectralConfig(chunk_size=4, exclude=("unused.*",))
    sf.collect(Stack().double(), samples(), tmp_path / "run.zarr", loss=loss, config=config)
    assert "every row" not in capsys.readouterr().err


class Keeping(nn.Module):
    """In eval mode the first forward keeps a table made of a parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.table, self.kept = nn.Linear(4, 4), nn.Parameter(torch.randn(9)), None
        self.places = (torch.arange(5)[:, None] - torch.arange(5)) + 4

    def train(self, mode=True):
        self.kept = None if mode else self.kept
        return super().train(mode)

    def forward(self, x):
        bias = self.table[self.places]
        if not self.training:
            bias = self.kept = bias if self.kept is None else self.kept
        return (torch.softmax(self.q(x) @ x.mT + bias, -1) @ x).mean(1)


class Making(Keeping):
    def forward(self, x):
        return (torch.softmax(self.q(x) @ x.mT + self.table[self.places], -1) @ x).mean(1)


@pytest.mark.parametrize("mode", [True, False])
def test_a_table_that_the_model_keeps_hides_no_parameter_of_a_run(mode, tmp_path):
    data = [{key: sample[key] for key in ("x", "labels")} for sample in samples()]
    model = Keeping().double().train(mode)
    run = sf.collect(model, data, tmp_path / "run.zarr", config=sf.SpectralConfig(chunk_size=4))
    assert model.kept is None and all(module.training == mode for module in model.modules())

    def classified(model, batch):
        return cross_entropy(model(batch["x"]), batch["labels"], reduction="none")

    for name, rows in float64_loop.gradient_rows(Making().double(), data, classified).items():
        stored = run.store.rows.columns(name, 0, run.parameters[name])
        assert np.linalg.norm(stored - rows) <= 1e-10 * np.linalg.norm(rows), name
