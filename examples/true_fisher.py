"""Empirical Fisher against true Fisher: labels from the data, or drawn from the model's own prediction.

    python examples/true_fisher.py [FOLDER]        half a minute on two cores

The empirical Fisher takes the gradients of the loss on the data's own tokens; the true Fisher takes them on tokens
drawn from the model. Only the latter is the expected curvature of the log-likelihood; the former is what most people
compute. Printed: trace, largest eigenvalue and effective rank of both, per layer, and how much of one's leading
eigenspace lies in the other's.
"""

import sys
import tempfile
from pathlib import Path

import streamfisher as sf
from streamfisher.demo import demo_samples, load_demo_model

N_SAMPLES, LENGTH = 64, 64


def main(folder: Path) -> sf.Comparison:
    """Collect both runs and compare them."""
    model, samples = load_demo_model(), demo_samples(N_SAMPLES, LENGTH)
    runs = [
        sf.collect(model, samples, folder / f"{labels}.zarr", config=sf.SpectralConfig(labels=labels))
        for labels in ("data", "model")
    ]
    for run in runs:
        spectrum = run.spectrum("layer")
        print(f"labels from the {spectrum.metadata['labels']}; mean loss per sequence {run.losses.mean():.1f} nats")
        for name, block in [*spectrum.blocks.items(), ("global", spectrum.global_)]:
            found = block.metrics
            print(
                f"  {name:10} trace {found['trace']:10.3e}  largest {found['largest_eigenvalue']:10.3e}  "
                f"effective rank {found['effective_rank']:6.1f}"
            )
    found = sf.compare([run.path for run in runs], top=5)
    for overlap in found.overlaps:
        print(f"  {overlap.block:10} mean squared cosine of the leading 5-spaces {overlap.mean_squared_cosine:.2f}")
    return found


if __name__ == "__main__":
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
        target.mkdir(parents=True, exist_ok=True)
        main(target)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
