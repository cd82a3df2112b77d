"""Grams of gradients that are held on a device, made there: what leaves it is (N, N) for each Gram.

Rows of all samples are formed a slab of columns at a time, from factors or from rows that are there, and multiplied in
panels; the panels' products are added up in float64, part by part of a parameter's columns, so that ranks can share
one. Only blocks on and below the diagonal are formed. Nothing in a parameter waits for the device: float32 products are
scaled by a power of two that stays there. Parts, slabs and panels follow from sizes alone, so neither what memory there
is nor the number of ranks changes a bit; where a device runs out of memory, slabs are made smaller once, which may
change the last one.

It is torch code and runs on any device, the CPU included.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

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
#: Columns of a row in one part, whose products are a sum of their own.
_PART = 1 << 22
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
    slabs = _Slabs(held, config)
    with Bar(total=len(keys), desc="Gram", unit="Gram", disable=not progress) as bar:
        for key, members in keys.items():
            dtypes = [_dtype_of(held, name, config.dtype_gram) for name in members]
            pieces = [(name, *columns) for name in members for columns in held_parts(held, name)]
            total = slabs.fitting(functools.partial(_sum_of, held, pieces, config.dtype_gram), key)
            yield finished(key, total, None, single=torch.float32 in dtypes)
            bar.update()


def build_device_folds(
    held: DeviceGradients, parts: Sequence[tuple[str, int, int]], config: SpectralConfig
) -> list[np.ndarray]:
    """Return the products of some parts, as they are added up in `build_device_grams`: (N, N) float64 each.

    Args:
        held: the gradients, of these columns at least.
        parts: parameter, first column or matrix row, and one past the last, see `device_parts`.
        config: as for `build_device_grams`.

    Raises:
        torch.cuda.OutOfMemoryError: the device is full, also with smaller slabs.
    """
    slabs = _Slabs(held, config)
    forms = [functools.partial(_sum_of, held, [part], config.dtype_gram) for part in parts]
    return [slabs.fitting(form, part[0]) for form, part in zip(forms, parts, strict=True)]


class _Slabs:
    """The size of slabs, which become smaller once the device ran out of memory."""

    def __init__(self, held: DeviceGradients, config: SpectralConfig) -> None:
        self._size, self._device, self._fixed = _SLAB_BYTES, held.device, config.use_deterministic

    def fitting(self, form: Callable[[int], np.ndarray], what: str) -> np.ndarray:
        """Return what is formed with slabs of so many bytes.

        Args:
            form: is given the bytes.
            what: is formed, for the log.

        Raises:
            torch.cuda.OutOfMemoryError: the device is full, also with smaller slabs.
        """
        if self._size == _SLAB_BYTES and not self._fixed:
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                return form(self._size)
            # What the error held is free by now.
            self._size //= _SMALLER
            event("smaller slabs", stage="grams", gram=what, bytes=self._size)
            _empty_cache(self._device)
        return form(self._size)


def device_parts(shape: tuple[int, int] | None, columns: int) -> list[tuple[int, int]]:
    """Return the parts of a parameter: first column and one past the last of rows, or the same of rows of the matrix.

    Args:
        shape: (m, n), of a gradient that is held as factors; `None`: as rows.
        columns: of a row.
    """
    m, width = (columns, _PART) if shape is None else (shape[0], max(1, _PART // max(shape[1], 1)))
    return [(first, min(first + width, m)) for first in range(0, m, width)]


def held_parts(held: DeviceGradients, name: str) -> list[tuple[int, int]]:
    """Return the parts of a parameter, see `device_parts`."""
    shape = None if name in held.rows else matrix_shape(held.shapes[name])
    return device_parts(shape, held.parameters[name])


def _sum_of(
    held: DeviceGradients, pieces: Sequence[tuple[str, int, int]], dtype_gram: torch.dtype, slab_bytes: int
) -> np.ndarray:
    """Return the sum of the products of some parts, (N, N) float64, exactly symmetric."""
    total: Tensor | None = None
    for name, start, stop in pieces:
        dtype = _dtype_of(held, name, dtype_gram)
        part = _SymmetricSum(held.n_samples, held.device)
        for slab in _slabs(held, name, start, stop, slab_bytes):
            for first in range(0, slab.shape[1], PANEL):
                part.add(slab[:, first : first + PANEL], dtype)
            del slab  # before the next one is made
        total = part.total if total is None else total.add_(part.total)
    if total is None:
        return np.zeros((held.n_samples, held.n_samples))
    return _symmetric(total)


def _symmetric(lower: Tensor) -> np.ndarray:
    """Return the whole of a matrix that was formed on and below its diagonal, in host memory."""
    return (lower.tril() + lower.tril(-1).T).cpu().numpy()


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def product_dtype(columns: int, dtype_gram: torch.dtype, row_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which the products of rows of so many columns are formed on a device.

    float64 takes the place of float32 where the device is no slower in it, as those with float64 tensor cores are.
    """
    rows = np.dtype("float64" if row_dtype == torch.float64 else "float32")
    if dtype_of_products(columns, dtype_gram, rows) == np.float64:
        return torch.float64
    return torch.float64 if _is_fast_in_float64(device) else torch.float32


def _dtype_of(held: DeviceGradients, name: str, dtype_gram: torch.dtype) -> torch.dtype:
    return product_dtype(held.parameters[name], dtype_gram, held.row_dtype, held.device)


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
        return _symmetric(self.total)


def _exponent(panel: Tensor) -> Tensor:
    """Return the power of two to divide a panel by, so that its squares neither vanish nor overflow; 0 if they do not.

    It stays on the device.
    """
    peak = panel.abs().amax() if panel.numel() else panel.new_zeros(())
    left = torch.isfinite(peak) & (peak > 0) & ((peak <= SAFE_PEAK[0]) | (peak >= SAFE_PEAK[1]))
    return torch.where(left, torch.floor(torch.log2(peak)), 0.0)


def _slabs(held: DeviceGradients, name: str, start: int, stop: int, slab_bytes: int) -> Iterator[Tensor]:
    """Yield the rows of a part of a parameter, (N, some columns) float32 or float64, but columns that are all zero."""
    columns = max(slab_bytes // (4 * max(held.n_samples, 1)) // PANEL, 1) * PANEL
    rows = held.rows.get(name)
    if rows is not None:
        before = held.first.get(name, 0)
        for first in range(start, stop, columns):
            yield rows[:, first - before : min(first + columns, stop) - before]
        return
    pairs, (_, n) = held.pairs[name], matrix_shape(held.shapes[name])
    # Of an embedding only the rows of tokens that occur: those of the others are zero.
    by_token = bool(pairs) and all(pair.by_index for pair in pairs)
    ids = _tokens(pairs, start, stop) if by_token else torch.arange(start, stop, device=held.device)
    height = max(1, min(columns // n, len(ids)))
    dtype = torch.float64 if held.row_dtype == torch.float64 else torch.float32
    for top in range(0, len(ids), height):
        here = ids[top : top + height]
        slab = torch.zeros(held.n_samples, len(here), n, dtype=dtype, device=held.device)
        for pair in pairs:
            if pair.by_index:  # a product with one-hot rows, whose sums have a fixed order
                left = (here[None, :, None] == pair.left[:, None, :]).to(pair.right.dtype)
            else:
                first = start + top - pair.first
                left = pair.left[:, :, first : first + len(here)].transpose(1, 2)
            slab[pair.start : pair.start + len(pair.right)] += _multiply(left, pair.right, dtype)
        yield slab.flatten(1)


def _tokens(pairs: Sequence[PlacedPair], start: int, stop: int) -> Tensor:
    """Return the token ids from `start` to `stop` that occur."""
    ids = torch.unique(torch.cat([pair.left.flatten() for pair in pairs]))
    return ids[(ids >= start) & (ids < stop)]


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `left @ right` of batches, with sums and results in `dtype`."""
    half = (torch.float16, torch.bfloat16)
    with full_precision():
        if right.is_cuda and left.dtype == right.dtype and right.dtype in half and dtype == torch.float32:
            return torch.bmm(left, right, out_dtype=torch.float32)
        return torch.bmm(left.to(dtype), right.to(dtype))
