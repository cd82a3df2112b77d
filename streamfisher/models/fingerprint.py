"""What tells one model from another: its class, its parameters, and a hash of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from streamfisher.models.offload import stored_tensor
from streamfisher.models.sharding import class_of, whole


def model_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of all parameters and persistent buffers.

    Raises nothing for models on any device: tensors are copied to the CPU one at a time.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=False).items():
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        for part in _parts(whole(stored_tensor(model, name, tensor)).detach()):
            flat = part.contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a tensor, or what a quantised one is made of: its codes, scales and zero points."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, attribute))


def model_manifest(model: nn.Module) -> dict[str, Any]:
    """Return class, fingerprint and number of parameters of a model, as the manifest keeps them."""
    kind = class_of(model)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "fingerprint": model_fingerprint(model),
        "n_params": sum(parameter.numel() for parameter in model.parameters()),
    }
