"""A classifier of C classes has C - 1 outlying Fisher eigenvalues early in training; what comes of them later.

scikit-learn's digits (C = 10), a small network, the true Fisher (`labels='model'`) and the empirical one
(`labels='data'`), before training and along it. Printed: how many eigenvalues stand out, the gap after the ninth, and
the share of the mean gradient that lies in the top-k eigenspace.

    python examples/digits_outliers.py [FOLDER]        about a minute on two cores; needs scikit-learn

Source of the claim: V. Papyan, "Measurements of three-level hierarchical structure in the outliers in the spectrum of
deepnet Hessians", ICML 2019; G. Gur-Ari, D. Roberts and E. Dyer, "Gradient descent happens in a tiny subspace", 2018.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import streamfisher as sf

CLASSES, N_SAMPLES, EPOCHS = 10, 400, (0, 1, 4, 40)


def main(folder: Path) -> list[dict]:
    """Train, collect a run at each of `EPOCHS` for both kinds of labels, and print what the spectra show."""
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0 - 0.5, dtype=torch.float32)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = torch.randperm(len(x))
    probe = {"x": x[order[:N_SAMPLES]], "labels": y[order[:N_SAMPLES]]}

    results, epoch = [], 0
    for stop in EPOCHS:
        for _ in range(epoch, stop):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        epoch = stop
        for labels in ("model", "data"):
            results.append(look(model, probe, folder / f"epoch-{stop:02d}-{labels}.zarr", labels) | {"epoch": stop})
            print(describe(results[-1]))
    return results


def cross_entropy(model, batch):
    """Return per-sample losses (B,)."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def look(model, probe, path, labels):
    """Collect a run and return what stands out in its whole spectrum."""
    logits_of = {"x": probe["x"], "labels": probe["labels"]}
    if labels == "model":  # the true Fisher: labels drawn from the model's own prediction
        with torch.no_grad():
            p = torch.softmax(model(probe["x"]), dim=1)
        generator = torch.Generator().manual_seed(0)
        logits_of["labels"] = torch.multinomial(p, 1, generator=generator).squeeze(1)
    run = sf.collect(model, logits_of, path, config=sf.SpectralConfig(use_deterministic=True), loss=cross_entropy)
    values = run.spectrum("none").global_.eigenvalues
    vectors = run.eigenvectors("global", CLASSES, block_structure="none")
    # The mean gradient's projection on V is the mean of the projections; its norm is what centering takes away.
    mean_in_space = np.square(vectors.projections().mean(axis=0)).sum()
    mean_squared = run.spectrum("none", center=False).global_.trace - run.spectrum("none", center=True).global_.trace
    ratios = values[:20] / values[1:21]
    return {
        "labels": labels,
        "gap": float(ratios[CLASSES - 2]),  # lambda_9 / lambda_10
        "outliers": int(np.argmax(ratios) + 1),  # how many eigenvalues lie above the widest gap of the first 20
        "top_share": float(values[: CLASSES - 1].sum() / values.sum()),
        "mean_gradient_in_top_space": float(mean_in_space / mean_squared),
        "trace": float(values.sum()),
    }


def describe(found):
    """Return one line about one run."""
    return (
        f"epoch {found['epoch']:2d}, labels of the {found['labels']:5s}: trace {found['trace']:9.3g}, "
        f"widest gap after {found['outliers']:2d}, lambda_9/lambda_10 {found['gap']:.2f}, "
        f"{found['top_share']:4.0%} of the trace in the top 9, "
        f"{found['mean_gradient_in_top_space']:4.0%} of the mean gradient in the top {CLASSES}"
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
