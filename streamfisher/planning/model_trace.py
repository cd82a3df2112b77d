"""What one forward pass of a model is made of, layer by layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from streamfisher.gradients.shapes import GradientShape


@dataclass(frozen=True)
class BlockCost:
    """One layer, the embedding or the head: parameters that a forward pass meets together."""

    name: str
    parameters: tuple[str, ...]
    weight_bytes: int
    forward_flops: float  # of one sample
    boundary_bytes: float  # of the hidden states that one sample hands on to the next block

    @property
    def is_layer(self) -> bool:
        """Return whether it is one of a stack of layers, and not the embedding or the head."""
        return self.name.split("_")[-1].isdigit()


@dataclass(frozen=True)
class LayerCall:
    """One layer of the model and the shapes of what it is called with, to be run alone."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]  # tensors without values
    kwargs: Mapping[str, Any]
    forward_flops: float  # of one sample
    batch: int = 1  # samples to run at a time

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of its parameters."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.module.parameters())

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of its parameters."""
        return next((tensor.dtype for tensor in self.module.parameters()), torch.float32)

    def build(self) -> nn.Module:
        """Return a copy on the CPU with random frozen parameters."""
        module = copy.deepcopy(self.module).to_empty(device="cpu").eval()
        with torch.no_grad():
            for tensor in module.parameters():
                tensor.requires_grad_(False).copy_(torch.randn(tensor.shape) * 0.02)
            for buffer in module.buffers():
                buffer.fill_(1)
        return module


@dataclass(frozen=True)
class ModelTrace:
    """What a forward pass of one sample of a model is made of."""

    name: str  # of the model's class
    tokens: float  # positions of the sample
    shapes: tuple[GradientShape, ...]  # in the model's order
    blocks: tuple[BlockCost, ...]  # in the order in which they are called
    weight_bytes: int
    activation_bytes: float  # of one sample: what autograd keeps from forward to backward while parameters are frozen
    layer: LayerCall | None = None  # the first numbered layer
    unused: int = 0  # positions at the end of a sample that have no gradient

    @property
    def n_params(self) -> int:
        """Return P."""
        return sum(shape.numel for shape in self.shapes)

    @property
    def forward_flops(self) -> float:
        """Return the operations of one sample's forward pass."""
        return sum(block.forward_flops for block in self.blocks)

    def segments(self) -> list[list[str]]:
        """Return the parameters of each segment that has any, in the order in which a stream goes back through them.

        A layer is one; so is all that comes after the last layer, and all that comes before the first.
        """
        layers = [place for place, block in enumerate(self.blocks) if block.is_layer] or [len(self.blocks)]
        first, last = layers[0], layers[-1]
        groups = [self.blocks[last + 1 :], *([block] for block in reversed(self.blocks[first : last + 1]))]
        groups.append(self.blocks[:first])
        names = [[name for block in group for name in block.parameters] for group in groups]
        return [segment for segment in names if segment]

    def scaled(self, tokens: float) -> ModelTrace:
        """Return the trace for samples of `tokens` positions on average.

        Everything is taken as proportional to the length. Attention's own products grow faster; where they matter,
        trace at the length itself.
        """
        ratio = tokens / self.tokens
        shapes = tuple(
            dataclasses.replace(
                shape, positions=tuple(max(ratio * (t + self.unused) - self.unused, 0.0) for t in shape.positions)
            )
            for shape in self.shapes
        )
        blocks = tuple(
            dataclasses.replace(
                block,
                forward_flops=ratio * block.forward_flops,
                boundary_bytes=ratio * block.boundary_bytes,
            )
            for block in self.blocks
        )
        return dataclasses.replace(
            self, tokens=tokens, shapes=shapes, blocks=blocks, activation_bytes=ratio * self.activation_bytes
        )
