"""Only what a model's own floating inputs need is cast to its dtype."""

import pytest
import torch
from torch import nn

import streamfisher as sf
from streamfisher.models.offload import to_model


class Timed(nn.Linear):
    def forward(self, x, timestep=None, scale=None):
        return super().forward(x)


@pytest.mark.parametrize("name", ["labels", "targets", "timestep", "time_steps", "t", "start_labels", "weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_no_activation_is_not_rounded(name, dtype):
    batch = {"x": torch.randn(3, 5), name: torch.tensor([901.0, 902.0, 300.4])}
    cast = to_model(batch, Timed(5, 1).to(dtype))
    assert cast["x"].dtype == dtype
    assert torch.equal(cast[name], batch[name])


def test_inputs_are_cast_as_ever():
    batch = {"x": torch.randn(3, 5), "scale": torch.ones(3), "other": torch.ones(3, 2), "ids": torch.ones(3).long()}
    dtypes = {key: value.dtype for key, value in to_model(batch, Timed(5, 1).bfloat16()).items()}
    assert dtypes == {"x": torch.bfloat16, "scale": torch.bfloat16, "other": torch.bfloat16, "ids": torch.int64}
    wide = to_model({"x": torch.ones(3, 5).double(), "labels": torch.ones(3).double()}, Timed(5, 1))
    assert {value.dtype for value in wide.values()} == {torch.float32}


def test_the_losses_are_of_the_labels_as_given(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(5, 1).bfloat16()
    nn.init.constant_(model.bias, 300.0)
    data = {"x": torch.randn(8, 5), "labels": 300.4 + 0.1 * torch.arange(8.0)[:, None]}
    run = sf.collect(model, data, tmp_path / "run.zarr")
    with torch.no_grad():
        right = 0.5 * (model(data["x"].bfloat16()).float() - data["labels"]).pow(2)[:, 0]
    assert run.losses == pytest.approx(right.numpy(), rel=1e-5)
