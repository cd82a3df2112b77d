"""How gradient rows are encoded on disk.

Measured on bf16 and fp32 gradients (see docs/design.md): Blosc lz4 with bitshuffle is the fastest that still shrinks
them. None of raw, Blosc and plain Zstd notices a flipped byte, so every chunk ends in a CRC-32C.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

import google_crc32c
import numpy as np
import torch
import zarr
from numcodecs import Blosc, Zstd
from numcodecs.bitround import BitRound
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from streamfisher.config import Codec

#: Zarr v3 has no bfloat16: its bits are stored as uint16 under the attribute `logical_dtype`.
_STORED: dict[torch.dtype, np.dtype] = {
    torch.float64: np.dtype("float64"),
    torch.float32: np.dtype("float32"),
    torch.float16: np.dtype("float16"),
    torch.bfloat16: np.dtype("uint16"),
}
_BFLOAT16_NAN = 0x7FC0
_BLOSC_NAME: Final = "lz4"
_BLOSC_LEVEL: Final = 5
_ZSTD_LEVEL = 1


def stored_dtype(dtype: torch.dtype) -> np.dtype:
    """Return the numpy dtype that holds `dtype` on disk."""
    return _STORED[dtype]


def stored_dtype_of(name: str) -> np.dtype:
    """Return the numpy dtype that holds the floating dtype `name` on disk.

    Raises:
        KeyError: there is no such dtype.
    """
    return {str(dtype).removeprefix("torch."): stored for dtype, stored in _STORED.items()}[name]


def fill_value(dtype: torch.dtype) -> float | int:
    """Return NaN in the encoding of `dtype`: a chunk that is missing must never read as zeros."""
    return _BFLOAT16_NAN if dtype == torch.bfloat16 else float("nan")


def compressors(codec: Codec, dtype: torch.dtype) -> list[Any]:
    """Return the bytes-to-bytes codecs of a chunk; the last one is always a CRC-32C."""
    if codec == "raw":
        return [Crc32cCodec()]
    if codec == "zstd":
        return [ZstdCodec(level=_ZSTD_LEVEL), Crc32cCodec()]
    return [
        BloscCodec(cname=_BLOSC_NAME, clevel=_BLOSC_LEVEL, shuffle="bitshuffle", typesize=stored_dtype(dtype).itemsize),
        Crc32cCodec(),
    ]


def packer(codec: Codec, itemsize: int) -> Callable[[np.ndarray], Any] | None:
    """Return what packs the bytes of a chunk as `compressors` has it, in the calling thread; `None`: nothing does.

    Args:
        codec: of a run, never 'auto'.
        itemsize: bytes of an element.
    """
    if codec == "raw":
        return None
    if codec == "zstd":
        return Zstd(level=_ZSTD_LEVEL).encode
    return Blosc(cname=_BLOSC_NAME, clevel=_BLOSC_LEVEL, shuffle=Blosc.BITSHUFFLE, typesize=itemsize).encode


def filters(bitround: int | None) -> list[Any]:
    """Return the array-to-array codecs: BitRound to `bitround` mantissa bits, or none."""
    if bitround is None:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not in the Zarr v3 specification": documented in docs/format.md
        from zarr.codecs.numcodecs import BitRound

        return [BitRound(keepbits=bitround)]


def encode(rows: Tensor, dtype: torch.dtype, bitround: int | None = None) -> np.ndarray:
    """Round rows to `dtype` (to nearest, ties to even) and return them as the numpy array that is stored.

    It may be the memory of the rows themselves.

    Args:
        rows: on the CPU.
        dtype: to store.
        bitround: mantissa bits that are kept, as by the codec of `filters`; `None`: all.
    """
    rounded = rows.to(dtype)
    if dtype == torch.bfloat16:
        return rounded.view(torch.uint16).numpy()
    stored = rounded.numpy()
    return stored if bitround is None else BitRound(keepbits=bitround).encode(stored).view(stored.dtype)


def decode(stored: np.ndarray, dtype: torch.dtype, out: np.ndarray | None = None) -> np.ndarray:
    """Return stored rows as float32, or float64 where they were stored so; in `out`, if given, of that dtype."""
    if out is None:
        if dtype not in (torch.bfloat16, torch.float16):
            return stored
        out = np.empty(stored.shape, dtype=np.float32)
    if dtype == torch.bfloat16:  # the upper half of the bits of a float32
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32, casting="unsafe")
    else:
        out[...] = stored
    return out


def checksum(array: np.ndarray) -> int:
    """Return the CRC-32C of an array's bytes, in C order."""
    return google_crc32c.value(np.ascontiguousarray(array))


def quiet_open(*args: Any, **kwargs: Any) -> zarr.Group:
    """Open a Zarr group without the warnings about files that are not part of the hierarchy (markers, log)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        return zarr.open_group(*args, **kwargs)
