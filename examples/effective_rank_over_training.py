"""Effective rank of every layer over the training of a small transformer: a run per checkpoint, then no model at all.

    python examples/effective_rank_over_training.py [FOLDER]        a minute on two cores

Printed: effective rank and overlap of the leading eigenspaces of each layer from checkpoint to checkpoint. With
matplotlib, `FOLDER/spectra.png` shows the spectra over each other.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

import torch

import streamfisher as sf
from streamfisher.demo import ByteTransformer, demo_samples, initialise
from streamfisher.reports import comparison_picture

CHECKPOINTS = (0, 10, 40, 120)  # steps
N_SAMPLES, LENGTH = 48, 48


def main(folder: Path) -> sf.Comparison:
    """Train, collect a run at each checkpoint, and compare them."""
    model = ByteTransformer()
    initialise(model, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = demo_samples(2048, LENGTH, split="train")
    probe = demo_samples(N_SAMPLES, LENGTH, split="validation")
    order = torch.Generator().manual_seed(1)
    paths, step = [], 0
    for stop in CHECKPOINTS:
        model.train()
        while step < stop:
            batch = torch.stack([text[int(i)]["input_ids"] for i in torch.randint(len(text), (16,), generator=order)])
            logits = model(batch)
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        paths.append(folder / f"step-{stop:03d}.zarr")
        sf.collect(model, probe, paths[-1])

    found = sf.compare(paths, "layer", top=5)  # from here on no model is needed
    for block in found.shared_blocks:
        ranks = "  ".join(f"{value:5.1f}" for value in found.trajectory("effective_rank", block))
        overlaps = "  ".join(f"{o.mean_squared_cosine:.2f}" for o in found.overlaps if o.block == block)
        print(f"{block:10s} effective rank {ranks}    overlap of the top 5 with the next checkpoint {overlaps}")
    if importlib.util.find_spec("matplotlib"):
        print("Spectra:", comparison_picture(found, folder / "spectra.png"))
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
