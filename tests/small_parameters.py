"""A model of many small parameters, and samples for it."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

DEPTH = 12


class Layers(nn.Module):
    """Twelve layers with a norm each: 36 parameters of norms and biases, and 13 small matrices."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(depth))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(x)


def layered(n: int) -> TensorDataset:
    """Return the first n of 32 labelled vectors."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)
    return TensorDataset(x[:n], y[:n])
