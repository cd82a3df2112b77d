"""The guard watches a run for samples that take another path through the model than the probed ones did."""

import pytest
import torch
from torch import nn

import streamfisher as sf
from streamfisher.errors import CaptureError


def run(path, **options):
    torch.manual_seed(0)
    data = torch.arange(36, dtype=torch.float64).reshape(12, 3)
    batch = {"input_ids": data, "labels": torch.full((12,), 1.5, dtype=torch.float64)}
    config = sf.SpectralConfig(chunk_size=6, **{"guard_every": 1, **options})
    return sf.collect(nn.Sequential(nn.Linear(3, 1)).double(), batch, path / "run.zarr", config=config)


def test_honest_rows_pass(tmp_path):
    assert run(tmp_path).info()["complete"]


def test_rows_that_do_not_sum_to_the_batch_gradient_stop_the_run(tmp_path, monkeypatch):
    from streamfisher.gradients import GradientEngine

    rows_of = GradientEngine.rows

    def spoil(self, batch, out, factored=()):
        result = rows_of(self, batch, out, factored)
        if float(batch["input_ids"][0, 0]) > 10:
            out["0.weight"][0] *= 1.01
        return result

    monkeypatch.setattr(GradientEngine, "rows", spoil)
    with pytest.raises(CaptureError, match=r"0.weight do not sum to its ordinary gradient on samples from 6 on"):
        run(tmp_path)


def test_the_guard_can_be_switched_off(tmp_path, monkeypatch):
    from streamfisher.gradients import GradientEngine

    def forbidden(self, *_):
        raise AssertionError("the guard ran")

    monkeypatch.setattr(GradientEngine, "guard", forbidden)
    with pytest.raises(AssertionError, match="the guard ran"):
        run(tmp_path / "on")
    assert run(tmp_path / "off", guard_every=0).info()["complete"]
