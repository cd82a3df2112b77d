"""The shell: a model whose layers are taken out, so that its own code around them can be run without them.

Embeddings, masks, position embeddings, the final norm, the head and the loss are executed by the model's own forward:
nothing of it is rewritten. Where a layer was, a placeholder hands its call to whoever runs the shell.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

#: `(name of the layer, args, kwargs) -> what the layer is to return`
Handler = Callable[[str, tuple[Any, ...], dict[str, Any]], Any]


class Placeholder(nn.Module):
    """Stands in a layer's place without its parameters; other attributes are the layer's own."""

    def __init__(self, shell: Shell, name: str, layer: nn.Module) -> None:
        super().__init__()
        # Past nn.Module's own bookkeeping: what is registered would count as part of the model.
        self.__dict__.update(_shell=shell, _name=name, _layer=layer)

    def __getattr__(self, attribute: str) -> Any:
        if attribute in ("_hf_hook", "_old_forward"):  # what loads a layer's weights is not the placeholder's
            raise AttributeError(attribute)
        return getattr(self.__dict__["_layer"], attribute)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand the call to the shell's handler."""
        return self._shell.handler(self._name, args, kwargs)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the members of the outermost `ModuleList`s by name; a shared one appears once, under its first name."""
    found: dict[str, nn.Module] = {}
    inside: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside:
            continue
        for child_name, child in module.named_children():
            inside.update(id(m) for m in child.modules())
            found[f"{name}.{child_name}" if name else child_name] = child
    return found


class Shell:
    """A context manager: inside, every layer of `model` is replaced by a placeholder.

    Args:
        model: the model; outside of the context it is as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = layers_of(model)
        self.handler: Handler = _unexpected
        self._taken: list[tuple[nn.ModuleList, str, nn.Module]] = []
        self._depth = 0

    def __enter__(self) -> Shell:
        self._depth += 1
        if self._depth > 1:
            return self
        names = {id(layer): name for name, layer in self.layers.items()}
        for parent in [m for m in self.model.modules() if isinstance(m, nn.ModuleList)]:
            for key, child in parent._modules.items():
                if child is not None and id(child) in names:
                    self._taken.append((parent, key, child))
        for parent, key, child in self._taken:
            placeholder = Placeholder(self, names[id(child)], child)
            placeholder.training = child.training
            parent._modules[key] = placeholder
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        for parent, key, child in self._taken:
            parent._modules[key] = child
        self._taken = []
        self.handler = _unexpected

    @contextlib.contextmanager
    def handled_by(self, handler: Handler) -> Iterator[None]:
        """Let a handler answer the calls of layers inside; it is not kept, nor what it remembers."""
        self.handler = handler
        try:
            yield
        finally:
            self.handler = _unexpected

    def leave_in_place(self, names: set[str]) -> None:
        """Count these layers among the code around the layers; to be called outside of the context."""
        self.layers = {name: layer for name, layer in self.layers.items() if name not in names}


def _unexpected(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise RuntimeError(f"layer {name} was called while nobody ran the shell")
