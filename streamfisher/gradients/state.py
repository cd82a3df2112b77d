"""What is changed in the user's model and in torch while gradients are taken, and put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.gradients.capture import Capture


def gradients_of(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Return the gradients of leaves by `backward`, because reentrant checkpointing refuses `torch.autograd.grad`."""
    before = [tensor.grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.grad = None
        if loss.requires_grad:
            loss.backward()
        return [tensor.grad for tensor in tensors]
    finally:
        for tensor, grad in zip(tensors, before, strict=True):
            tensor.grad = grad


@contextlib.contextmanager
def requiring_grad(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let leaves require grad inside, and be frozen afterwards."""
    tensors = list(tensors)
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore requires_grad, train or eval mode, and what `prepare_recurrent` changes."""
    modes = [(module, module.training) for module in model.modules()]
    dropouts = [(module, module.dropout) for module in model.modules() if isinstance(module, nn.RNNBase)]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, dropout in dropouts:
            module.dropout = dropout
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def without_fast_paths(model: nn.Module) -> Iterator[None]:
    """Switch off what bypasses hooks: fused transformer layers, and compiled modules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    eager = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        with eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def prepare_recurrent(model: nn.Module, device: torch.device) -> None:
    """Put them in train mode without dropout: on CUDA, cuDNN can only differentiate a recurrent layer so."""
    if device.type != "cuda":
        return
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
            module.training = True


@contextlib.contextmanager
def inputs_of_checkpoints(model: nn.Module, capture: Capture) -> Iterator[None]:
    """Make embeddings require grad even if they are not captured, for a model that uses gradient checkpointing.

    Reentrant checkpointing differentiates a segment only if one of its inputs requires grad.
    """
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        yield
        return

    def require(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or output.requires_grad or not torch.is_grad_enabled():
            return None
        return output + capture.anchor(output.device).sum()

    handles = [m.register_forward_hook(require) for m in model.modules() if isinstance(m, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
