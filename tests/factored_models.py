"""Small models whose gradients are factors for the most part, and samples for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def llama(tied=False, seed=0):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=50,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    )


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


def sequences(n=11, vocabulary=50):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 12, (n,), generator=generator)
    return [{"input_ids": torch.randint(1, vocabulary, (int(length),), generator=generator)} for length in lengths]


def images(n=11):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 8, 8, generator=generator, dtype=torch.float64)
    return {"input": x, "labels": torch.randint(0, 3, (n,), generator=generator)}


MODELS = {
    "llama": (llama, sequences),
    "tied": (lambda: llama(tied=True), sequences),
    "gpt2": (gpt2, sequences),
    "convolution": (convolution, images),
}
