"""Tensors that modules keep in plain attributes from one forward pass to the next.

In eval mode some models compute a table from a parameter once and keep it (LeViT its attention biases). Kept from a
pass without gradients it hides the parameter from every later pass; kept from one with gradients it belongs to a graph
that is gone. So every pass starts without what the passes before have left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: Attributes of every module: they hold no tensors of a forward pass.
_COMMON = frozenset(vars(nn.Module()))

_Snapshot = list[tuple[nn.Module, dict[str, tuple[Any, Any]]]]  # of each module: attribute -> value, its contents


class KeptTensors:
    """What the modules of a model keep in plain attributes, and how to make them forget it."""

    def __init__(self, model: nn.Module) -> None:
        # Modules of torch itself keep nothing, or make it anew in every call.
        self._modules = [m for m in model.modules() if not type(m).__module__.startswith("torch.nn.modules.")]
        self._start: _Snapshot | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, `forget` is of use; afterwards the modules keep what they kept before."""
        before = self._snapshot()
        try:
            for module, attributes in before:
                if works_on_modes(module) and any(_holds_tensors(value) for value, _ in attributes.values()):
                    _switched(module)
            self._start = self._snapshot()
            yield
        finally:
            self._start = None
            _restore(before)

    def forget(self) -> None:
        """Let every module keep no more than at the start."""
        if self._start is not None:
            _restore(self._start)

    def _snapshot(self) -> _Snapshot:
        return [
            (module, {k: (v, _contents(v)) for k, v in vars(module).items() if k not in _COMMON})
            for module in self._modules
        ]


def works_on_modes(module: nn.Module) -> bool:
    """Return whether `train()` or `eval()` of a module does more than set flags."""
    return type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers that have values."""
    both = (*module.named_parameters(), *module.named_buffers())
    return {key: tensor.detach() for key, tensor in both if not tensor.is_meta}


def _switched(module: nn.Module) -> None:
    """Switch a module to train mode and back, which empties such caches; its values stay what they are."""
    if getattr(module, "merged", False):  # adapters: switching would add and subtract them
        return
    before = {key: tensor.clone() for key, tensor in values_of(module).items()}
    modes = [(one, one.training) for one in module.modules()]
    module.train()
    module.eval()
    for one, mode in modes:
        one.training = mode
    with torch.no_grad():
        for key, tensor in values_of(module).items():
            if key in before and before[key].shape == tensor.shape and not torch.equal(before[key], tensor):
                tensor.copy_(before[key])


def _contents(value: Any) -> Any:
    return value.copy() if type(value) in (dict, list) else None


def _holds_tensors(value: Any) -> bool:
    if type(value) in (dict, list):
        return any(isinstance(one, Tensor) for one in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor)


def _restore(snapshot: _Snapshot) -> None:
    for module, before in snapshot:
        now = vars(module)
        for key in [key for key, value in now.items() if key not in before and key not in _COMMON]:
            if _holds_tensors(now[key]):
                del now[key]
        for key, (value, contents) in before.items():
            if now.get(key) is not value and (_holds_tensors(now.get(key)) or _holds_tensors(value)):
                now[key] = value
            if contents is not None and now.get(key) is value:
                _refill(value, contents)


def _refill(value: Any, contents: Any) -> None:
    """Put back what a list or dict held, if tensors have come or gone."""
    if isinstance(value, dict):
        same = len(value) == len(contents) and all(value.get(k) is v for k, v in contents.items())
    else:
        same = len(value) == len(contents) and all(one is other for one, other in zip(value, contents, strict=True))
    if same or not (_holds_tensors(value) or _holds_tensors(contents)):
        return
    value.clear()
    value.update(contents) if isinstance(value, dict) else value.extend(contents)
