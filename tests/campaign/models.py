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


def few_ids() -> list[dict[str, Tensor]]:
    """Return 6 sequences of ids below 50."""
    return [{"input_ids": sample["input_ids"] % 50} for sample in tiny_models.sequences()]


class Awkward(torch.nn.Module):
    """Products with parameters whose names would act on terminals, in pages, tables and pictures."""

    def __init__(self) -> None:
        super().__init__()
        from campaign.hostile_fields import EVILS

        names = [name.replace(".", "") for name in EVILS if "\ud800" not in name]
        values = [torch.linspace(0.1 + number, 1.0, 3) for number in range(len(names))]
        self.inner = torch.nn.ParameterDict(dict(zip(names, values, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        return sum((x * value**2).sum(dim=-1, keepdim=True) for value in self.inner.values())


def awkward() -> torch.nn.Module:
    """Return a regression with awkward names."""
    return Awkward()


def awkward_vectors() -> dict[str, Tensor]:
    """Return 8 samples for it."""
    data = tiny_models.vectors()
    return {"x": data["x"], "labels": data["labels"][:, :1]}
