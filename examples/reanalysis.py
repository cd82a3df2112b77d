"""A stored run, examined without its model: other blocks, subsets, intervals, directions.

    python examples/reanalysis.py [RUN.zarr]        a minute on two cores

Without a run, a small one of the demo model is made first; from there on only the folder is read.
"""

import sys
import tempfile
from pathlib import Path

import streamfisher as sf
from streamfisher.reports import table


def make(folder: Path) -> Path:
    """Collect a run of the demo model and forget the model."""
    from streamfisher.demo import demo_samples, load_demo_model

    return sf.collect(load_demo_model(), demo_samples(64, 64), folder / "run.zarr").path


def main(path: Path) -> sf.Spectrum:
    """Print what a run can be asked."""
    run = sf.open_run(path)
    print(table(run.spectrum("module", bootstrap=200)), "\n")

    hard = run.losses > sorted(run.losses)[len(run.losses) // 2]
    for name, samples in (("all samples", None), ("the half with the larger loss", hard)):
        found = run.spectrum("none", samples=samples).global_.metrics
        print(f"{name}: trace {found['trace']:.3e}, effective rank {found['effective_rank']:.1f}")

    print("effective rank with more and more samples:", run.growth("none").curve("effective_rank"))
    print("how blocks share directions (normalised inner products of their Grams):")
    print(run.alignment("module").matrix.round(2))
    vectors = run.eigenvectors(next(iter(run.spectrum("layer").blocks)), top=3)
    print(f"three leading eigenvectors, orthonormal to {vectors.orthonormality_error:.0e}, are stored in the run")
    return run.spectrum("none")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(make(Path(temporary)))
