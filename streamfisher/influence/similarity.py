"""Which samples have nearly the same gradient: cosines of rows, pairs above a threshold, clusters of them."""

from __future__ import annotations

import numpy as np

_TILE = 512


def inverse_norms(K: np.ndarray, smallest: float = 0.0) -> np.ndarray:
    """Return `1 / |g_i|` of the rows of a Gram, (n,) float64; 0 where a squared norm is not above `smallest`."""
    squared = K.diagonal()
    there = squared > max(smallest, 0.0)
    return np.where(there, 1.0 / np.sqrt(np.where(there, squared, 1.0)), 0.0)


def cosines(K: np.ndarray, rows: slice, inverse: np.ndarray) -> np.ndarray:
    """Return the cosines of some rows with all: (len(rows), n) float64, 0 for a row that is zero."""
    found: np.ndarray = K[rows] * inverse[rows, None] * inverse[None, :]
    return found


def similar_pairs(
    K: np.ndarray, threshold: float, inverse: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the pairs of samples whose gradients have a cosine of at least `threshold`, the closest first.

    Args:
        K: (n, n) float64.
        threshold: of the cosine.
        inverse: (n,) of `inverse_norms`.
        most: keep no more than so many.

    Returns:
        Places, (m, 2) int64, i < j; their cosines, (m,) float64; and how many pairs there are in all.
    """
    places, values, count = np.zeros((0, 2), dtype=np.int64), np.zeros(0), 0
    for start in range(0, len(K), _TILE):
        found = np.triu(cosines(K, slice(start, start + _TILE), inverse), k=start + 1)
        i, j = np.nonzero(found >= threshold)
        count += len(i)
        values = np.concatenate([values, found[i, j]])
        places = np.concatenate([places, np.stack([i + start, j], axis=1)])
        order = np.lexsort((places[:, 1], places[:, 0], -values))[:most]
        places, values = places[order], values[order]
    return places, values, count


def clusters_of(K: np.ndarray, threshold: float, inverse: np.ndarray) -> np.ndarray:
    """Return the cluster of each sample, (n,) int64, -1 for a sample that is like no other.

    Two samples are in one cluster where a chain of pairs above the threshold leads from one to the other. Clusters are
    numbered from the largest.
    """
    n = len(K)
    label, groups = np.full(n, -1), []
    for first in range(n):
        if label[first] >= 0:
            continue
        label[first] = first
        members, front = [first], np.array([first])
        while len(front):
            near = np.zeros(n, dtype=bool)
            for start in range(0, len(front), _TILE):
                part = front[start : start + _TILE]
                near |= (K[part] * inverse[part, None] * inverse >= threshold).any(axis=0)
            front = np.flatnonzero(near & (label < 0))
            label[front] = first
            members += front.tolist()
        if len(members) > 1:
            groups.append(sorted(members))
    for members in groups:
        label[members] = members[0]
    return numbered_clusters(label)


def numbered_clusters(label: np.ndarray) -> np.ndarray:
    """Return clusters numbered from the largest, (n,) int64, -1 for what is alone, from any label of each."""
    _, first, of, sizes = np.unique(label, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    number = np.empty(len(sizes), dtype=np.int64)
    number[order] = np.arange(len(sizes))
    return np.where(sizes[of] > 1, number[of], -1)
