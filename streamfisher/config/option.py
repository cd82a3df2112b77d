"""One definition of an option: its default, what it means, what it may be, and its place on the command line.

A field of a section is made by one of the functions here. What they put into the field's metadata checks a value
wherever it comes from, makes the command line's argument (`cli/options.py`), and documents the field.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, overload

import numpy as np
import torch

from streamfisher.byte_sizes import parse_bytes
from streamfisher.errors import ConfigError

_FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Takes the name of a field and a value; returns the value as it is kept, or raises `ConfigError`.
Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class Option:
    """What is known of a field beside its default and type."""

    help: str  # what it means, with its unit; ends in the default where that is not plain
    check: Check
    identity: bool  # it decides the bits of stored gradients or Grams, so that a run does not resume with another
    group: str | None  # of the command line; None: in Python and files only
    flag: str | None  # on the command line, where it differs from the field's name
    argument: Mapping[str, Any]  # what `argparse` needs to know beside that


def option(
    default: Any,
    help: str,
    check: Check,
    *,
    identity: bool = False,
    group: str | None = None,
    flag: str | None = None,
    **argument: Any,
) -> Any:
    """Return a dataclass field with its `Option`; further arguments go to `argparse`."""
    return dataclasses.field(default=default, metadata={"option": Option(help, check, identity, group, flag, argument)})


def option_of(item: dataclasses.Field[Any]) -> Option:
    """Return the option of a dataclass field that `option` made."""
    found: Option = item.metadata["option"]
    return found


def choice(kind: Any, *, optional: bool = False) -> Check:
    """Return a check for one of the values of a `Literal`, or of a tuple; `None` too, where it is optional."""
    allowed = kind if isinstance(kind, tuple) else get_args(kind)
    allowed = (None, *allowed) if optional else allowed

    def check(field: str, value: Any) -> Any:
        if value not in allowed:
            names = ", ".join(str(known).removeprefix("torch.") for known in allowed)
            raise ConfigError(f"{field}={show(value)} is unknown; choose one of {names}.")
        return value

    return check


def whole(least: int, *, optional: bool = False) -> Check:
    """Return a check for a whole number of at least `least`."""

    def check(field: str, value: Any) -> Any:
        if optional and value is None:
            return None
        value = int(value) if isinstance(value, np.integer) else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{field}={show(value)} must be a whole number of at least {least}.")
        return value

    return check


def yes_or_no(field: str, value: Any) -> bool:
    """Check a truth value."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{field}={show(value)} must be true or false.")
    return bool(value)


def dtype(*allowed: torch.dtype, optional: bool = False) -> Check:
    """Return a check for a floating dtype, by its name too; of `allowed`, where any are named."""
    among = choice(allowed) if allowed else None

    def check(field: str, value: Any) -> torch.dtype | None:
        parsed: torch.dtype | None = parse_dtype(value, field)
        if among is not None and not (optional and parsed is None):
            among(field, parsed)
        return parsed

    return check


def patterns(field: str, value: Any) -> tuple[str, ...]:
    """Check one or more patterns of parameter names."""
    several = (value,) if isinstance(value, str) else value
    if not isinstance(several, list | tuple) or not all(isinstance(pattern, str) for pattern in several):
        raise ConfigError(f"{field}={value!r} must be a pattern of parameter names, or a list of patterns.")
    return tuple(several)


def kept(field: str, value: Any) -> tuple[str, ...] | None:
    """Check which gradients stay: `('*',)` for 'all', `()` for 'none', or patterns; `None`: decided by the budgets."""
    if value is None:
        return None
    if value in ("all", ("all",), ["all"]):
        return ("*",)
    return () if value in ("none", ("none",), ["none"]) else patterns(field, value)


def number(field: str, value: Any) -> float | None:
    """Check a number; text counts where it is one, because YAML reads `1e-6` as text."""
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{field}={value!r} must be a number.") from None


def size(field: str, value: Any) -> int | None:
    """Check bytes, as a number or as `'2GB'`."""
    return None if value is None else parse_bytes(value, field)


def folder(field: str, value: Any) -> str | None:
    """Check the path of a folder."""
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{field}={value!r} must name a folder.")
    return str(os.fspath(value))


def device(field: str, value: Any) -> str:
    """Check the name of a device."""
    if not isinstance(value, str | torch.device) or not str(value):
        raise ConfigError(f"{field}={value!r} is no device; write auto, cpu, cuda or cuda:1.")
    return str(value)


def solver_device(field: str, value: Any) -> str:
    """Check the name of a device that eigenvalues are solved on."""
    name = str(value) if isinstance(value, str | torch.device) else ""
    if not re.fullmatch(r"auto|cpu|(cuda|mps)(:[0-9]+)?", name):
        raise ConfigError(f"{field}={value!r} is unknown; choose one of auto, cpu, cuda, cuda:1, mps.")
    return name


@overload
def parse_dtype(value: None, field: str = "dtype") -> None: ...
@overload
def parse_dtype(value: torch.dtype | str, field: str = "dtype") -> torch.dtype: ...
def parse_dtype(value: torch.dtype | str | None, field: str = "dtype") -> torch.dtype | None:
    """Return the floating `torch.dtype` that `value` names; `None` stays `None`.

    Raises:
        ConfigError: `value` is not one of float64, float32, bfloat16, float16.
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in _FLOATS:
        raise ConfigError(f"{field}={value!r} is not a floating dtype; choose one of {', '.join(_FLOATS)}.")
    return _FLOATS[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return `'float32'` for `torch.float32`, and so on."""
    return str(dtype).removeprefix("torch.")


def show(value: Any) -> str:
    """Return a value as a message shows it."""
    return dtype_name(value) if isinstance(value, torch.dtype) else repr(value)
