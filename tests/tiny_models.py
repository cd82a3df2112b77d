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


class TinyDocuments(nn.Module):
    """Averages over each document of a packed sample, or over whatever a mask leaves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(16, 4), nn.Linear(4, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None):
        document = torch.ones_like(input_ids) if position_ids is None else (position_ids == 0).cumsum(1)
        together = document[:, :, None] == document[:, None, :]
        if attention_mask is not None:
            together = (attention_mask != 0)[:, None, :].expand_as(together)
        x = self.embedding(input_ids)
        return self.head(together.to(x) @ x / together.sum(-1, keepdim=True))


class TinyTable(nn.Module):
    """eval() makes a table of a parameter, without gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.table = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    @torch.no_grad()
    def train(self, mode: bool = True) -> nn.Module:
        self.made = None if mode else self.table * 1.0
        return super().train(mode)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.first(input_ids) * (self.table if self.training else self.made)


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


def documents_under_a_mask() -> list[dict[str, Tensor]]:
    places = torch.tensor([0, 1, 2, 0, 1])
    return [
        {"input_ids": torch.arange(i, i + 5), "position_ids": places, "attention_mask": places * 0 + 1} for i in (1, 2)
    ]


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
