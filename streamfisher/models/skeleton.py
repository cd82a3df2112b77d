"""A model without its weights: built from its config alone, with a checkpoint to read each segment's weights from."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import safetensors
import torch
from torch import nn

from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError, ModelError, require
from streamfisher.models.calling import base_model
from streamfisher.models.loading import (
    auto_class,
    check_pretrained,
    in_a_sentence,
    is_adapter,
    model_and_tokenizer,
    with_adapter,
)
from streamfisher.models.weights import Checkpoint, tensor_files
from streamfisher.runtime.callables import call
from streamfisher.runtime.memory import of_one_rank, working_memory


def load_skeleton(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Checkpoint]:
    """Return a Hugging Face model whose weights stay in the folder's safetensors files, and what reads them.

    Args:
        folder: that `save_pretrained` wrote.
        dtype: of the weights once they are read; `None`: what config.json says.
        device: where they are put.
        trust_remote_code: run code that comes with the checkpoint.

    Raises:
        ModelError: the folder holds no such checkpoint, or a tensor is missing or has another shape.
        MissingExtraError: transformers is not installed.
    """
    folder = Path(folder)
    check_pretrained(str(folder))
    if not folder.is_dir():
        raise ModelError(f"MODEL {folder}: streaming reads weights from a folder on disk; download the model first.")
    require("transformers", "hf", f"load the model {folder}")
    import transformers

    files = tensor_files(folder)
    with in_a_sentence(f"MODEL {folder} cannot be built from its config.json"):
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        kind = auto_class(transformers, config)
        dtype = dtype or getattr(config, "dtype", None) or torch.float32
        with accelerate.init_empty_weights(include_buffers=False):
            model = kind._from_config(config, dtype=dtype)
    model.tie_weights()
    _read_buffers(model, files)
    return model.eval(), Checkpoint(model, folder, device)


def skeleton_is_needed(spec: str, config: SpectralConfig) -> bool:
    """Return whether a model's weights are to be read layer by layer.

    With `stream='layers'` where the folder's weights would take more than half of the memory that is free (or of
    `memory_budget`); the same with 'auto'. What fits is loaded whole: reading it again and again would cost time only.
    """
    if config.stream == "none" or not Path(spec).is_dir() or not (Path(spec) / "config.json").is_file():
        return False
    limit = working_memory(of_one_rank(config).memory_budget)
    return weight_bytes(Path(spec), config.dtype_model) > limit


def weight_bytes(folder: Path, dtype: torch.dtype | None) -> int:
    """Return the bytes of all weights of a checkpoint once they are in memory."""
    files = set(tensor_files(folder).values())
    stored = sum(file.stat().st_size for file in files)
    if dtype is None:
        return stored
    with safetensors.safe_open(next(iter(files)), framework="pt") as tensors:
        name = next(iter(tensors.keys()))
        itemsize = tensors.get_slice(name)[:1].element_size() if tensors.get_slice(name).get_shape() else 4
    return stored * dtype.itemsize // itemsize


def _read_buffers(model: nn.Module, files: dict[str, Path]) -> None:
    """Fill the buffers that the checkpoint holds; they are small and stay in memory."""
    for name, buffer in model.named_buffers():
        if name in files:
            with safetensors.safe_open(files[name], framework="pt") as tensors:
                buffer.copy_(tensors.get_tensor(name))


def build_skeleton(spec: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Return a model on the meta device where that is possible, in eval mode.

    Args:
        spec: a folder that holds at least a `config.json`, a Hugging Face id, or `package.module:callable`, which is
            called on the meta device and, if it cannot work there, once more plainly.
        dtype: cast to it; `None` keeps the dtype that the config names.
        trust_remote_code: run code that comes with a Hugging Face checkpoint.

    Raises:
        ConfigError: the callable does not exist or needs arguments.
        ModelError: there is no such model, or the callable returns something else.
        MissingExtraError: transformers is needed and not installed.
    """
    return skeleton_with_tokenizer(spec, dtype=dtype, trust_remote_code=trust_remote_code)[0]


def skeleton_with_tokenizer(
    spec: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Return a model as `build_skeleton` does, and the tokenizer that its callable returned beside it, or `None`."""
    if ":" in spec and not Path(spec).exists():
        model, tokenizer = model_and_tokenizer(_call(spec), spec)
        return (model.to(dtype) if dtype is not None else model).eval(), tokenizer
    check_pretrained(spec)
    require("transformers", "hf", f"read the config of {spec}")
    import transformers

    if is_adapter(spec):
        return with_adapter(
            partial(build_skeleton, dtype=dtype, trust_remote_code=trust_remote_code), spec
        ).eval(), None
    with in_a_sentence(f"MODEL {spec} cannot be built from its config", named=spec):
        config = transformers.AutoConfig.from_pretrained(spec, trust_remote_code=trust_remote_code)
        kind = auto_class(transformers, config)
        wanted = dtype or getattr(config, "dtype", None) or torch.float32
        if isinstance(wanted, str):
            wanted = getattr(torch, wanted)
        with torch.device("meta"):
            return kind._from_config(config, dtype=wanted).eval(), None


def predicts_next_token(model: nn.Module, loss: str | None) -> bool:
    """Return whether the loss is shifted by one, so that the last position of a sequence has no gradient.

    Args:
        model: may be on the meta device.
        loss: the name of the loss, or `None` where a run would choose it.
    """
    if loss is not None:
        return loss == "causal"
    base = base_model(model)
    name = type(base).__name__
    if name.endswith(("ForMaskedLM", "ForTokenClassification", "ForPreTraining", "ForConditionalGeneration")):
        return False
    config = getattr(base, "config", None)
    named = name.endswith(("ForCausalLM", "LMHeadModel"))
    return named or getattr(base, "is_causal", False) is True or getattr(config, "is_decoder", False) is True


def _call(spec: str) -> object:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model.*")
            return call(spec, "MODEL")
    except ConfigError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, OSError):
        return call(spec, "MODEL")  # it reads weights, or looks at values
