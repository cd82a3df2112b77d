"""Data of the campaigns: vectors whose samples carry two scalars, and short sequences for factors."""

from __future__ import annotations

import tiny_models
import torch
from torch import Tensor


def vectors() -> list[dict[str, Tensor]]:
    """Return 8 samples of the tiny regression with the scalars `weight` and `length`."""
    data = tiny_models.vectors()
    return [
        {
            "x": data["x"][n],
            "labels": data["labels"][n],
            "weight": torch.tensor(0.5 + n),
            "length": torch.tensor(9.0 - n),
        }
        for n in range(8)
    ]
