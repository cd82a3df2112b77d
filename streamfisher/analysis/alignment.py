"""How much the blocks of a Fisher have in common: normalised inner products of their Grams, exact.

For blocks a and b, `<K_a, K_b> = tr(K_a K_b) = |G_a^T G_b|_F^2`: N^2 times the squared norm of the off-diagonal block
`F_ab` that a block-diagonal approximation drops. Normalised,

    A_ab = <K_a, K_b> / (|K_a| |K_b|) = |F_ab|^2 / (|F_aa| |F_bb|)

is 0 for blocks whose gradients never covary and 1 for the same geometry up to scale. For centered rows it is the linear
CKA of S. Kornblith et al., "Similarity of neural network representations revisited", ICML 2019; uncentered, the Gram
(kernel) alignment of N. Cristianini et al., "On kernel-target alignment", NeurIPS 2001.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil

from streamfisher.analysis.block_grams import BlockGrams
from streamfisher.results.analyses import Alignment
from streamfisher.runtime.stage_progress import steps


def align(grams: BlockGrams, gram_of: Callable[[str], np.ndarray] | None = None) -> Alignment:
    """Return the alignment of the blocks of a run, within half of the free memory.

    Args:
        grams: of the blocks.
        gram_of: block -> its (n, n) matrix, for who looks at what it is made of on the way; `None` means `grams.gram`.
    """
    keys = list(grams.blocks)
    each = 8 * len(grams.selection) ** 2
    tile = max(1, psutil.virtual_memory().available // (4 * each))
    shown = steps(keys, "blocks side by side", show=grams.progress, n_samples=len(grams.selection))
    products = inner_products(_counting(shown, gram_of or grams.gram), keys, tile)
    norms = np.sqrt(products.diagonal())
    with np.errstate(divide="ignore", invalid="ignore"):
        matrix = products / norms[:, None] / norms[None, :]
    matrix[~np.isfinite(matrix)] = np.nan
    diagonal = np.where(norms > 0, 1.0, np.nan)
    np.fill_diagonal(matrix, diagonal)
    return Alignment(tuple(keys), matrix, grams.center, len(grams.selection))


def _counting(steps_left: Iterator[str], gram_of: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """Return `gram_of`, which moves a bar on at every block."""

    def counted(key: str) -> np.ndarray:
        next(steps_left, None)
        return gram_of(key)

    return counted


def inner_products(gram_of: Callable[[str], np.ndarray], keys: Sequence[str], tile: int) -> np.ndarray:
    """Return `<K_a, K_b>` for all pairs, (B, B) float64, up to one common power of two squared.

    Args:
        gram_of: block key -> (n, n) Gram; read `B / tile` times.
        keys: of the blocks.
        tile: how many Grams of each side are held at once.
    """
    products = np.zeros((len(keys), len(keys)))
    exponent: int | None = None
    for i in range(0, len(keys), tile):
        left = [gram_of(key) for key in keys[i : i + tile]]
        if exponent is None:  # one power of two for all keeps squares of extreme gradients in range
            peak = max((float(np.abs(K.diagonal()).max()) for K in left), default=0.0)
            exponent = int(np.floor(np.log2(peak))) if peak > 0 else None
        shift = -(exponent or 0)
        left = [np.ldexp(K, shift) for K in left]
        for j in range(0, i + 1, tile):
            right = left if j == i else [np.ldexp(gram_of(key), shift) for key in keys[j : j + tile]]
            for a, K_a in enumerate(left):
                for b, K_b in enumerate(right):
                    products[i + a, j + b] = products[j + b, i + a] = float(np.vdot(K_a, K_b))
    return products
