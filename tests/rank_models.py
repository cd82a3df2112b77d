"""Models and data whose behaviour depends on the rank, named as MODEL and DATA on command lines in the tests."""

from __future__ import annotations

import os
import time

import torch
from factored_models import llama, sequences
from tiny_models import TinyRegression, vectors
from torch import Tensor, nn

RANK = int(os.environ.get("RANK", "0"))


class Slow(TinyRegression):
    """Every forward pass takes `SECONDS` more, and ten times as much on rank `SLOW_RANK`."""

    def forward(self, x: Tensor) -> Tensor:
        factor = 10 if str(RANK) == os.environ.get("SLOW_RANK") else 1
        time.sleep(float(os.environ.get("SECONDS", "0.05")) * factor)
        return super().forward(x)


def slow() -> nn.Module:
    return Slow()


def other_weights_on_rank_1() -> nn.Module:
    return TinyRegression(seed=RANK)


def thirty_vectors() -> dict[str, Tensor]:
    return vectors(30)


def other_data_on_rank_1() -> dict[str, Tensor]:
    data = vectors(30)
    data["x"][17] += RANK
    return data


def nan_in_the_last_vector() -> dict[str, Tensor]:
    data = vectors(30)
    data["x"][29] = torch.nan
    return data


def rows_of_rank_1_spoilt() -> nn.Module:
    """Rank 1 forms one row of its units that is not the gradient; the probe, on the first samples, is left alone."""
    from streamfisher.gradients import GradientEngine

    rows_of, first = GradientEngine.rows, thirty_vectors()["x"][0]

    def spoil(self, batch, out, factored=(), *more):
        result = rows_of(self, batch, out, factored, *more)
        if RANK == 1 and not torch.equal(batch["x"][0], first):
            out["second.weight"][1] *= 1.01
        return result

    GradientEngine.rows = spoil
    return TinyRegression()


def llama_in_float64() -> nn.Module:
    return llama().double()


def slow_llama() -> nn.Module:
    """Each layer of it takes `SECONDS` more."""
    model = llama().double()
    model.register_forward_pre_hook(lambda module, inputs: time.sleep(float(os.environ.get("SECONDS", "0.05"))))
    return model


def twenty_one_sequences() -> dict[str, Tensor]:
    return sequences(21)


def slow_llama_on_a_device() -> nn.Module:
    """Both."""
    llama_on_a_device()
    return slow_llama()


def llama_on_a_device() -> nn.Module:
    """The CPU is taken for a device with memory of its own."""
    from streamfisher.planning import run_layout

    run_layout.device_room = lambda device, budget: 1 << 30
    return llama().double()


def llama_in_small_parts() -> nn.Module:
    """Wide layers whose products are sums of many parts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from streamfisher.collection import shares
    from streamfisher.reduction import device_grams, folds, kernels

    folds.FOLD, kernels.PART, device_grams._PART = folds.PANEL, 8, 1024
    kernels.token_columns, shares._SUMS_SHARE = lambda positions: 8, 100.0
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 160, "vocab_size": 200}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)).double()


def llama_in_small_parts_on_a_device() -> nn.Module:
    """Both."""
    llama_on_a_device()
    return llama_in_small_parts()


def classifier_in_float64() -> nn.Module:
    """Two linear layers from vectors of 3 to 4 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def eleven_labelled_vectors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 4, (11,), generator=generator)
    return {"input": 2 * torch.randn(11, 3, generator=generator, dtype=torch.float64), "labels": labels}
