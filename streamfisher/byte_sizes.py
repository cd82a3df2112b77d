"""Sizes in bytes, read and written as people do."""

from __future__ import annotations

from streamfisher.errors import ConfigError

_UNITS = {"": 1, "b": 1, "k": 1e3, "kb": 1e3, "kib": 2**10, "m": 1e6, "mb": 1e6, "mib": 2**20, "g": 1e9, "gb": 1e9}
_UNITS |= {"gib": 2**30, "t": 1e12, "tb": 1e12, "tib": 2**40}


def parse_bytes(value: int | str, field: str = "size") -> int:
    """Return a number of bytes from `2000000`, `'2GB'` (powers of ten) or `'2GiB'` (powers of two).

    Raises:
        ConfigError: the text is not a size, or it is not positive.
    """
    text = str(value).strip().lower().replace(" ", "").replace("_", "")
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    try:
        size = int(float(digits) * _UNITS[text[len(digits) :]])
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"{field}={value!r} is not a size; write for example 500MB, 2GB or 16GiB.") from None
    if size <= 0:
        raise ConfigError(f"{field}={value!r} must be more than nothing.")
    return size


def format_bytes(size: float) -> str:
    """Return `'1.50 GB'` for 1.5e9: powers of ten, three significant digits."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
