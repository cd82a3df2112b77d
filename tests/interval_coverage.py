"""How often intervals hold what they are of, on Gaussian rows of known spectra: `python tests/interval_coverage.py`."""

from __future__ import annotations

import numpy as np
import torch

from streamfisher import SpectralConfig
from streamfisher.analysis import BlockGrams
from streamfisher.analysis.bootstrap import bootstrap
from streamfisher.results import SCALAR_METRICS
from streamfisher.results.bootstrap import WITHOUT_INTERVAL
from streamfisher.solving import RowPrecision, select

COUNTS = np.arange(1, 201.0)
SPECTRA = {"flat": np.ones(200), "k^-0.7": COUNTS**-0.7, "k^-1.5": COUNTS**-1.5, "spike": np.r_[200.0, np.ones(199)]}
WITH_INTERVAL = [name for name in SCALAR_METRICS if name not in WITHOUT_INTERVAL]


def coverage(eigenvalues, n, repeats, resamples, seed=0):
    """Return metric -> share of data sets whose interval has the value that N samples give on average.

    Rows are Gaussian with a covariance of these eigenvalues.
    """
    generator = np.random.default_rng(seed)
    found, values = [], []
    for repeat in range(repeats):
        grams = grams_of(generator.standard_normal((n, len(eigenvalues))) * np.sqrt(eigenvalues))
        spectrum = grams.spectrum()
        found.append(bootstrap(grams, spectrum, resamples, seed=repeat).global_)
        values.append(spectrum.global_.metrics)
    shares = {}
    for metric in WITH_INTERVAL:
        truth = np.mean([value[metric] for value in values])
        intervals = [one.interval(metric) for one in found]
        if None not in intervals:
            shares[metric] = float(np.mean([i.low <= truth <= i.high for i in intervals]))
    truth = float(eigenvalues.sum())
    shares["true trace"] = float(
        np.mean([one.interval("trace").low <= truth <= one.interval("trace").high for one in found])
    )
    return shares


def grams_of(G, center=False, weights=None, **options):
    return BlockGrams(
        gram_of=lambda name: G @ G.T,
        parameters={"w": G.shape[1]},
        assignment={"w": "global"},
        selection=select(len(G), np.ones(len(G), bool), weights=weights, n_targets=np.arange(len(G)) + 1, **options),
        center=center,
        config=SpectralConfig(n_workers=1),
        precision=RowPrecision(torch.float64, 2.0**-53),
        metadata={},
    )


def main() -> None:
    """Print the coverage of 300 data sets of each spectrum, at two sizes."""
    for n in (64, 128):
        for name, eigenvalues in SPECTRA.items():
            shares = coverage(eigenvalues, n, repeats=300, resamples=100)
            print(
                f"| {n} | {name} | " + " | ".join(f"{100 * share:.0f}" for share in shares.values()) + " |", flush=True
            )


if __name__ == "__main__":
    main()
