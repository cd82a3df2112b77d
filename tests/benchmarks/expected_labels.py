"""What the gradients of labels='expected' cost: every class of every input, beside so many plain passes.

`python tests/benchmarks/expected_labels.py [--repeats 5] [--chunk-size 32]`

A convolutional network and a vision transformer of 10 classes, float32, one thread. Columns are ratios to C plain
passes (forward, loss, backward with weight gradients, 32 inputs at a time) in the same process: one forward pass for
the classes of an input, as a run does it, and one for each sample, as it does where inputs are few and small.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import streamfisher as sf
from streamfisher.collection import model_producer, survey
from streamfisher.gradients import Asked, Wave, shared_forward
from streamfisher.planning import representation

CLASSES = 10


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.ReLU()]
    layers += [nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, CLASSES))


def transformer() -> nn.Module:
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, image_size=64, patch_size=8,
        num_labels=CLASSES,
    )  # fmt: skip
    return ViTForImageClassification(config)


def plain_passes(model: nn.Module, key: str, data: dict[str, torch.Tensor]) -> None:
    """One pass of all inputs, with the gradients of the weights."""
    model.requires_grad_(True)
    for start in range(0, len(data["labels"]), 32):
        model.zero_grad()
        output = model(data[key][start : start + 32])
        logits = getattr(output, "logits", output)
        nn.functional.cross_entropy(logits, data["labels"][start : start + 32], reduction="sum").backward()
    model.zero_grad()


def measured(model: nn.Module, key: str, n: int, size: int, chunk_size: int, repeats: int) -> tuple[float, float]:
    """Return the best ratios to C plain passes, with one forward pass for all classes and without."""
    data = {key: torch.randn(n, 3, size, size), "labels": torch.arange(n) % CLASSES}
    config = sf.SpectralConfig(labels="expected", chunk_size=chunk_size)
    found = survey.survey(model, data, config)
    config = found.settled(config)
    least = shared_forward.LEAST_INPUTS
    with model_producer(model, found, config) as producer:
        producer.probe()
        shapes, _ = producer.shapes()
        chosen = representation.choose_representation(shapes, "auto", row_itemsize=4)
        factored = [name for name, held in chosen.items() if held == "factors"]
        batches = found.batches(model, config)
        buffers = producer.allocate(config.chunk_size, [name for name in producer.parameters if name not in factored])

        def gradients(fewest: int) -> None:
            shared_forward.LEAST_INPUTS = fewest
            model.requires_grad_(False)
            producer.begin(Wave(0, tuple(producer.parameters), batches, tuple(batches)))
            for batch in batches:
                asked = {name: rows[: len(batch)] for name, rows in buffers.items()}
                producer.gradients(batch, Asked(asked, factored))

        works: list[Callable[[], None]] = [
            lambda: plain_passes(model, key, data),
            lambda: gradients(least),
            lambda: gradients(10**9),
        ]
        best = [float("inf")] * len(works)
        for _ in range(repeats + 1):  # in turns, so that a change of the machine's speed hits all alike
            for place, work in enumerate(works):
                start = time.perf_counter()
                work()
                best[place] = min(best[place], time.perf_counter() - start)
    return best[1] / (CLASSES * best[0]), best[2] / (CLASSES * best[0])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--chunk-size", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'':14}{'one forward':>14}{'a forward each':>16}   of {CLASSES} plain passes")
    for name, make, key, n, size in (
        ("convolutional", convolutional, "input", 64, 32),
        ("transformer", transformer, "pixel_values", 32, 64),
    ):
        shared, each = measured(make(), key, n, size, arguments.chunk_size, arguments.repeats)
        print(f"{name:14}{shared:14.2f}{each:16.2f}")


if __name__ == "__main__":
    main()
