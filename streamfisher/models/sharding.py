"""Parameters sharded over ranks by FSDP2: all ranks run each pass together, each on a batch of its own.

Inputs and output gradients of a module are whole on every rank, so its rows are formed as for any model. What is shared
is the weights: a rank that has no batch left runs the first sample again, and drops it, while another has one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from streamfisher.errors import ConfigError


def is_sharded(model: nn.Module) -> bool:
    """Return whether any parameter of the model is spread over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return the values of a tensor on every rank; a collective operation where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the model's class, not the one that FSDP2 made of it."""
    from torch.distributed.fsdp import FSDPModule

    return next(
        kind for kind in type(model).__mro__ if issubclass(kind, nn.Module) and not issubclass(kind, FSDPModule)
    )


def reshard(model: nn.Module) -> None:
    """Let go of weights that FSDP2 still holds whole after a pass: its outermost ones, until a backward pass."""
    for module in model.modules():
        let_go = getattr(module, "reshard", None)
        if let_go is not None and hasattr(module, "unshard"):
            let_go()


def check_ranks() -> None:
    """Refuse to shard over one rank.

    Raises:
        ConfigError: there is one rank only.
    """
    if not dist.is_initialized() or dist.get_world_size() < 2:
        raise ConfigError("--fsdp spreads the weights over ranks and needs at least 2; start with accelerate launch.")


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a model over all ranks by FSDP2, each of its repeated blocks by itself.

    Args:
        model: with the same weights on every rank, or without values.
        device: of this rank.

    Raises:
        ConfigError: there is one rank only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    check_ranks()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # in place: it only gives the model another class
    return model


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the elements of the outermost module lists: the layers of a transformer."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)]
    return [block for name in outer for block in lists[name]]
