"""Model, samples and settings of the golden runs, to the bit the same on every machine: made without random numbers."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import streamfisher as sf

FOLDER = Path(__file__).parent / "golden"
N, VOCABULARY, WIDTH = 13, 16, 6
ONE_PASS = {"chunk_size": 8, "batch_tokens": 20, "use_deterministic": True, "device": "cpu", "n_workers": 1}

#: Settings of each run.
SETTINGS = {
    "dense": ONE_PASS | {"representation": "dense"},
    "factors": ONE_PASS | {"representation": "factors"},
    "waves": ONE_PASS | {"representation": "factors", "disk_budget": 12_000},
    "centered": ONE_PASS | {"representation": "dense", "store_centered": True},
    "version-1": ONE_PASS,
}


class GoldenModel(nn.Module):
    """Embedding, two residual linear layers, norm and head: a causal model of 274 parameters without context."""

    is_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)])
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                steps = torch.arange(parameter.numel()) * 37 + 11 * number
                parameter.copy_((steps % 101 - 50).reshape(parameter.shape) / 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        return self.head(self.norm(hidden))


def samples(count: int = N) -> list[dict[str, Tensor]]:
    """Return sequences of 3 to 6 tokens."""
    return [
        {"input_ids": (torch.arange(3 + number % 4) ** 2 * 5 + 3 * number + number**2) % VOCABULARY}
        for number in range(count)
    ]


def collect(path: Path, name: str, count: int = N) -> sf.Run:
    """Make, resume or grow the golden run of that name at `path`."""
    return sf.collect(GoldenModel(), samples(count), path, config=sf.SpectralConfig(**SETTINGS[name]))


def unpacked(name: str, folder: Path) -> Path:
    """Return a copy of a stored golden run under `folder`."""
    shutil.unpack_archive(FOLDER / f"{name}.tar.xz", folder, filter="data")
    return folder / name


def arithmetic() -> str:
    """Return a hash of what this machine's LAPACK, BLAS and numpy make of fixed numbers.

    Where it is that of the machine that wrote the golden runs, results must be the same to the bit.
    """
    A = ((np.arange(N * 40) * 37) % 101 - 50.0).reshape(N, 40) / 64
    positive = np.abs(A) + 1 / 64
    values = [np.linalg.eigvalsh(A @ A.T), np.log(positive), np.exp(A), np.sqrt(positive), positive**1.7]
    values += [np.linalg.norm(A), A.sum(), np.cumsum(A), np.log10(positive), np.polyfit(A[0], A[1], 1)]
    return hashlib.sha256(b"".join(np.asarray(value).tobytes() for value in values)).hexdigest()
