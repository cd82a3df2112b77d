"""The guard watches a run for samples that take another path through the model than the probed ones did."""

import pytest
import torch
from torch import nn

import streamfisher as sf
from streamfisher.data import BatchRef, Unit, guarded_batches
from streamfisher.errors import CaptureError
from streamfisher.gradients import GradientEngine, PlainAutograd


def run(path, **options):
    torch.manual_seed(0)
    data = torch.arange(36, dtype=torch.float64).reshape(12, 3)
    batch = {"input_ids": data, "labels": torch.full((12,), 1.5, dtype=torch.float64)}
    config = sf.SpectralConfig(chunk_size=6, **{"guard_every": 1, **options})
    return sf.collect(nn.Sequential(nn.Linear(3, 1)).double(), batch, path / "run.zarr", config=config)


def test_honest_rows_pass(tmp_path):
    assert run(tmp_path).info()["complete"]


def test_rows_that_do_not_sum_to_the_batch_gradient_stop_the_run(tmp_path, monkeypatch):
    rows_of = GradientEngine.rows

    def spoil(self, batch, out, factored=(), *more):
        result = rows_of(self, batch, out, factored, *more)
        if float(batch["input_ids"][0, 0]) > 10:
            out["0.weight"][0] *= 1.01
        return result

    monkeypatch.setattr(GradientEngine, "rows", spoil)
    with pytest.raises(CaptureError, match=r"0.weight do not sum to its ordinary gradient on samples from 6 on"):
        run(tmp_path)


def test_the_guard_can_be_switched_off(tmp_path, monkeypatch):
    def forbidden(self, *_):
        raise AssertionError("the guard ran")

    monkeypatch.setattr(GradientEngine, "guard", forbidden)
    with pytest.raises(AssertionError, match="the guard ran"):
        run(tmp_path / "on")
    assert run(tmp_path / "off", guard_every=0).info()["complete"]


def test_two_batches_of_every_so_many_units_are_compared_the_first_and_a_random_one():
    units = [Unit(i, 4 * i, 4 * i + 4) for i in range(7)]
    batches = [BatchRef(u.start + 2 * k, u.start + 2 * k + 2, u, k) for u in units for k in range(2)]
    chosen = guarded_batches(batches, 3, seed=1)
    assert [batch.unit.index // 3 for batch in chosen] == [0, 0, 1, 1, 2, 2]
    assert [batch.start for batch in chosen[::2]] == [0, 12, 24]
    assert len(set(chosen)) == 6 and chosen == guarded_batches(iter(batches), 3, seed=1)
    assert {guarded_batches(batches, 7, seed)[1].start for seed in range(40)} == {batch.start for batch in batches[1:]}
    assert guarded_batches(batches[:1], 3, 0) == batches[:1] and guarded_batches(batches, 0, 0) == []


class Late(nn.Module):
    """Treats samples from a number on otherwise."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inner, self.out = how, nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, input_ids):
        h = torch.tanh(self.inner(input_ids / 36))
        late = (input_ids[:, :1] >= 15).to(h.dtype)
        if self.how == "mean":
            h = h - late * h.mean(0, keepdim=True)
        if self.how == "largest":
            h = h * (1 + late * h.abs().amax())
        return self.out(h)


@pytest.mark.parametrize("how", ["mean", "largest"])
@pytest.mark.parametrize("hold", ["host", "disk"])
def test_later_samples_that_a_model_mixes_are_refused(how, hold, tmp_path):
    torch.manual_seed(0)
    data = torch.arange(36, dtype=torch.float64).reshape(12, 3)
    batch = {"input_ids": data, "labels": torch.full((12,), 1.5, dtype=torch.float64)}
    config = sf.SpectralConfig(chunk_size=6, guard_every=1, hold=hold, keep_gradients="none")
    message = r"sample \d+ are others in its batch than alone: relative difference .*--batch-tokens 1"
    with pytest.raises(CaptureError, match=message):
        sf.collect(Late(how).double(), batch, tmp_path / "run.zarr", config=config)
    alone = config.replace(batch_tokens=1)
    assert sf.collect(Late(how).double(), batch, tmp_path / "alone.zarr", config=alone).info()["complete"]


def engine_on(model, loss="regression"):
    from streamfisher.models import resolve_loss

    torch.manual_seed(0)
    dtype = next(model.parameters()).dtype
    batch = {"input_ids": torch.randn(4, 3, dtype=dtype), "labels": torch.randn(4, 3, dtype=dtype)}
    return GradientEngine(model, resolve_loss(model, batch, loss)), batch


def test_one_ordinary_gradient_is_held_at_a_time(monkeypatch):
    engine, batch = engine_on(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double())
    with engine:
        engine.probe(batch)
        out = engine.allocate(4)
        engine.rows(batch, out)
        held, each = [], PlainAutograd.each_gradient

        def spy(self, batch, tensors, take, index=None):
            def look(name, grad):
                held.append([n for n, tensor in tensors.items() if tensor.grad is not None])
                take(name, grad)

            return each(self, batch, tensors, look, index)

        monkeypatch.setattr(PlainAutograd, "each_gradient", spy)
        assert max(engine.guard(batch, out).values()) < 1e-12
        assert held == [[]] * 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_gradient_that_comes_in_parts_is_compared_as_a_whole(reentrant):
    from torch.utils.checkpoint import checkpoint

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            h = self.first(x)
            for _ in range(2):
                h = torch.tanh(checkpoint(self.layer, h, use_reentrant=reentrant))
            return h

    engine, batch = engine_on(Twice().double())
    with engine:
        engine.probe(batch)
        out = engine.allocate(4)
        engine.rows(batch, out)
        assert max(engine.guard(batch, out).values()) < 1e-12
        out["layer.weight"][1] *= 1.001
        assert engine.guard(batch, out)["layer.weight"] > 1e-6


class Inside(nn.Module):
    """Computes in another dtype than that of its parameters."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.first, self.second = dtype, nn.Linear(3, 64), nn.Linear(64, 3)

    def forward(self, x):
        def linear(x, layer):
            weight, bias = layer.weight.to(self.dtype), layer.bias.to(self.dtype)
            return nn.functional.linear(x.to(self.dtype), weight, bias).to(layer.weight.dtype)

        return linear(torch.tanh(linear(x, self.first)), self.second)


@pytest.mark.parametrize("outside, inside", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32)])
def test_sums_agree_as_closely_as_the_model_computes(outside, inside):
    engine, batch = engine_on(Inside(inside).to(outside))
    with engine:
        report = engine.probe(batch)
        out = engine.allocate(4)
        engine.rows(batch, out)
        assert max(engine.guard(batch, out).values()) < engine.guard_tolerance
        out["first.weight"][2] *= 2
        assert engine.guard(batch, out)["first.weight"] > engine.guard_tolerance
    assert str(inside).removeprefix("torch.") in report.arithmetic
    assert engine.guard_tolerance == {torch.bfloat16: 5e-2, torch.float32: 1e-4}[inside]


def test_a_float64_model_is_probed_as_closely_as_before():
    engine, batch = engine_on(Inside(torch.float32).double())
    with engine:
        assert engine.probe(batch).tolerance < 1e-4
