"""Frozen results about single samples: who carries an eigenvector, leverage, leave-one-out, duplicates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from streamfisher.results.metrics import json_values

LooMetric = Literal["largest_eigenvalue", "trace", "effective_rank"]


@dataclass(frozen=True)
class LeaveOneOut:
    """Metrics of a block's Fisher of N - 1 samples, for each sample that may be left out."""

    largest_eigenvalue: np.ndarray  # (n,) float64
    trace: np.ndarray  # (n,) float64
    effective_rank: np.ndarray  # (n,) float64, of the eigenvalues above the noise floor of the whole
    whole: Mapping[str, float]  # the same metrics of all N samples

    def change(self, metric: LooMetric) -> np.ndarray:
        """Return `without / with - 1`, (n,) float64: by how much leaving out each sample moves a metric."""
        value = self.whole[metric]
        values: np.ndarray = getattr(self, metric)
        return values / value - 1.0 if value else np.zeros(len(values))


@dataclass(frozen=True)
class SampleAnalysis:
    """What the Gram of one block says of its samples. Every array over samples is in the order of `samples`."""

    block: str
    samples: np.ndarray  # (n,) int64, numbers in the run
    fields: Mapping[str, np.ndarray]  # name -> (n,) float64: loss, n_targets, scalars of the data
    texts: tuple[str, ...] | None  # what each sample says, where that was given
    eigenvalues: np.ndarray  # (k,) float64, the leading ones, descending
    loadings: np.ndarray  # (n, k) float64, orthonormal columns; the largest of each, by its size, is positive
    trace: float  # of the block
    noise_floor: float  # eigenvalues below it are rounding, and have no eigenvector
    squared_norms: np.ndarray  # (n,) float64 of the gradients, centered where that was asked for, not weighted
    masses: np.ndarray  # (n,) float64, w_i / Z: F = sum_i masses_i g_i g_i^T
    dampings: np.ndarray  # (m,) float64, in the units of the eigenvalues
    leverages: np.ndarray  # (m, n) float64, 0 to 1
    effective_dimensions: np.ndarray  # (m,) float64, the sums of the leverages
    without: LeaveOneOut | None  # None: of 2 samples none can be left out
    threshold: float  # of the cosine of near-duplicates
    pairs: np.ndarray  # (p, 2) int64, numbers of samples in the run, the closest first
    pair_cosines: np.ndarray  # (p,) float64
    n_pairs: int  # above the threshold, also those that are not listed
    cluster: np.ndarray  # (n,) int64, clusters of near-duplicates from the largest; -1: like no other
    n_params: int
    centered: bool
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def self_influence(self) -> np.ndarray:
        """Return `g_i^T (F + lambda I)^-1 g_i`, (m, n): the leverage without the sample's own weight in F."""
        found: np.ndarray = self.leverages / self.masses
        return found

    @property
    def shares(self) -> np.ndarray:
        """Return the squared loadings, (n, k): columns add up to 1."""
        squared: np.ndarray = np.square(self.loadings)
        return squared

    @property
    def participation(self) -> np.ndarray:
        """Return `1 / sum_i u_ij^4`, (k,): about how many samples carry each eigenvector, 1 to n.

        Source: the participation number of R. J. Bell and P. Dean, "Atomic vibrations in vitreous silica", 1970.
        """
        return np.asarray(1.0 / np.square(self.shares).sum(axis=0))

    @property
    def is_outlier(self) -> np.ndarray:
        """Return (k,) bool: one sample has more than half of the eigenvector."""
        return np.asarray(self.shares.max(axis=0, initial=0.0) > 0.5)

    @property
    def clusters(self) -> list[np.ndarray]:
        """Return the clusters of near-duplicates, from the largest: numbers of samples in the run."""
        return [self.samples[self.cluster == number] for number in range(int(self.cluster.max(initial=-1)) + 1)]

    def carriers(self, index: int, count: int = 5) -> list[dict[str, Any]]:
        """Return the samples that carry an eigenvector most, with loading and share, as plain values.

        Args:
            index: of the eigenvector, from 0.
            count: how many samples.
        """
        places = np.argsort(-self.shares[:, index], kind="stable")[:count]
        return [
            self._described(int(place))
            | {"loading": float(self.loadings[place, index]), "share": float(self.shares[place, index])}
            for place in places
        ]

    def most_leveraged(self, damping: int = -1, count: int = 10) -> list[dict[str, Any]]:
        """Return the samples of the highest leverage at a damping, by its place in `dampings`, as plain values."""
        scores = self.leverages[damping]
        places = np.argsort(-scores, kind="stable")[:count]
        return [self._described(int(place)) | {"leverage": float(scores[place])} for place in places]

    def most_moving(self, metric: LooMetric, count: int = 10) -> list[dict[str, Any]]:
        """Return the samples whose removal moves a metric most, up or down, as plain values."""
        if self.without is None:
            return []
        change = self.without.change(metric)
        places = np.argsort(-np.abs(change), kind="stable")[:count]
        values = getattr(self.without, metric)
        return [
            self._described(int(place)) | {metric: float(values[place]), "change": float(change[place])}
            for place in places
        ]

    def _described(self, place: int) -> dict[str, Any]:
        found: dict[str, Any] = {"sample": int(self.samples[place])}
        found |= {name: float(values[place]) for name, values in self.fields.items()}
        return found | ({} if self.texts is None else {"text": self.texts[place]})

    def to_dict(self, carriers: int = 5, count: int = 10) -> dict[str, Any]:
        """Return what stands out as plain JSON values; the arrays over all samples are for `export`.

        Args:
            carriers: samples of each eigenvector.
            count: samples of each other list.
        """
        whole = None if self.without is None else dict(self.without.whole)
        metrics: tuple[LooMetric, ...] = ("largest_eigenvalue", "trace", "effective_rank")
        content: dict[str, Any] = {
            "block": self.block,
            "n_samples": len(self.samples),
            "n_params": self.n_params,
            "centered": self.centered,
            "trace": self.trace,
            "noise_floor": self.noise_floor,
            "eigenvectors": [
                {
                    "index": index + 1,
                    "eigenvalue": float(value),
                    "participation": float(self.participation[index]),
                    "one_sample": bool(self.is_outlier[index]),
                    "carriers": self.carriers(index, carriers),
                }
                for index, value in enumerate(self.eigenvalues)
            ],
            "leverage": [
                {
                    "damping": float(damping),
                    "effective_dimension": float(self.effective_dimensions[place]),
                    "highest": self.most_leveraged(place, count),
                }
                for place, damping in enumerate(self.dampings)
            ],
            "leave_one_out": {"whole": whole, **{metric: self.most_moving(metric, count) for metric in metrics}},
            "duplicates": {
                "threshold": self.threshold,
                "n_pairs": self.n_pairs,
                "pairs": [
                    {"samples": pair, "cosine": cosine}
                    for pair, cosine in zip(self.pairs.tolist(), self.pair_cosines.tolist(), strict=True)
                ],
                "clusters": [members.tolist() for members in self.clusters],
            },
            "metadata": dict(self.metadata),
        }
        found: dict[str, Any] = json_values(content)
        return found
