"""Train the byte-level model that ships with streamfisher on the running interpreter's standard library.

    python examples/train_demo_model/train.py --out weights.safetensors

The same CPython sources, torch version, kind of CPU and number of threads give the same weights, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange

from streamfisher.demo import ByteTransformer, initialise, split_text

SEED = 42
THREADS = 2  # part of the recipe: sums are split over threads, and another split rounds differently
LENGTH = 128
BATCH = 32
PEAK_RATE = 3e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1


def learning_rate(step: int, steps: int) -> float:
    """Rise linearly over the warm-up, then follow a cosine down to zero."""
    warmup = min(WARMUP_STEPS, steps)
    if step < warmup:
        return PEAK_RATE * (step + 1) / warmup
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def next_byte_loss(model: ByteTransformer, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per predicted byte, of (B, T) sequences."""
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: ByteTransformer, text: Tensor, max_sequences: int) -> float:
    """Return the mean nats per byte over evenly spread windows of `text`, (bytes,) uint8."""
    windows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    windows = windows[:: max(1, len(windows) // max_sequences)][:max_sequences].long()
    losses = [next_byte_loss(model, batch).item() * len(batch) for batch in windows.split(256)]
    return sum(losses) / len(windows)


def cross_entropy_of_bytes(train: Tensor, validation: Tensor) -> float:
    """Return the nats per byte of `validation` under the byte frequencies of `train`, with add-one smoothing."""
    frequencies = torch.bincount(train, minlength=256).double() + 1
    counts = torch.bincount(validation, minlength=256).double()
    return -(counts / counts.sum() @ (frequencies / frequencies.sum()).log()).item()


def train(text: Tensor, steps: int) -> ByteTransformer:
    """Return a model trained for `steps` batches of random windows of `text`, (bytes,) uint8."""
    generator = torch.Generator().manual_seed(SEED)
    model = ByteTransformer()
    initialise(model, generator)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    within = torch.arange(LENGTH)
    with trange(steps, unit="step") as progress:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            starts = torch.randint(len(text) - LENGTH + 1, (BATCH, 1), generator=generator)
            loss = next_byte_loss(model, text[starts + within].long())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 20 == 0:
                progress.set_postfix(nats_per_byte=f"{loss.item():.3f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2800, help="batches to train on (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("weights.safetensors"), help="file for the weights")
    parser.add_argument("--report", type=Path, help="file for the figures (default: the weights' name with .json)")
    parser.add_argument("--max-eval", type=int, default=4096, help="sequences per split to evaluate on")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    texts = {split: split_text(split) for split in ("train", "validation")}
    tensors = {split: torch.frombuffer(bytearray(text), dtype=torch.uint8) for split, text in texts.items()}

    started = time.perf_counter()
    model = train(tensors["train"], args.steps)
    seconds = time.perf_counter() - started
    save_file(model.state_dict(), args.out)

    losses = {split: mean_loss(model, text, args.max_eval) for split, text in tensors.items()}
    unigram = cross_entropy_of_bytes(tensors["train"], tensors["validation"])
    report = {
        **{f"{split}_nats_per_byte": round(loss, 4) for split, loss in losses.items()},
        **{f"{split}_bits_per_byte": round(loss / math.log(2), 4) for split, loss in losses.items()},
        "unigram_nats_per_byte": round(unigram, 4),
        "unigram_bits_per_byte": round(unigram / math.log(2), 4),
        "steps": args.steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights_sha256": hashlib.sha256(args.out.read_bytes()).hexdigest(),
        **{f"{split}_text_bytes": len(text) for split, text in texts.items()},
        **{f"{split}_text_sha256": hashlib.sha256(text).hexdigest() for split, text in texts.items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": THREADS,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "training_seconds": round(seconds, 1),
    }
    text = json.dumps(report, indent=2)
    (args.report or args.out.with_suffix(".json")).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
