"""One formula per kind of layer: a module's inputs and output gradients in, per-sample parameter gradients out.

Every formula is written once, for tensors whose first axis is the sample: inputs `x (B, ..., d_in)` and output
gradients `d (B, ..., d_out)`, where the axes in between are positions t and are summed over. Whether a formula holds
for a given module is not trusted but probed, so a match may be generous: what disagrees with autograd is taken by the
generic rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from streamfisher.gradients.batch_axis import BATCH_FIRST
from streamfisher.gradients.batch_rows import RowSink
from streamfisher.gradients.convolution import write_convolution

#: `(module, x, d, {attribute: parameter name}, sink)`
Writer = Callable[[nn.Module, Tensor, Tensor, Mapping[str, str], RowSink], None]


@dataclass(frozen=True)
class Rule:
    """A closed formula for the parameters that a kind of module holds directly."""

    name: str
    matches: Callable[[nn.Module], bool]
    write: Writer
    needs_input: frozenset[str] = frozenset({"weight"})  # attributes whose gradient depends on the input
    layouts: tuple[str, ...] = BATCH_FIRST
    factors: Callable[[nn.Module], bool] = lambda module: False  # whether the weight's gradient is a product of two


def positions(tensor: Tensor, n_trailing: int = 1) -> Tensor:
    """Return `tensor` as `(B, T, ...)`, every axis between the sample and the last `n_trailing` merged."""
    shape = tensor.shape[tensor.dim() - n_trailing :]
    return tensor.reshape(tensor.shape[0], -1, *shape)


def write_linear(module: nn.Module, x: Tensor, d: Tensor, names: Mapping[str, str], sink: RowSink) -> None:
    """`y = x W^T + b`: `dW_i = sum_t d_it x_it^T`, `db_i = sum_t d_it`."""
    d = positions(d)
    if "weight" in names:
        sink.product(names["weight"], d.transpose(1, 2), positions(x))
    if "bias" in names:
        sink.add(names["bias"], d.sum(1, dtype=sink.dtype(names["bias"])))


def write_conv1d_of_gpt2(module: nn.Module, x: Tensor, d: Tensor, names: Mapping[str, str], sink: RowSink) -> None:
    """`y = x W + b` with `W (d_in, d_out)`: `dW_i = sum_t x_it d_it^T`."""
    d = positions(d)
    if "weight" in names:
        sink.product(names["weight"], positions(x).transpose(1, 2), d)
    if "bias" in names:
        sink.add(names["bias"], d.sum(1, dtype=sink.dtype(names["bias"])))


def write_embedding(module: nn.Module, x: Tensor, d: Tensor, names: Mapping[str, str], sink: RowSink) -> None:
    """`y_t = s E[x_t]`: `dE_i[v] = s sum_{t: x_it = v} d_it`, and zero for the padding index.

    `s` is 1, or the factor of a scaled embedding (Gemma, BART).
    """
    index = x.reshape(x.shape[0], -1)
    d = positions(d)
    scale = _embedding_scale(module)
    if scale is not None:
        d = d * scale
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        d = d * (index != padding).unsqueeze(-1)
    sink.scatter(names["weight"], index, d)


def write_layer_norm(module: nn.Module, x: Tensor, d: Tensor, names: Mapping[str, str], sink: RowSink) -> None:
    """`y = w * n(x) + b`: `dw_i = sum_t d_it * n(x_it)`, `db_i = sum_t d_it`."""
    module = cast(nn.LayerNorm, module)  # the rule matches no other
    shape = tuple(module.normalized_shape)
    d = positions(d, len(shape))
    if "weight" in names:
        dtype = sink.dtype(names["weight"])
        normal = torch.nn.functional.layer_norm(x.to(dtype), shape, eps=module.eps)
        sink.add(names["weight"], (positions(normal, len(shape)) * d).sum(1))
    if "bias" in names:
        sink.add(names["bias"], d.sum(1, dtype=sink.dtype(names["bias"])))


def write_rms_norm(module: nn.Module, x: Tensor, d: Tensor, names: Mapping[str, str], sink: RowSink) -> None:
    """`y = (c + w) * x / rms(x)` with c = 0 or, for Gemma, 1: `dw_i = sum_t d_it * x_it / rms(x_it)`."""
    _write_rms_norm(module, x.to(sink.dtype(names["weight"])), d, names, sink)


def write_rms_norm_float32(module: nn.Module, x: Tensor, d: Tensor, names: Mapping[str, str], sink: RowSink) -> None:
    """As `write_rms_norm`, for a float64 model whose norm itself computes in float32, as many do."""
    _write_rms_norm(module, x.float(), d, names, sink)


def _write_rms_norm(module: nn.Module, x: Tensor, d: Tensor, names: Mapping[str, str], sink: RowSink) -> None:
    weight = cast(Tensor, module.weight)
    shape = tuple(getattr(module, "normalized_shape", None) or weight.shape)
    eps = _rms_epsilon(module)
    if eps is None:  # torch.nn.RMSNorm's default: the epsilon of the input's own dtype
        eps = torch.finfo(weight.dtype).eps
    width = max(len(shape), 1)
    flat = x.flatten(-width)
    inverse = torch.rsqrt(torch.linalg.vecdot(flat, flat).div_(flat.shape[-1]).add_(eps))
    d = positions(d, len(shape))
    products = positions(x * inverse[(..., *(None,) * width)], len(shape))
    products = products.mul_(d) if d.dtype == products.dtype else products * d
    sink.add(names["weight"], products.sum(1))


def write_group_norm(module: nn.Module, x: Tensor, d: Tensor, names: Mapping[str, str], sink: RowSink) -> None:
    """`y = w_c * n(x)_c + b_c` per channel c: sums over the positions, `x (B, C, ...)`."""

    def normalise(x: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return torch.nn.functional.group_norm(x, module.num_groups, eps=module.eps)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and not module.track_running_stats:
            return torch.nn.functional.instance_norm(x, eps=module.eps)
        assert isinstance(module, nn.modules.batchnorm._NormBase), "the rule matches no other"
        assert module.running_mean is not None and module.running_var is not None, "nor one without statistics"
        mean, variance = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
        return torch.nn.functional.batch_norm(x, mean, variance, training=False, eps=module.eps)

    if "weight" in names:
        normal = normalise(x.to(sink.dtype(names["weight"])))
        sink.add(names["weight"], (normal * d).flatten(2).sum(2) if d.dim() > 2 else normal * d)
    if "bias" in names:
        dtype = sink.dtype(names["bias"])
        sink.add(names["bias"], d.flatten(2).sum(2, dtype=dtype) if d.dim() > 2 else d)


def _embedding_scale(module: nn.Module) -> Tensor | float | None:
    return None if type(module) is nn.Embedding else getattr(module, "embed_scale", None)


def _rms_epsilon(module: nn.Module) -> float | None:
    for attribute in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        value = getattr(module, attribute, None)
        if isinstance(value, float):
            return value
    return None


def _is_embedding(module: nn.Module) -> bool:
    # With max_norm the forward rewrites the weights, and scale_grad_by_freq counts over the whole batch: no formula.
    return (
        isinstance(module, nn.Embedding)
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and (type(module) is nn.Embedding or "ScaledWordEmbedding" in type(module).__name__)
    )


_RMS_NAME = re.compile(r"(RMSNorm|RmsNorm|T5LayerNorm)$")


def _is_rms_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.RMSNorm) or (
        bool(_RMS_NAME.search(type(module).__name__)) and getattr(module, "weight", None) is not None
    )


def _is_channel_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.running_mean is not None
    return isinstance(module, nn.GroupNorm | nn.modules.instancenorm._InstanceNorm)


def _always(_module: nn.Module) -> bool:
    return True


#: Tried in this order; of those that match a module, the probe takes the first that agrees with autograd.
RULES: list[Rule] = [
    Rule("linear", lambda m: isinstance(m, nn.Linear), write_linear, factors=_always),
    Rule(
        "conv1d_gpt2",
        lambda m: type(m).__name__ == "Conv1D" and hasattr(m, "nf"),
        write_conv1d_of_gpt2,
        factors=_always,
    ),
    Rule("embedding", _is_embedding, write_embedding, factors=_always),
    Rule("layer_norm", lambda m: isinstance(m, nn.LayerNorm), write_layer_norm),
    Rule("rms_norm", _is_rms_norm, write_rms_norm),
    Rule("rms_norm_float32", _is_rms_norm, write_rms_norm_float32),
    Rule("channel_norm", _is_channel_norm, write_group_norm, layouts=("batch",)),
    Rule(
        "convolution",
        lambda m: isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d),
        write_convolution,
        layouts=("batch",),
        factors=lambda m: getattr(m, "groups", None) == 1,
    ),
]


def rule_named(name: str) -> Rule:
    """Return the closed formula of this name.

    Raises:
        KeyError: there is none.
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    raise KeyError(name)


def rules_for(module: nn.Module) -> list[Rule]:
    """Return the closed formulas for this kind of module, in the order in which the probe tests them."""
    return [rule for rule in RULES if rule.matches(module)]
