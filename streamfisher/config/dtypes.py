"""Floating dtypes by name."""

from __future__ import annotations

from typing import overload

import torch

from streamfisher.errors import ConfigError

_FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
_SHORT |= {"f16": "float16", "f32": "float32", "float": "float32", "f64": "float64", "double": "float64"}


@overload
def parse_dtype(value: None, field: str = "dtype") -> None: ...
@overload
def parse_dtype(value: torch.dtype | str, field: str = "dtype") -> torch.dtype: ...
def parse_dtype(value: torch.dtype | str | None, field: str = "dtype") -> torch.dtype | None:
    """Return the floating `torch.dtype` that `value` names; `None` stays `None`.

    Raises:
        ConfigError: `value` is not one of float64, float32, bfloat16, float16, or a short name such as bf16.
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in _FLOATS:
        raise ConfigError(f"{field}={value!r} is not a floating dtype; choose one of {', '.join(_FLOATS)}.")
    return _FLOATS[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return `'float32'` for `torch.float32`, and so on."""
    return str(dtype).removeprefix("torch.")
