"""Grams of gradients that are held on a device, made there: what leaves it is (N, N) for each Gram.

Rows of all samples are formed a slab of columns at a time, from factors or from rows that are there, and multiplied in
panels; the panels' products are added up in float64. Only blocks on and below the diagonal are formed. Nothing in a
parameter waits for the device: float32 products are scaled by a power of two that stays there. Slabs and panels follow
from sizes alone, so what memory there is changes no bit; where a device runs out of it, slabs are made smaller once,
which may change the last one.

It is torch code and runs on any device, the CPU included.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from streamfisher.config import SpectralConfig
from streamfisher.gradients.factors import matrix_shape
from streamfisher.reduction.folds import dtype_of_products
from streamfisher.reduction.gram import ParameterGram, finished
from streamfisher.reduction.products import SAFE_PEAK, full_precision
from streamfisher.runtime.bars import Bar
from streamfisher.runtime.run_log import event
from streamfisher.sinks.device import DeviceGradients, PlacedPair
from streamfisher.store.layout import PANEL

#: Bytes of a slab of formed rows.
_SLAB_BYTES = 256 << 20
#: So many times smaller are slabs once the device ran out of memory.
_SMALLER = 8
#: Samples of one block of a product: what lies above the blocks on the diagonal is not formed.
_BLOCK = 256
#: Size of the products by which float32 and float64 are compared.
_TRIAL = 2048


def build_device_grams(
    held: DeviceGradients,
    config: SpectralConfig,
    keys: Mapping[str, Sequence[str]],
    *,
    progress: bool = False,
) -> Iterator[ParameterGram]:
    """Yield the Grams of gradients on a device, one after the other: one thread feeds it.

    Args:
        held: the gradients.
        config: `dtype_gram` counts, and `use_deterministic`: then slabs are not made smaller where memory runs out.
        keys: Gram key -> parameters whose Grams it sums.
        progress: show a bar.

    Raises:
        CorruptRunError: a Gram is not finite.
        torch.cuda.OutOfMemoryError: the device is full, also with smaller slabs.
    """
    slab_bytes = _SLAB_BYTES
    with Bar(total=len(keys), desc="Gram", unit="Gram", disable=not progress) as bar:
        for key, members in keys.items():
            dtypes = {name: product_dtype(held.parameters[name], config.dtype_gram, held) for name in members}
            total = None
            if slab_bytes == _SLAB_BYTES and not config.use_deterministic:
                with contextlib.suppress(torch.cuda.OutOfMemoryError):
                    total = _sum_of(held, dtypes, slab_bytes)
                if total is None:  # what the error held is free by now
                    slab_bytes //= _SMALLER
                    event("smaller slabs", stage="grams", gram=key, bytes=slab_bytes)
                    _empty_cache(held.device)
            if total is None:
                total = _sum_of(held, dtypes, slab_bytes)
            yield finished(key, total, None, single=torch.float32 in dtypes.values())
            bar.update()


def _sum_of(held: DeviceGradients, dtypes: Mapping[str, torch.dtype], slab_bytes: int) -> np.ndarray:
    """Return the sum of the Grams of some parameters, (N, N) float64; the products of each are formed in its dtype."""
    total = _SymmetricSum(held.n_samples, held.device)
    for name, dtype in dtypes.items():
        for slab in _slabs(held, name, slab_bytes):
            for first in range(0, slab.shape[1], PANEL):
                total.add(slab[:, first : first + PANEL], dtype)
            del slab  # before the next one is made
    return total.result()


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def product_dtype(columns: int, dtype_gram: torch.dtype, held: DeviceGradients) -> torch.dtype:
    """Return the dtype in which the products of rows of so many columns are formed on the device.

    float64 takes the place of float32 where the device is no slower in it, as those with float64 tensor cores are.
    """
    rows = np.dtype("float64" if held.row_dtype == torch.float64 else "float32")
    if dtype_of_products(columns, dtype_gram, rows) == np.float64:
        return torch.float64
    return torch.float64 if _is_fast_in_float64(held.device) else torch.float32


@functools.cache
def _is_fast_in_float64(device: torch.device) -> bool:
    """Return whether a device multiplies no slower in float64 than in float32, as measured once; never on a CPU."""
    if device.type != "cuda":
        return False
    seconds = {}
    with torch.no_grad(), full_precision():
        for dtype in (torch.float32, torch.float64):
            panel = torch.ones(_TRIAL, _TRIAL, dtype=dtype, device=device)
            panel @ panel
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(4):
                panel @ panel
            torch.cuda.synchronize(device)
            seconds[dtype] = time.perf_counter() - start
    return seconds[torch.float64] <= 1.1 * seconds[torch.float32]


class _SymmetricSum:
    """Adds up products of panels with themselves, on and below the diagonal."""

    def __init__(self, n_samples: int, device: torch.device) -> None:
        self.total = torch.zeros(n_samples, n_samples, dtype=torch.float64, device=device)

    def add(self, panel: Tensor, dtype: torch.dtype) -> None:
        """Add the products of the rows of a panel, (N, m), formed in `dtype`."""
        n = len(panel)
        rows = panel.to(dtype)
        exponent = None
        if dtype == torch.float32:
            exponent = _exponent(rows)
            rows = torch.ldexp(rows, -exponent)
        with full_precision():
            for start in range(0, n, _BLOCK):
                stop = min(start + _BLOCK, n)
                below = self.total[start:, start:stop]
                if exponent is None:
                    below.addmm_(rows[start:], rows[start:stop].T)
                else:
                    below += torch.ldexp((rows[start:] @ rows[start:stop].T).double(), 2 * exponent)

    def result(self) -> np.ndarray:
        """Return the sum, (N, N) float64, exactly symmetric."""
        return (self.total.tril() + self.total.tril(-1).T).cpu().numpy()


def _exponent(panel: Tensor) -> Tensor:
    """Return the power of two to divide a panel by, so that its squares neither vanish nor overflow; 0 if they do not.

    It stays on the device.
    """
    peak = panel.abs().amax() if panel.numel() else panel.new_zeros(())
    left = torch.isfinite(peak) & (peak > 0) & ((peak <= SAFE_PEAK[0]) | (peak >= SAFE_PEAK[1]))
    return torch.where(left, torch.floor(torch.log2(peak)), 0.0)


def _slabs(held: DeviceGradients, name: str, slab_bytes: int) -> Iterator[Tensor]:
    """Yield the rows of a parameter, (N, some columns) float32 or float64, all columns that are not zero throughout."""
    columns = max(slab_bytes // (4 * max(held.n_samples, 1)) // PANEL, 1) * PANEL
    rows = held.rows.get(name)
    if rows is not None:
        for first in range(0, rows.shape[1], columns):
            yield rows[:, first : first + columns]
        return
    pairs, (m, n) = held.pairs[name], matrix_shape(held.shapes[name])
    # Of an embedding only the rows of tokens that occur: those of the others are zero.
    tokens = _tokens(pairs) if pairs and all(pair.by_index for pair in pairs) else None
    count = m if tokens is None else len(tokens)
    height = max(1, min(columns // n, count))
    dtype = torch.float64 if held.row_dtype == torch.float64 else torch.float32
    for top in range(0, count, height):
        bottom = min(top + height, count)
        ids = torch.arange(top, bottom, device=held.device) if tokens is None else tokens[top:bottom]
        slab = torch.zeros(held.n_samples, bottom - top, n, dtype=dtype, device=held.device)
        for pair in pairs:
            if pair.by_index:  # a product with one-hot rows, whose sums have a fixed order
                left = (ids[None, :, None] == pair.left[:, None, :]).to(pair.right.dtype)
            else:
                left = pair.left[:, :, top:bottom].transpose(1, 2)
            slab[pair.start : pair.start + len(pair.right)] += _multiply(left, pair.right, dtype)
        yield slab.flatten(1)


def _tokens(pairs: Sequence[PlacedPair]) -> Tensor:
    return torch.unique(torch.cat([pair.left.flatten() for pair in pairs]))


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `left @ right` of batches, with sums and results in `dtype`."""
    half = (torch.float16, torch.bfloat16)
    with full_precision():
        if right.is_cuda and left.dtype == right.dtype and right.dtype in half and dtype == torch.float32:
            return torch.bmm(left, right, out_dtype=torch.float32)
        return torch.bmm(left.to(dtype), right.to(dtype))
