"""Models whose weights Accelerate keeps on the CPU or on disk and brings to the device module by module.

Between two calls such a weight is an empty parameter on the meta device, and every call puts another object in its
place. So it is named by module and attribute here, and its gradient is taken from the objects that a pass really used.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.errors import ModelError

#: Names of what is compared with the output, or counts time: its values are data, not activations.
_EXACT = re.compile(r"^(t|labels?|targets?|y|times?|sigmas?)$|labels?$|targets?$|time_?steps?$")


def offload_hook(module: nn.Module) -> Any:
    """Return Accelerate's hook that loads this module's weights, or `None`."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            return one
    return None


def is_offloaded(model: nn.Module) -> bool:
    """Return whether any weight of the model is kept elsewhere."""
    return any(offload_hook(module) is not None for module in model.modules())


def stored_tensor(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return the values of a parameter or buffer: where it is kept, if it is offloaded, else itself."""
    if not tensor.is_meta:
        return tensor
    owner, _, attribute = name.rpartition(".")
    hook = offload_hook(model.get_submodule(owner))
    return tensor if hook is None else hook.weights_map[attribute]


def has_values(model: nn.Module, name: str, tensor: Tensor) -> bool:
    """Return whether a parameter or buffer has values, here or where it is kept."""
    return not tensor.is_meta or offload_hook(model.get_submodule(name.rpartition(".")[0])) is not None


def working_device(model: nn.Module, name: str, tensor: Tensor) -> torch.device:
    """Return the device that a parameter is used on."""
    if not tensor.is_meta:
        return tensor.device
    hook = offload_hook(model.get_submodule(name.rpartition(".")[0]))
    return tensor.device if hook is None else torch.device(hook.execution_device)


def input_device(model: nn.Module) -> torch.device | None:
    """Return the device that the model's first parameter is used on; `None` for a model without any."""
    return next((working_device(model, name, parameter) for name, parameter in model.named_parameters()), None)


def identity(model: nn.Module, name: str, parameter: Tensor) -> int:
    """Return what all names of one tied parameter have in common, also where it is offloaded to the CPU.

    On disk, where every look gives another tensor, two names of one parameter have nothing in common: `check_ties`.
    """
    if getattr(offload_hook(model.get_submodule(name.rpartition(".")[0])), "keeps_objects", False):
        return id(parameter)
    value, again = stored_tensor(model, name, parameter), stored_tensor(model, name, parameter)
    in_memory = value is not parameter and value.data_ptr() == again.data_ptr() != 0
    return value.data_ptr() if in_memory else id(parameter)


def check_ties(model: nn.Module) -> None:
    """Refuse a Hugging Face model whose tied embedding and head cannot be told to be one parameter.

    Raises:
        ModelError: they are tied and on disk.
    """
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not tied or not is_offloaded(model):
        return
    hugging_face: Any = model  # a config is theirs
    ends = [hugging_face.get_input_embeddings(), hugging_face.get_output_embeddings()]
    weights = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if any(module is end for end in ends) and hasattr(module, "weight")
    }
    if len({identity(model, name, weight) for name, weight in weights.items()}) > 1:
        raise ModelError(
            f"{' and '.join(weights)} are one tied parameter, and offloaded to disk they cannot be told to be one. "
            "Keep both on the same GPU or on the CPU in the device map."
        )


@contextlib.contextmanager
def used_leaves(model: nn.Module, places: Mapping[str, Sequence[str]]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the tensors that offloaded parameters are in the passes inside: leaves that require grad.

    Args:
        model: frozen.
        places: parameter -> all its full names.

    Yields:
        Parameter -> its tensors, one for each call of a module that holds it; their gradients add up to its gradient.
    """
    used: dict[str, list[Tensor]] = {name: [] for name in places}
    wanted: dict[str, list[tuple[str, str]]] = {}
    for parameter, names in places.items():
        for name in names:
            owner, _, attribute = name.rpartition(".")
            wanted.setdefault(owner, []).append((attribute, parameter))
    undo: list[tuple[nn.Module, Any]] = []

    def watch(module: Any, attributes: Sequence[tuple[str, str]]) -> None:
        forward = module._old_forward  # where Accelerate keeps it

        def record(*args: Any, **kwargs: Any) -> Any:
            for attribute, parameter in attributes:
                leaf = nn.Parameter(module._parameters[attribute].detach(), requires_grad=True)
                module._parameters[attribute] = leaf
                used[parameter].append(leaf)
            try:
                return forward(*args, **kwargs)
            finally:
                for attribute, _ in attributes:  # the empty one that takes its place is frozen as before
                    module._parameters[attribute] = nn.Parameter(
                        module._parameters[attribute].detach(), requires_grad=False
                    )

        module._old_forward = record
        undo.append((module, forward))

    for owner, attributes in wanted.items():
        watch(model.get_submodule(owner), attributes)
    try:
        yield used
    finally:
        for module, forward in undo:
            module._old_forward = forward


def to_model(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the batch on the model's device, floating inputs in the model's dtype.

    Labels, time steps and numbers that the forward does not name are not rounded to a half-width model's dtype: they
    are in float32 at least, because 901 and 300.4 are no numbers of bfloat16.
    """
    parameter = next(iter(model.parameters()), None)
    if parameter is None:
        return batch
    named = inspect.signature(model.forward).parameters
    dtype = parameter.dtype if parameter.is_floating_point() else None

    def wanted(key: str, value: Tensor) -> torch.dtype | None:
        if dtype is None or not value.is_floating_point():
            return None
        exact = _EXACT.search(key) is not None or (value.ndim < 2 and key not in named)
        return torch.promote_types(dtype, torch.float32) if exact else dtype

    device = input_device(model)
    return {key: value.to(device, wanted(key, value), non_blocking=True) for key, value in batch.items()}
