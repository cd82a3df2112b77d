"""How exact the eigenvalues of float32 runs are, by decades below the largest, against a float64 autograd loop.

python tests/benchmarks/precision.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import float64_loop
import test_exactness

import streamfisher as sf
from streamfisher.blocks import STRUCTURES, assign_blocks, group_blocks


def compare(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return lambda_1 / lambda_k, the relative error and its estimate, of all eigenvalues above the floor."""
    make_model, make_samples, loss = test_exactness.CASES[case]
    torch.manual_seed(0)
    model, samples = make_model(), make_samples()
    rows = float64_loop.gradient_rows(model, samples, loss)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        config = sf.SpectralConfig(chunk_size=8, batch_tokens=64)
        run = sf.collect(model, samples, Path(folder) / "run.zarr", config=config)
        for structure in STRUCTURES:
            for center in (False, True):
                spectrum = run.spectrum(structure, center)
                for key, names in group_blocks(assign_blocks(rows, structure)).items():
                    block, expected = spectrum.blocks[key], float64_loop.eigenvalues(rows, names, center)
                    above = block.above_floor
                    error = np.abs(block.eigenvalues[above] / expected[above] - 1)
                    found.append((expected[0] / expected[above], error, block.relative_errors[above]))
    ratio, error, estimate = (np.concatenate(part) for part in zip(*found, strict=True))
    return ratio, error, estimate


def main() -> None:
    parts = [compare(case) for case in test_exactness.CASES]
    ratio, error, estimate = (np.concatenate(part) for part in zip(*parts, strict=True))
    print(
        f"{len(ratio)} eigenvalues above the noise floor; worst error over its estimate {(error / estimate).max():.2f}"
    )
    print("lambda_1 / lambda_k   eigenvalues   worst error   above 1e-5")
    for decade in range(int(np.log10(ratio.max())) + 1):
        inside = (ratio >= 10.0**decade) & (ratio < 10.0 ** (decade + 1))
        if inside.any():
            above = int((error[inside] > 1e-5).sum())
            print(f"1e{decade} to 1e{decade + 1:<12d}  {inside.sum():11d}   {error[inside].max():11.1e}   {above:10d}")


if __name__ == "__main__":
    main()
