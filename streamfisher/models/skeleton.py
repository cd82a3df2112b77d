"""A model without its weights: built from its config alone, with a checkpoint to read each segment's weights from."""

from __future__ import annotations

from pathlib import Path

import accelerate
import safetensors
import torch
from torch import nn

from streamfisher.config import SpectralConfig
from streamfisher.errors import ModelError, require
from streamfisher.runtime.memory import working_memory
from streamfisher.models.loading import auto_class, check_pretrained
from streamfisher.planning.run_layout import of_one_rank
from streamfisher.models.weights import Checkpoint, tensor_files


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
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        kind = auto_class(transformers, config)
        dtype = dtype or getattr(config, "dtype", None) or torch.float32
        with accelerate.init_empty_weights(include_buffers=False):
            model = kind._from_config(config, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"MODEL {folder} cannot be built from its config.json: {error}") from error
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
