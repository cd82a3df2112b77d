"""A Hugging Face checkpoint into a model: whole, spread by a device map, or each rank its part of every tensor.

Files are safetensors, mapped into memory. Weights that keep their dtype and stay on the CPU are views of the mapped
file, so ranks on one node share them; weights for a GPU go there tensor by tensor, and no copy stays on the host.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from streamfisher.errors import ConfigError, ModelError
from streamfisher.models.sharding import check_ranks, shard


def load_weights(kind: Any, spec: str, options: Mapping[str, Any]) -> nn.Module:
    """Return the model of a checkpoint, none of whose weights are made up.

    Args:
        kind: a class of transformers.
        spec: a Hugging Face folder or id.
        options: for `from_pretrained`.

    Raises:
        ModelError: the checkpoint is damaged, or lacks a tensor of the model or has it in another shape. Tensors that
            the model does not have are named in a warning.
    """
    from safetensors import SafetensorError

    try:
        with _unreported():
            model, found = kind.from_pretrained(spec, **options, ignore_mismatched_sizes=True, output_loading_info=True)
    except SafetensorError as error:
        raise ModelError(f"MODEL {spec}: its weights are damaged: {error}. Copy or download them again.") from error
    other = sorted((name, tuple(stored), tuple(expected)) for name, stored, expected in found["mismatched_keys"])
    if other:
        name, stored, expected = other[0]
        part = " (this rank's part)" if expected != tuple(model.get_parameter(name).shape) else ""
        raise ModelError(
            f"MODEL {spec}: {name} has the shape {stored} in the checkpoint and {expected} in the model{part}"
            f"{_more(len(other) - 1)}. The weights belong to another config.json."
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"MODEL {spec}: the checkpoint lacks {', '.join(missing[:3])}{_more(len(missing) - 3)}, and what it lacks "
            f"would be drawn at random. Use a checkpoint that was saved from a {_class_name(model)}, or name in its "
            "config.json (architectures) the class it was saved from."
        )
    extra = sorted(found["unexpected_keys"])
    if extra:
        warnings.warn(
            f"MODEL {spec}: {', '.join(extra[:3])}{_more(len(extra) - 3)} of the checkpoint have no place in a "
            f"{_class_name(model)} and are left out.",
            stacklevel=2,
        )
    return model


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Keep transformers from printing names of tensors as they are; what counts of its report is said by us."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_sharded(kind: Any, spec: str, options: Mapping[str, Any], device: torch.device) -> nn.Module:
    """Return the model of a checkpoint sharded over all ranks by FSDP2, without the whole of it on any of them.

    The model is built without values, sharded, and filled: each rank reads its rows of every tensor from the mapped
    files. Where the checkpoint holds a weight in pieces (experts one by one), a rank reads those it needs.

    Args:
        kind: a class of transformers.
        spec: a Hugging Face folder or id.
        options: for `from_pretrained`.
        device: of this rank.

    Raises:
        ConfigError: there is one rank only, or the checkpoint is quantised.
        ModelError: as `load_weights`; or a weight was left without values.
    """
    check_ranks()
    if getattr(options["config"], "quantization_config", None) is not None:
        raise ConfigError(f"--fsdp cannot shard the quantised weights of {spec}; leave it out, or use --device-map.")
    if not hasattr(kind, "maybe_distribute_model"):  # an older transformers: every rank loads the whole
        return shard(load_weights(kind, spec, options), device)
    from transformers.distributed import DistributedConfig

    class Sharded(kind):
        """What `from_pretrained` calls between building the model and filling it, done by us."""

        @classmethod
        def prepare_distribute_model(cls, config: Any, device_map: Any = None) -> tuple[Any, Any, None]:
            return config, {"": str(device)}, None

        @classmethod
        def maybe_distribute_model(cls, model: Any, config: Any, mesh: None) -> nn.Module:
            del model.config.distributed_config
            model.__class__ = kind
            model.tie_weights()  # before sharding, which otherwise takes a tied weight for two
            return shard(model, device)

    Sharded.__name__ = kind.__name__
    model = load_weights(Sharded, spec, {**options, "distributed_config": DistributedConfig()})
    empty = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    empty += [name for name, value in model.named_parameters() if not isinstance(value, DTensor)]
    if empty:
        raise ModelError(
            f"MODEL {spec}: {', '.join(empty[:3])}{_more(len(empty) - 3)} could not be loaded shard by shard with this "
            "version of transformers. Use --device-map, or a module:callable that returns the model."
        )
    return model


def _class_name(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("FSDP")


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""
