"""Samples of a Gram that does not fit the memory: what needs no eigenvector but the leading ones, tile by tile.

Leading eigenvectors in sample space by block Lanczos, near-duplicates, norms, and products with queries are read off
tiles. Leverage scores and what is without a sample take all eigenvectors, and are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.influence.similarity import numbered_clusters
from streamfisher.results.samples import SampleAnalysis
from streamfisher.runtime.determinism import one_thread
from streamfisher.solving.centering import CENTERING_ROUNDING
from streamfisher.solving.selection import Selection
from streamfisher.solving.tiled_gram import TiledGram


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Pairs of samples whose gradients are alike, and what chains of them connect."""

    places: np.ndarray  # (p, 2) int64, the closest first
    cosines: np.ndarray  # (p,) float64
    count: int  # of all pairs
    cluster: np.ndarray  # (n,) int64, from the largest; -1: like no other


def samples_by_tiles(
    grams: BlockGrams,
    block: str,
    top: int,
    threshold: float,
    most_pairs: int,
    fields: dict[str, np.ndarray],
    texts: tuple[str, ...] | None,
) -> SampleAnalysis:
    """Return what can be known of the samples of a block whose Gram does not fit the memory.

    Args:
        grams: blocks, samples, weights and centering.
        block: its key.
        top: leading eigenvectors.
        threshold: of the cosine of near-duplicates.
        most_pairs: list no more than so many pairs of them.
        fields: of the selected samples.
        texts: of the selected samples.

    Raises:
        ConvergenceError: the eigenvectors did not reach their tolerance.
        CorruptRunError: a tile is missing or damaged.
    """
    selection, n = grams.selection, len(grams.selection)
    with one_thread(grams.config.use_deterministic):
        spectrum, vectors, K = grams.leading_space(block, top)
        diagonal = K.diagonal()
        smallest = CENTERING_ROUNDING * float(diagonal.max(initial=0.0)) if grams.center else 0.0
        alike = duplicates(K, diagonal, smallest, threshold, most_pairs)
    k = int(spectrum.above_floor.sum())
    loadings = vectors[:, :k].copy()
    loadings *= np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(k)])
    weights = np.ones(n) if selection.weights is None else selection.weights
    return SampleAnalysis(
        block=spectrum.name,
        samples=selection.samples,
        fields=fields,
        texts=texts,
        eigenvalues=spectrum.eigenvalues[:k],
        loadings=loadings,
        trace=spectrum.trace,
        noise_floor=spectrum.noise_floor,
        squared_norms=diagonal / (weights * selection.factor),
        masses=weights / selection.denominator,
        dampings=np.zeros(0),
        leverages=np.zeros((0, n)),
        effective_dimensions=np.zeros(0),
        without=None,
        threshold=threshold,
        pairs=selection.samples[alike.places],
        pair_cosines=alike.cosines,
        n_pairs=alike.count,
        cluster=alike.cluster,
        n_params=spectrum.n_params,
        centered=grams.center,
        metadata={**grams.metadata, "by_tiles": True},
    )


def duplicates(K: TiledGram, diagonal: np.ndarray, smallest: float, threshold: float, most: int) -> Duplicates:
    """Return the pairs of samples whose gradients have a cosine of at least `threshold`.

    Args:
        K: the Gram.
        diagonal: of it, (n,).
        smallest: squared norms that are not above it count as zero.
        threshold: of the cosine.
        most: pairs that are listed.
    """
    there = diagonal > max(smallest, 0.0)
    inverse = np.where(there, 1.0 / np.sqrt(np.where(there, diagonal, 1.0)), 0.0)
    places, cosines, count = np.zeros((0, 2), dtype=np.int64), np.zeros(0), 0
    label = np.arange(K.n)
    for rows, columns, part in K.tiles():
        found = part * inverse[rows, None] * inverse[None, columns]
        i, j = np.nonzero(np.triu(found >= threshold, k=1) if rows == columns else found >= threshold)
        if not len(i):
            continue
        count += len(i)
        cosines = np.concatenate([cosines, found[i, j]])
        i, j = i + rows.start, j + columns.start
        places = np.concatenate([places, np.stack([i, j], axis=1)])
        order = np.lexsort((places[:, 1], places[:, 0], -cosines))[:most]
        places, cosines = places[order], cosines[order]
        label = joined(label, i, j)
    return Duplicates(places, cosines, count, numbered_clusters(label))


def joined(label: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the labels of clusters, (n,), once those of samples i and j are one: each is its smallest sample."""
    while True:
        low, high = np.minimum(label[i], label[j]), np.maximum(label[i], label[j])
        if np.array_equal(low, high):
            return label
        to = np.arange(len(label))
        np.minimum.at(to, high, low)
        while not np.array_equal(to, to[to]):
            to = to[to]
        label = to[label]


def raw_rows(grams: BlockGrams, key: str, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the products of some samples with all of a run, neither centered nor weighted: (Q, N) float64.

    Products with samples that are neither selected nor among `numbers` are left at zero.
    """
    samples = np.union1d(grams.selection.samples, numbers)
    everyone = Selection(samples, None, float(len(samples)))
    K = dataclasses.replace(grams, selection=everyone, center=False).operator(grams.blocks[key])
    found = np.zeros((len(numbers), grams.n_stored))
    found[:, samples] = K.rows(np.searchsorted(samples, numbers))
    return found


def raw_operator(grams: BlockGrams, key: str) -> TiledGram:
    """Return the Gram of the selected samples, neither centered nor weighted."""
    n = len(grams.selection)
    plain = Selection(grams.selection.samples, None, float(n))
    return dataclasses.replace(grams, selection=plain, center=False).operator(grams.blocks[key])
