"""Hooks that note, while a model is called once, which factors and which layers it is made of."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from streamfisher.blocks.structures import assign_blocks, layer_key
from streamfisher.gradients.rules import rules_for
from streamfisher.gradients.shapes import Factor, GradientShape
from streamfisher.planning.model_trace import BlockCost, LayerCall

_ID_BYTES = 4  # token ids are stored as int32


@dataclass
class _Use:
    """One call of a module whose weight's gradient is a product of two factors."""

    parameter: str
    key: str
    pair: tuple[Factor, Factor]
    positions: int
    flops: float


class ForwardWatch(contextlib.AbstractContextManager["ForwardWatch"]):
    """Hooks on every module that holds parameters, or is one of a list of layers."""

    def __init__(self, model: nn.Module, parameters: list[str] | None):
        self.model = model
        first_names = {id(tensor): name for name, tensor in model.named_parameters()}
        self.tensors = dict(model.named_parameters())
        if parameters is None:
            parameters = [name for name, tensor in self.tensors.items() if tensor.requires_grad]
        self.parameters = list(parameters)
        # A tied parameter hangs in several places and goes by the first of its names.
        self.places = {name: first_names[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}
        # Layers of two stacks (encoder and decoder) that have the same number are told apart.
        self.prefixed = any(key != layer_key(name) for name, key in assign_blocks(self.tensors, "layer").items())
        self.uses: list[_Use] = []
        self.order: list[str] = []  # parameters as they are met
        self.boundaries: dict[str, float] = {}
        self.weights: set[int] = set()
        self._saved: dict[int, tuple[Tensor, int]] = {}
        self.calls: list[tuple[str, nn.Module, Any, Any]] = []  # the first call of a numbered layer
        self._names: dict[str, str] = {}
        self._alive: list[Tensor] = []  # so that two tensors never share an identity

    def __enter__(self) -> ForwardWatch:
        self.handles: list[RemovableHandle] = []
        self.stacks: list[str] = []
        for name, module in self.model.named_modules():
            held = [f"{name}.{attribute}" if name else attribute for attribute, _ in module._parameters.items()]
            held = [place for place in held if place in self.places]
            if held:
                self.handles.append(module.register_forward_hook(self._meeting(name, held), with_kwargs=True))
            inside = any(name.startswith(f"{stack}.") for stack in self.stacks)
            if isinstance(module, nn.ModuleList | nn.Sequential) and name and not inside:
                self.stacks.append(name)
                for child_name, child in module.named_children():
                    leaving = self._leaving(f"{name}.{child_name}")
                    self.handles.append(child.register_forward_hook(leaving, with_kwargs=True))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _meeting(self, name: str, held: list[str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            self.order += [self.places[place] for place in held if self.places[place] not in self.order]
            x = args[0] if args else next(iter(kwargs.values()), None)
            rule = next((rule.name for rule in rules_for(module) if rule.factors(module)), None)
            weight = f"{name}.weight" if name else "weight"
            if rule and weight in self.places and isinstance(x, Tensor) and isinstance(output, Tensor):
                self._use(module, rule, name, self.places[weight], x, output)
            # The graph starts at the lowest captured module; frozen parameters alone would start none.
            leaves, spec = pytree.tree_flatten(output)
            leaves = [leaf.detach().requires_grad_() if _starts(leaf) else leaf for leaf in leaves]
            return pytree.tree_unflatten(leaves, spec)

        return hook

    def _leaving(self, name: str) -> Any:
        key = self._key(f"{name}.weight")

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not self.calls and next(module.parameters(), None) is not None:
                self.calls.append((name, module, args, kwargs))
            hidden = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)), None)
            if hidden is not None and key.split("_")[-1].isdigit():
                self.boundaries[key] = float(hidden.numel() * hidden.element_size())

        return hook

    def _use(self, module: nn.Module, rule: str, name: str, parameter: str, x: Tensor, y: Tensor) -> None:
        weight = self.tensors[parameter]
        use = sum(1 for other in self.uses if other.parameter == parameter)
        if rule == "convolution":
            positions = y[0, 0].numel() if y.dim() > 2 else 1
            window = weight.numel() // weight.shape[0]
            left = Factor(f"{parameter}:{use}:L", weight.shape[0], y.element_size())
            right = Factor(f"{parameter}:{use}:R", window, x.element_size())
        elif rule == "embedding":
            positions = x.numel()
            left = Factor(self._identity(x), 1, _ID_BYTES)
            right = Factor(f"{parameter}:{use}:R", y.shape[-1], y.element_size())
        else:
            positions = y.numel() // y.shape[-1]
            inputs = Factor(self._identity(x), x.shape[-1], x.element_size())
            side = "L" if rule == "linear" else "R"
            outputs = Factor(f"{parameter}:{use}:{side}", y.shape[-1], y.element_size())
            left, right = (outputs, inputs) if rule == "linear" else (inputs, outputs)
        flops = 0.0 if rule == "embedding" else 2.0 * positions * weight.numel()
        self.uses.append(_Use(parameter, self._key(f"{name}.weight"), (left, right), positions, flops))

    def _key(self, name: str) -> str:
        return layer_key(name, prefixed=self.prefixed)

    def _identity(self, tensor: Tensor) -> str:
        """Return the same name for the same memory seen in the same way."""
        self._alive.append(tensor)
        where = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
        return self._names.setdefault(str(where), f"input {len(self._names)}")

    def saved(self, tensor: Tensor) -> Tensor:
        """Count what autograd keeps; the same memory once."""
        storage = tensor.untyped_storage()
        self._saved.setdefault(storage._cdata, (tensor, storage.nbytes()))
        return tensor

    def saved_bytes(self) -> float:
        """Return the bytes that autograd keeps and that are no weights."""
        kept = {key: size for key, (_, size) in self._saved.items() if key not in self.weights}
        for tensor in self._alive:  # inputs of captured modules are kept for the products with output gradients
            kept.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
        return float(sum(kept.values()))

    def shapes(self, causal: bool) -> tuple[GradientShape, ...]:
        """Return the shapes of all captured parameters, in the model's order."""
        served: dict[str, list[_Use]] = {}
        for use in self.uses:
            served.setdefault(use.parameter, []).append(use)
        found = []
        for name in self.parameters:
            tensor, uses = self.tensors[name], served.get(name, [])
            found.append(
                GradientShape(
                    name,
                    tuple(tensor.shape),
                    tensor.dtype,
                    tuple(use.pair for use in uses),
                    tuple(float(use.positions - (1 if causal and use.positions > 1 else 0)) for use in uses),
                )
            )
        return tuple(found)

    def layer(self, blocks: tuple[BlockCost, ...]) -> LayerCall | None:
        """Return the first call of a numbered layer."""
        for name, module, args, kwargs in self.calls:
            key = self._key(f"{name}.weight")
            flops = next((block.forward_flops for block in blocks if block.name == key), 0.0)
            if flops:
                return LayerCall(name, module, args, kwargs, flops)
        return None

    def blocks(self, total_flops: float) -> tuple[BlockCost, ...]:
        """Return layers, embedding and head in the order of calling; what no rule counts is shared by the layers."""
        order = self.order + [name for name in self.parameters if name not in self.order]
        names: dict[str, list[str]] = {}
        for name in order:
            names.setdefault(self._key(name), []).append(name)
        flops = dict.fromkeys(names, 0.0)
        for use in self.uses:
            flops[use.key] = flops.get(use.key, 0.0) + use.flops
        layers = [key for key in flops if key.split("_")[-1].isdigit()] or list(flops)
        rest = max(total_flops - sum(flops.values()), 0.0)
        for key in layers:
            flops[key] += rest / len(layers)
        widest = max(self.boundaries.values(), default=0.0)
        captured = set(self.parameters)
        return tuple(
            BlockCost(
                key,
                tuple(name for name in names.get(key, ()) if name in captured),
                sum(self.tensors[name].numel() * self.tensors[name].element_size() for name in names.get(key, ())),
                flops[key],
                self.boundaries.get(key, widest if key == "embedding" else 0.0),
            )
            for key in flops
        )


def _starts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.requires_grad
