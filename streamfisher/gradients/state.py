"""What is changed in the user's model and in torch while gradients are taken, and put back afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from streamfisher.gradients.capture import Capture


@contextlib.contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore requires_grad, train or eval mode, and what `prepare_recurrent` changes."""
    modes = [(module, module.training) for module in model.modules()]
    dropouts = [(module, module.dropout) for module in model.modules() if isinstance(module, nn.RNNBase)]
    # By place: where weights are offloaded, every pass puts other objects there.
    flags = [
        (module, attribute, parameter.requires_grad)
        for module in model.modules()
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    ]
    sharded = [(p, p.requires_grad) for p in model.parameters()]  # FSDP2 puts them aside while they are whole
    try:
        yield
    finally:
        for parameter, flag in sharded:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
        for module, dropout in dropouts:
            module.dropout = dropout
        for module, attribute, flag in flags:
            present = module._parameters[attribute]
            if present is not None:
                present.requires_grad_(flag)


#: Whether a 4-bit module of bitsandbytes packs its weights for a CPU.
PACKS = "support_avx512bf16_for_cpu"


def notes_on(model: nn.Module) -> tuple[str, ...]:
    """Return what is done otherwise than the model would do by itself in its present state, in words for a person."""
    notes = []
    training = [module for module in model.modules() if module.training]
    n_random = sum(_drops(module) for module in training)
    n_batch = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in training)
    if n_random or n_batch:
        off = [f"dropout is off in {n_random} modules"] if n_random else []
        off += [f"running statistics are used in {n_batch} batch norms"] if n_batch else []
        notes.append(f"the model is in train mode and is evaluated in eval mode: {', '.join(off)}")
    if _is_compiled(model):
        notes.append("compiled modules are run eagerly, because hooks cannot see inside them")
    if any(True for _ in _hooks_on_parameters(model)):
        notes.append("hooks on parameters' gradients are switched off: rows are gradients of the loss itself")
    return tuple(notes)


def _drops(module: nn.Module) -> bool:
    """Return whether a module in train mode drops something at random, by its class or by its settings."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    settings = (getattr(module, name, None) for name in ("dropout", "attention_dropout", "dropout_p"))
    return any(isinstance(value, float) and value > 0 for value in settings)


def _is_compiled(model: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def _hooks_on_parameters(model: nn.Module) -> Iterator[dict[int, Any]]:
    for parameter in model.parameters():
        for hooks in (parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)):
            if hooks:
                yield hooks


@contextlib.contextmanager
def without_parameter_hooks(model: nn.Module) -> Iterator[None]:
    """Switch off hooks on parameters' gradients: they may scale them, or step an optimiser that changes the model."""
    found = [(hooks, dict(hooks)) for hooks in _hooks_on_parameters(model)]
    try:
        for hooks, _ in found:
            hooks.clear()  # in place: autograd holds the very same dict
        yield
    finally:
        for hooks, before in found:
            hooks.update(before)


@contextlib.contextmanager
def without_fast_paths(model: nn.Module) -> Iterator[None]:
    """Switch off what bypasses hooks: fused transformer layers, and compiled modules."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    eager = torch.compiler.set_stance("force_eager") if _is_compiled(model) else contextlib.nullcontext()
    try:
        with eager:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def without_packing(model: nn.Module) -> Iterator[None]:
    """Keep the 4-bit weights of bitsandbytes as they are.

    On CPUs with AVX512-BF16 it packs those of a module that is called in eval mode without gradient. That rounds their
    scales to bfloat16, and no gradient passes through the module any more. `state_dict` unpacks what is packed already.
    """
    packing = [module for module in model.modules() if getattr(module, PACKS, False)]
    try:
        for module in packing:
            setattr(module, PACKS, False)
            module.state_dict()
        yield
    finally:
        for module in packing:
            setattr(module, PACKS, True)


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
    """Let reentrant checkpointing, which differentiates a segment only if one of its inputs requires grad, lose none.

    Embeddings require grad even if they are not captured, in a model that says that it checkpoints. Any other segment
    of which no input requires grad (nothing below it is captured) is run without a checkpoint.
    """
    with _segments_without_gradients_below():
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            with _embeddings_requiring_grad(model, capture):
                yield
        else:
            yield


class _Checkpoints:
    """Takes the place of `CheckpointFunction`."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(self, function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        """Call a function, with or without keeping what is inside."""
        if torch.is_grad_enabled() and not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            return function(*args)
        return self.original.apply(function, preserve_rng_state, *args)


@contextlib.contextmanager
def _segments_without_gradients_below() -> Iterator[None]:
    module: Any = torch.utils.checkpoint
    before = module.CheckpointFunction
    try:
        module.CheckpointFunction = _Checkpoints(before)
        yield
    finally:
        module.CheckpointFunction = before


@contextlib.contextmanager
def _embeddings_requiring_grad(model: nn.Module, capture: Capture) -> Iterator[None]:
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
