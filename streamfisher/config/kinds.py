"""Kinds of values that options take: how each is checked, and how words of a command line become one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from streamfisher.byte_sizes import parse_bytes
from streamfisher.config.dtypes import dtype_name, parse_dtype
from streamfisher.errors import ConfigError

#: Characters of a value in a message.
_LONGEST_SHOWN = 200


@dataclass(frozen=True)
class Kind:
    """What values an option takes."""

    check: Callable[[str, Any], Any]  # (name, value) -> the value as it is kept, or ConfigError
    parse: Callable[[str], Any] = str  # a word of the command line -> a value for `check`
    nargs: str | int | None = None  # words on the command line, as argparse counts them; 0: the option alone
    const: Any = None  # the value where the option stands alone
    choices: tuple[Any, ...] = ()  # all there are; empty: more than can be listed


def optional(kind: Kind) -> Kind:
    """Return the kind that takes `None` too."""
    return replace(kind, check=lambda name, value: None if value is None else kind.check(name, value))


def whole(least: int, most: int = 2**63 - 1) -> Kind:
    """Return the kind of whole numbers from `least` to `most`."""

    def check(name: str, value: Any) -> int:
        value = int(value) if isinstance(value, np.integer) else value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={_show(value)} must be a whole number of at least {least}.")
        if value > most:
            raise ConfigError(f"{name} must be at most {most:,}, and is a number of {value.bit_length()} bits.")
        return value

    return Kind(check, parse=int)


def one_of(*choices: Any) -> Kind:
    """Return the kind of values that can be listed."""

    def check(name: str, value: Any) -> Any:
        if value not in choices:
            names = ", ".join(str(choice).removeprefix("torch.") for choice in choices)
            raise ConfigError(f"{name}={_show(value)} is unknown; choose one of {names}.")
        return value

    return Kind(check, choices=choices)


def dtype_among(*choices: torch.dtype) -> Kind:
    """Return the kind of dtypes, by name or themselves, among `choices`."""
    among = one_of(*choices)
    return replace(among, check=lambda name, value: among.check(name, parse_dtype(value, name)))


def check_keys(values: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """Raise `ConfigError` naming the first key of `values` that is not in `known`, with near matches."""
    import difflib

    known = list(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."
            raise ConfigError(f"{key!r} is not a known {what}. {hint}")


def _number(name: str, value: Any) -> float:
    """Return a number; text counts where it is one, because YAML reads `1e-6` as text."""
    try:
        if value is None or isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}={_show(value)} must be a number.") from None


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{name}={_show(value)} must be true or false.")
    return bool(value)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{name}={_show(value)} must be a pattern of parameter names, or a list of patterns.")
    return tuple(patterns)


def _kept(name: str, value: Any) -> tuple[str, ...]:
    """Return patterns: `('*',)` for 'all', `()` for 'none'."""
    if value in ("all", ("all",), ["all"]):
        return ("*",)
    return () if value in ("none", ("none",), ["none"]) else _patterns(name, value)


def _folder(name: str, value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name}={_show(value)} must name a folder.")
    return os.fspath(value)


def _device(name: str, value: Any) -> str:
    if not isinstance(value, str | torch.device) or not str(value):
        raise ConfigError(f"{name}={_show(value)} is no device; write auto, cpu, cuda or cuda:1.")
    return str(value)


def _solver_device(name: str, value: Any) -> str:
    device = str(value) if isinstance(value, str | torch.device) else ""
    if not re.fullmatch(r"auto|cpu|(cuda|mps)(:[0-9]+)?", device):
        raise ConfigError(f"{name}={_show(value)} is unknown; choose one of auto, cpu, cuda, cuda:1, mps.")
    return device


def _show(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return f"a {type(value).__name__} that is too long to be shown"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


FLAG = Kind(_flag, nargs=0, const=True)
NUMBER = Kind(_number, parse=float)
PATTERNS = Kind(_patterns, nargs="+")
KEPT = Kind(_kept, nargs="+")
FOLDER = Kind(_folder)
DEVICE = Kind(_device)
SOLVER_DEVICE = Kind(_solver_device)
DTYPE = Kind(lambda name, value: parse_dtype(value, name))
SIZE = Kind(lambda name, value: parse_bytes(value, name))
