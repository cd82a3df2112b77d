"""Products of panels of gradient rows, added up in float64: by numpy, or by torch on a GPU.

A sum of panels B gives the rows of `K = sum B B^T` that are not known yet: all of them at first, and after a run has
grown only those of its new samples, `[new old^T, new new^T]`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from streamfisher.errors import ConfigError

#: Largest entries of a panel whose float32 products stay far from the ends of float32's range.
SAFE_PEAK = (1e-12, 1e12)


class ArrayModule(Protocol):
    """The few operations that rows are formed with, where their products are formed."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """Return an array or tensor of any content."""

    def take(self, values: np.ndarray) -> Any:
        """Return values where products are formed."""

    def multiply(self, left: Any, right: Any, out: Any) -> None:
        """Write the matrix products `left @ right` into `out`, (n, p, q)."""

    def scatter(self, block: Any, samples: np.ndarray, ids: np.ndarray, values: Any) -> None:
        """Add `values[k]` to `block[samples[k], ids[k]]`, for all k."""


class PanelSum(Protocol):
    """Adds up products of panels."""

    arrays: ArrayModule

    def add(self, panel: Any) -> None:
        """Add the products of a panel, (N, m) float32 or float64, in its own precision: an array, or of `arrays`."""

    def result(self) -> np.ndarray:
        """Return the sum over all panels: (N - known, N) float64."""


class NumpyArrays:
    """Arrays in host memory."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an array of any content."""
        return np.empty(shape, dtype=dtype)

    def take(self, values: np.ndarray) -> np.ndarray:
        """Return the values themselves."""
        return values

    def multiply(self, left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
        """Write `left @ right` into `out`."""
        np.matmul(left, right, out=out)

    def scatter(self, block: np.ndarray, samples: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
        """Add `values[k]` to `block[samples[k], ids[k]]`, for all k."""
        np.add.at(block, (samples, ids), values)


class TorchArrays:
    """Tensors on a device."""

    def __init__(self, device: torch.device):
        self.device = device

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        """Return a tensor of any content."""
        return torch.empty(shape, dtype=_TORCH[np.dtype(dtype)], device=self.device)

    def take(self, values: np.ndarray) -> Tensor:
        """Return the values on the device."""
        return torch.from_numpy(values).to(self.device)

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write `left @ right` into `out`, in full precision."""
        with full_precision():
            torch.matmul(left, right, out=out)

    def scatter(self, block: Tensor, samples: np.ndarray, ids: np.ndarray, values: Tensor) -> None:
        """Add `values[k]` to `block[samples[k], ids[k]]`, for all k."""
        where = tuple(torch.from_numpy(index).to(self.device) for index in (samples, ids))
        block.index_put_(where, values, accumulate=True)


_TORCH = {np.dtype("float32"): torch.float32, np.dtype("float64"): torch.float64}


def panel_sum(n_samples: int, known: int, device: str) -> PanelSum:
    """Return an empty sum on 'cpu' (numpy), 'cuda', or 'auto' (CUDA where there is one).

    Args:
        n_samples: rows of a panel, N.
        known: so many of the first rows are left out, because their products with each other are known.
        device: where the products are formed.

    Raises:
        ConfigError: CUDA is asked for in a process that has none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("gram_device='cuda': this process sees no CUDA device. Use cpu or auto.")
    if device == "cpu" or not torch.cuda.is_available():
        return NumpySum(n_samples, known)
    return TorchSum(n_samples, known, torch.device("cuda"))


def scaled_product(left: np.ndarray, right: np.ndarray, device: str = "cpu") -> np.ndarray:
    """Return `left @ right.T` of two panels of the same columns in their own precision, scaled so that it is in range.

    The same panel twice is a `syrk` and exactly symmetric.

    Args:
        left: (n, m) float32 or float64.
        right: (k, m), of the same dtype.
        device: 'cpu' (numpy), 'cuda', or 'auto'.

    Raises:
        ConfigError: CUDA is asked for in a process that has none.
    """
    exponents = [_exponent(left), _exponent(right)]
    same = right is left
    left = np.ldexp(left, -exponents[0]) if exponents[0] else left
    right = left if same else (np.ldexp(right, -exponents[1]) if exponents[1] else right)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("gram_device='cuda': this process sees no CUDA device. Use cpu or auto.")
    if device == "cpu" or not torch.cuda.is_available():
        product = left @ right.T
    else:
        rows = torch.from_numpy(np.ascontiguousarray(left)).cuda()
        others = rows if same else torch.from_numpy(np.ascontiguousarray(right)).cuda()
        with full_precision():
            found = (rows @ others.T).double()
        product = ((found + found.T) / 2 if same else found).cpu().numpy()
    shift = sum(exponents)
    return np.ldexp(product.astype(np.float64), shift) if shift else product


class NumpySum:
    """By numpy, whose `b @ b.T` calls `syrk`: half the work of a general product, and exactly symmetric."""

    def __init__(self, n_samples: int, known: int = 0):
        self.known = known
        self.arrays: ArrayModule = NumpyArrays()
        self.total = np.zeros((n_samples - known, n_samples))
        self._product: np.ndarray | None = None  # of a panel; kept, because fresh memory takes time

    def add(self, panel: np.ndarray) -> None:
        """Add the products of a panel."""
        if self.known == 0:
            with np.errstate(over="ignore", invalid="ignore"):
                product = np.matmul(panel, panel.T, out=self._buffer(panel.dtype))
            if _in_range(product, panel.shape[1]):
                self.total += product
                return
        exponent = _exponent(panel)
        if exponent:
            panel = np.ldexp(panel, -exponent)
        old, new = panel[: self.known], panel[self.known :]
        parts = [(new @ new.T, slice(self.known, None))]
        if self.known:
            parts.append((new @ old.T, slice(None, self.known)))
        for product, where in parts:
            self.total[:, where] += np.ldexp(product.astype(np.float64), 2 * exponent) if exponent else product

    def _buffer(self, dtype: np.dtype) -> np.ndarray:
        if self._product is None or self._product.dtype != dtype:
            self._product = np.empty((self.total.shape[1],) * 2, dtype=dtype)
        return self._product

    def result(self) -> np.ndarray:
        """Return the sum over all panels: (N - known, N) float64."""
        self._product = None
        return self.total


class TorchSum:
    """By torch on a device, in full float32 or float64: TF32 is never used."""

    def __init__(self, n_samples: int, known: int, device: torch.device):
        self.known, self.device = known, device
        self.arrays: ArrayModule = TorchArrays(device)
        self.total = torch.zeros(n_samples - known, n_samples, dtype=torch.float64, device=device)

    def add(self, panel: np.ndarray | Tensor) -> None:
        """Add the products of a panel."""
        if isinstance(panel, Tensor):
            rows = panel
            exponent = _exponent_of(float(panel.abs().max())) if panel.dtype == torch.float32 and panel.numel() else 0
        else:
            exponent = _exponent(panel)
            rows = torch.from_numpy(np.ascontiguousarray(panel)).to(self.device)
        if exponent:
            rows = torch.ldexp(rows, torch.tensor(-exponent, device=self.device))
        new = rows[self.known :]
        with full_precision():
            product: Tensor = (new @ rows.T).double()
        self.total += torch.ldexp(product, torch.tensor(2 * exponent, device=self.device)) if exponent else product

    def result(self) -> np.ndarray:
        """Return the sum over all panels: (N - known, N) float64."""
        square = self.total[:, self.known :]
        square.copy_((square + square.T) / 2)  # a general product is symmetric up to rounding only
        return self.total.cpu().numpy()


class full_precision:  # noqa: N801 - a context manager that reads as a phrase
    """float32 products in float32, whatever the process has allowed."""

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *error: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def _in_range(product: np.ndarray, columns: int) -> bool:
    """Return whether a panel's product with itself needed no scaling.

    The largest entry of its diagonal is between the square of the panel's largest entry and `columns` times that.
    """
    if product.dtype != np.float32:
        return True
    largest = float(product.diagonal().max(initial=0.0))
    return columns * SAFE_PEAK[0] ** 2 < largest < SAFE_PEAK[1] ** 2


def _exponent(panel: np.ndarray) -> int:
    """Return the power of two to divide a float32 panel by, so that its squares neither vanish nor overflow.

    Scaling by a power of two is exact, so it changes no bit of a product that needed none; 0 for those.
    """
    if panel.dtype != np.float32 or panel.size == 0:
        return 0
    return _exponent_of(float(max(panel.max(), -panel.min())))


def _exponent_of(peak: float) -> int:
    if not np.isfinite(peak) or peak == 0.0 or SAFE_PEAK[0] < peak < SAFE_PEAK[1]:
        return 0
    return int(np.floor(np.log2(peak)))


def complete(new_rows: np.ndarray, old: np.ndarray | None) -> np.ndarray:
    """Return the whole Gram, (N, N), from its new rows (n, N) and the known part (N - n, N - n)."""
    known = 0 if old is None else len(old)
    if old is None or known == 0:
        return new_rows
    gram = np.empty((known + len(new_rows), known + len(new_rows)))
    gram[:known, :known] = old
    gram[known:] = new_rows
    gram[:known, known:] = new_rows[:, :known].T
    return gram
