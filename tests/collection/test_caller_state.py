"""Whatever modes of torch the caller is in: the right rows, or a refusal; and the model is handed back as it came."""

import contextlib

import pytest
import torch
from torch import nn

import streamfisher as sf
from streamfisher.errors import CaptureError, ConfigError, ModelError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Linear(5, 3)


@pytest.fixture
def batch():
    return {"x": torch.randn(8, 5, generator=torch.Generator().manual_seed(1)), "labels": torch.arange(8) % 3}


def trace(model, batch, **options):
    return sf.FisherSpectral(sf.SpectralConfig(**options)).compute_fisher_spectrum(model, batch)["global"]["trace"]


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, default_dtype, lambda: torch.device("cpu")])
@pytest.mark.parametrize(
    "options", [{}, {"storage_mode": "streaming"}, {"storage_mode": "streaming", "dtype_model": "float64"}]
)
def test_the_caller_s_modes_change_nothing(model, batch, mode, options):
    right = trace(model, batch, **options)
    with mode():
        inside = trace(model, batch, **options)
    assert inside == right > 0


def test_a_batch_made_in_inference_mode_is_taken(model, batch):
    with torch.inference_mode():
        made = {key: value.clone() for key, value in batch.items()}
        assert trace(model, made) == trace(model, batch) > 0


def test_a_model_made_in_inference_mode_is_refused(batch):
    with torch.inference_mode():
        made = nn.Linear(5, 3)
    with pytest.raises(ModelError, match=r"weight was made in torch\.inference_mode"):
        trace(made, batch)


def test_autocast_and_a_default_device_without_values_are_refused(model, batch, tmp_path):
    with torch.autocast("cpu"), pytest.raises(ConfigError, match="outside"):
        trace(model, batch)
    with torch.device("meta"), pytest.raises(ConfigError, match="meta"):
        sf.collect(model, batch, tmp_path / "run.zarr")


class Merging(nn.Linear):
    """A layer with an adapter that eval() merges into its weight, and train() takes out again."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, x):
        output = super().forward(x)
        return output if self.merged else output + x @ self.a.T @ self.b.T


def test_adapters_that_merge_are_refused_and_handed_back_bit_for_bit(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), Merging(4, 3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=r"eval\(\) changes weight of 1 \(Merging\)"):
        trace(model, batch)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and not model[1].merged


def test_merged_adapters_are_noticed(batch):
    model = nn.Sequential(nn.Linear(5, 4), Merging(4, 3)).eval()
    with (
        pytest.warns(UserWarning, match="adapters are merged"),
        pytest.raises(CaptureError, match="has a gradient in train mode and none in eval mode"),
    ):
        trace(model, batch)
