"""A small trained model and its text, so that everything can be tried without downloading anything.

From the command line, neither name needs arguments:

    streamfisher run streamfisher.demo:load_demo_model streamfisher.demo:demo_dataset --out demo.zarr
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from streamfisher.demo.model import ByteTransformer, ByteTransformerConfig, initialise
from streamfisher.demo.text import demo_samples, source_files, split_of, split_text

__all__ = [
    # The trained model and its text
    "load_demo_model",
    "demo_dataset",
    "demo_samples",
    "WEIGHTS",
    # The same, untrained, to be trained
    "ByteTransformer",
    "ByteTransformerConfig",
    "initialise",
    # Python's standard library as text
    "source_files",
    "split_of",
    "split_text",
]

WEIGHTS = Path(__file__).with_name("weights.safetensors")  # float32, made by examples/train_demo_model


def load_demo_model(dtype: torch.dtype = torch.float32) -> ByteTransformer:
    """Return the trained demo model in evaluation mode, on the CPU.

    Args:
        dtype: of all parameters; the stored float32 weights are converted exactly to float64, rounded to bfloat16.
    """
    model = ByteTransformer()
    model.load_state_dict(load_file(WEIGHTS), strict=True)
    return model.to(dtype).eval()


def demo_dataset() -> list[dict[str, Tensor]]:
    """Return the 256 validation sequences of 128 bytes that the demo uses."""
    return demo_samples(256, length=128, split="validation")
