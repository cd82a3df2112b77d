"""In which precision the products of stored Grams were formed: what their rounding is."""

from __future__ import annotations

import numpy as np
import torch

from streamfisher.config import SpectralConfig
from streamfisher.errors import CorruptRunError
from streamfisher.gradients.factors import matrix_shape
from streamfisher.reduction.folds import WIDE
from streamfisher.reduction.gram import gram_settings
from streamfisher.reduction.kernels import choose_kernel, use_of
from streamfisher.store import RunStore


def float32_grams(store: RunStore, config: SpectralConfig, *, as_rows: bool = False) -> frozenset[str]:
    """Return the keys of the Grams that hold float32 products; of the others all were formed in float64.

    A Gram that several parameters share counts as float32 where one of them does: their parts are not known any more.

    Args:
        store: of the run.
        config: that the Grams are made with.
        as_rows: factors are multiplied as rows too, as those of an unfinished run are.
    """
    if config.dtype_gram == torch.float64 or store.rows.numpy_row_dtype == np.float64:
        return frozenset()
    return frozenset(key for key in store.gram_members if _is_single(store, key, config, as_rows=as_rows))


def _is_single(store: RunStore, key: str, config: SpectralConfig, *, as_rows: bool) -> bool:
    """Return whether float32 products are in a Gram: as its marker says, or for older ones by how such are made."""
    marker = store.grams.marker(key)
    if not as_rows and "float32_products" in marker and marker.get("settings") == gram_settings(config):
        return marker["float32_products"] is True
    return any(_multiplied_as_rows(store, key, name, as_rows=as_rows) for name in store.gram_members[key])


def _multiplied_as_rows(store: RunStore, key: str, name: str, *, as_rows: bool) -> bool:
    """Return whether rows of a wide parameter are multiplied, which is done in float32; short products never are."""
    if store.parameters[name] < WIDE:
        return False
    if as_rows or store.rows.representation(name) == "dense" or "tiles" in store.grams.marker(key):
        return True
    try:
        segments = store.factors.segments(name)
    except CorruptRunError:
        return True
    use = use_of(segments, matrix_shape(store.rows.shape(name)), store.n_samples)
    return not segments or choose_kernel(use, single=True) == "slabs"
