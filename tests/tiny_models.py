"""Models and data of a few hundred parameters, named as MODEL and DATA on command lines in the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TinyCausal(nn.Module):
    """Embedding, norm, untied head: a causal model of bytes without context."""

    is_causal = True

    def __init__(self, width: int = 4, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(256, width)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(input_ids)))


class TinyRegression(nn.Module):
    """Two linear layers from vectors `x` of 3 to 2 values."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Linear(3, 5)
            self.second = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def causal() -> nn.Module:
    return TinyCausal()


def causal_with_other_values() -> nn.Module:
    return TinyCausal(seed=1)


def causal_of_another_width() -> nn.Module:
    return TinyCausal(width=5)


def regression() -> nn.Module:
    return TinyRegression()


def frozen() -> nn.Module:
    return TinyCausal().requires_grad_(False)


def no_module() -> str:
    return "not a model"


def needs_an_argument(size: int) -> nn.Module:
    return TinyCausal(size)


def sequences(count: int = 6, length: int = 5) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 256, (length,), generator=generator)} for _ in range(count)]


def yielded_sequences():
    yield from sequences()


def one_token_in_sample_2() -> list[dict[str, Tensor]]:
    samples = sequences()
    samples[2] = {"input_ids": torch.tensor([7])}
    return samples


def masked_in_sample_3() -> list[dict[str, Tensor]]:
    samples = sequences()
    for number, sample in enumerate(samples):
        ids = sample["input_ids"]
        sample["labels"] = torch.full_like(ids, -100) if number == 3 else ids.clone()
    return samples


def label_beyond_the_classes() -> list[dict[str, Tensor]]:
    samples = [{**sample, "labels": sample["input_ids"].clone()} for sample in sequences()]
    samples[4]["labels"][2] = 300
    return samples


def squares(factor: float):
    """Return a loss of that many halves of squared errors; all have one name."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return factor * (model(batch["x"]) - batch["labels"]).pow(2).sum(1)

    return loss


def nothing() -> None:
    return None


def bare_tensors() -> list[Tensor]:
    return [torch.arange(4), torch.arange(4)]


def vectors(count: int = 8, nan_at: int | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, 3, generator=generator)
    if nan_at is not None:
        x[nan_at] = float("nan")
    return {"x": x, "labels": torch.randn(count, 2, generator=generator)}


def vectors_with_nan_in_sample_5() -> dict[str, Tensor]:
    return vectors(nan_at=5)


def vectors_with_nan_in_sample_0() -> dict[str, Tensor]:
    return vectors(nan_at=0)
