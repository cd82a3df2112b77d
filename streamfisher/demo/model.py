"""A small causal transformer over bytes, written to be read.

It has one of everything whose gradient per sample a larger model needs: an embedding table, learned positions whose
indices are shared by the whole batch, linear layers, root-mean-square norms and an untied output layer. The names
follow those of today's large models (`layers.0.self_attn.q_proj`), so blocks are grouped in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamfisher.errors import DataError


@dataclass(frozen=True)
class ByteTransformerConfig:
    """The shape of a `ByteTransformer`; the defaults are those of the weights that ship with the package."""

    vocab_size: int = 256  # one token per byte value
    max_positions: int = 128  # longest sequence, in bytes
    hidden_size: int = 128  # width of the residual stream
    num_layers: int = 4
    num_heads: int = 4  # must divide hidden_size
    mlp_size: int = 320  # width inside the gated MLP
    norm_eps: float = 1e-6


class SelfAttention(nn.Module):
    """Multi-head causal self-attention, `softmax(Q K^T / sqrt(d)) V` for each head."""

    def __init__(self, config: ByteTransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """Mix positions.

        Args:
            x: (B, T, hidden) float.
            allowed: (B, 1, T, T) bool, True where a query may look at a key; None for plain causal attention.

        Returns:
            (B, T, hidden) float.
        """
        B, T, _ = x.shape
        q, k, v = (
            projection(x).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, heads, T, d)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None)
        return self.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))


class GatedMLP(nn.Module):
    """SwiGLU, `down(silu(gate(x)) * up(x))` at each position (arXiv 2002.05202)."""

    def __init__(self, config: ByteTransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, hidden) to (B, T, hidden)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: ByteTransformerConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, allowed: Tensor | None) -> Tensor:
        """Map (B, T, hidden) to (B, T, hidden); `allowed` as in `SelfAttention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), allowed)
        return x + self.mlp(self.post_attention_layernorm(x))


class ByteTransformer(nn.Module):
    """Predict each next byte from those before it.

    There is no dropout, so training and evaluation mode compute the same thing.
    """

    is_causal = True  # logits at position t predict the token at t + 1

    def __init__(self, config: ByteTransformerConfig | None = None) -> None:
        super().__init__()
        self.config = config = ByteTransformerConfig() if config is None else config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of the next byte at every position.

        Args:
            input_ids: (B, T) int64, values 0 to 255, with T at most `config.max_positions`.
            attention_mask: (B, T), non-zero where a position is real. Padding belongs on the right: positions are
                counted from the left edge. None where every position is real.

        Returns:
            (B, T, vocab_size) logits in the model's dtype; those at padded positions mean nothing.

        Raises:
            DataError: the sequences are longer than the position table.
        """
        T = input_ids.shape[1]
        if T > self.config.max_positions:
            raise DataError(
                f"Sequences of {T} bytes do not fit the model, which has {self.config.max_positions} positions. "
                f"Cut them to at most {self.config.max_positions}."
            )
        allowed = None if attention_mask is None else _causal_and_real(attention_mask)
        # One row of positions serves the whole batch, as in GPT-2: (1, T, hidden) is broadcast over samples.
        positions = torch.arange(T, device=input_ids.device).unsqueeze(0)
        x = self.embed_tokens(input_ids) + self.embed_positions(positions)
        for layer in self.layers:
            x = layer(x, allowed)
        return self.lm_head(self.norm(x))


def initialise(model: ByteTransformer, generator: torch.Generator) -> None:
    """Draw fresh weights in place: N(0, 0.02^2), as GPT-2 does.

    Layers that write into the residual stream are scaled by `1 / sqrt(2 num_layers)`, so that its variance does not
    grow with depth. Norm weights keep their ones.

    Args:
        model: changed in place.
        generator: the source of all random numbers, so that a seed fixes the weights.
    """
    residual_scale = (2 * model.config.num_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            scale = residual_scale if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            nn.init.normal_(parameter, std=0.02 * scale, generator=generator)


def _causal_and_real(attention_mask: Tensor) -> Tensor:
    """Return (B, 1, T, T) bool: key s is allowed for query t where s <= t and s is real, or s = t.

    Every position may look at itself, padded ones too: a query with no key at all would be 0/0.
    """
    T = attention_mask.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=attention_mask.device).tril()
    itself = torch.eye(T, dtype=torch.bool, device=attention_mask.device)
    real = attention_mask.bool()[:, None, None, :]
    return (causal & real) | itself
