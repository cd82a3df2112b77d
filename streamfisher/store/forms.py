"""What the values of a run's manifest and markers may be: one form for each, held against a file when it is read.

A seal says that a file is what somebody wrote, not that a run can have it. Keys that a form does not have are left
alone: later versions may add some.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from streamfisher.errors import CorruptRunError

#: Accepts a value at a place, or raises `_FormError`.
Form = Callable[[Any, str], None]


class _FormError(ValueError):
    """A value is not of its form."""


def require_form(content: Any, form: Form, what: str | Path) -> None:
    """Refuse a JSON value that is not of a form.

    Args:
        content: parsed.
        form: one of those below.
        what: file that it is of, for the message.

    Raises:
        CorruptRunError: it names the value.
    """
    try:
        form(content, "")
    except _FormError as error:
        raise CorruptRunError(f"{what}: {error}.") from None


def _refuse(value: Any, where: str, what: str) -> None:
    raise _FormError(f"{where.lstrip('.') or 'its content'} is {reprlib.repr(value)}, not {what}")


def whole(least: int = 0, most: int = 2**53 - 1) -> Form:
    """Return the form of whole numbers in a range."""

    def form(value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            _refuse(value, where, f"a whole number from {least} to {most}")

    return form


def number(value: Any, where: str) -> None:
    """Accept a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(min(abs(value), 1e308)):
        _refuse(value, where, "a finite number")


def text(value: Any, where: str) -> None:
    """Accept text that can be written as UTF-8."""
    if not isinstance(value, str) or not (value.isascii() or _is_utf8(value)):
        _refuse(value, where, "text")


def _is_utf8(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def flag(value: Any, where: str) -> None:
    """Accept true and false."""
    if not isinstance(value, bool):
        _refuse(value, where, "true or false")


def anything(value: Any, where: str) -> None:
    """Accept every value."""


def one_of(*choices: str) -> Form:
    """Return the form of words that can be listed."""

    def form(value: Any, where: str) -> None:
        if not isinstance(value, str) or value not in choices:
            _refuse(value, where, f"one of {', '.join(choices)}")

    return form


def nothing_or(other: Form) -> Form:
    """Return the form that accepts null too."""
    return lambda value, where: None if value is None else other(value, where)


def empty_or(other: Form) -> Form:
    """Return the form that accepts an object without keys too."""
    return lambda value, where: None if value == {} else other(value, where)


def listed(form: Form) -> Form:
    """Return the form of lists of values of a form."""

    def of_list(value: Any, where: str) -> None:
        if not isinstance(value, list):
            _refuse(value, where, "a list")
        for index, item in enumerate(value):
            form(item, f"{where}[{index}]")

    return of_list


def mapped(form: Form, key: Form = text) -> Form:
    """Return the form of objects whose values are of a form, and their keys of another."""

    def of_mapping(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, where, "a mapping")
        try:
            for name, item in value.items():
                key(name, "")
                form(item, "")
        except _FormError:  # once more, to say where: nearly all are right, and names take time
            for name, item in value.items():
                key(name, f"a key of {where.lstrip('.') or 'it'}")
                form(item, f"{where}.{reprlib.repr(name)[1:-1]}")
            raise

    return of_mapping


def fields(required: Mapping[str, Form], optional: Mapping[str, Form] | None = None, *, only: bool = False) -> Form:
    """Return the form of objects with some keys, and others that may be there; with `only`, no further ones."""

    def of_fields(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(value, where, "a mapping")
        for name, form in required.items():
            if name not in value:
                raise _FormError(f"{where.lstrip('.') or 'it'} lacks {name}")
            form(value[name], f"{where}.{name}")
        for name, form in (optional or {}).items():
            if name in value:
                form(value[name], f"{where}.{name}")
        further = value.keys() - required.keys() - (optional or {}).keys()
        if only and further:
            raise _FormError(f"{where.lstrip('.')} has {reprlib.repr(min(further))}, which is unknown")

    return of_fields


def _sample_number(value: Any, where: str) -> None:
    if not (isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 17):
        _refuse(value, where, "the number of a sample")


def _pack_key(value: Any, where: str) -> None:
    if not (isinstance(value, str) and re.fullmatch("[0-9]{1,9}-[0-9]{1,9}", value)):
        _refuse(value, where, "the key of a pack")


CRC = whole(0, 2**32 - 1)
_CRCS = mapped(CRC)
_FLOAT = one_of("float64", "float32", "bfloat16", "float16")

_SIDE = fields(
    {"shape": listed(whole()), "dtype": nothing_or(_FLOAT), "lengths": listed(whole()), "crc32c": CRC}, {"chunks": CRC}
)
_BATCH = fields(
    {"start": whole(), "bytes": whole(), "sides": mapped(_SIDE), "pairs": mapped(listed(listed(text)))},
)
#: `done/rows-UNIT.json`
UNIT = fields(
    {"start": whole(), "stop": whole(1), "skipped": mapped(text, _sample_number), "crc32c": _CRCS},
    {"wave": whole(), "chunks": _CRCS, "packs": _CRCS, "samples": _CRCS, "factors": listed(_BATCH)},
)
#: `done/mean-UNIT.json`
MEAN_PART = fields({"start": whole(), "stop": whole(1), "count": whole()}, {"crc32c": _CRCS})
#: `done/mean.json`
MEAN = fields({"count": whole()}, {"crc32c": _CRCS})
#: `done/gram-KEY.json`
GRAM = fields(
    {"n_samples": whole(1), "settings": mapped(anything)},
    {"crc32c": CRC, "tiles": whole(1), "parameter": text, "files": CRC, "mean_crc32c": CRC}
    | {"moment_crc32c": CRC, "float32_products": flag},
)
#: `done/tiles-KEY/ROW-COLUMN.json`
TILE = fields({"rows": listed(whole()), "columns": listed(whole()), "crc32c": CRC}, {"mean_products": listed(number)})
#: `done/tiles-KEY/identity.json`
TILES = fields({"settings": mapped(anything), "tile": whole(1), "parameters": listed(text), "n_samples": whole(1)})
#: `done/moment-PARAMETER.json`
MOMENT = fields({"n_samples": whole(1), "count": whole(1), "crc32c": CRC}, {"parameter": text})
#: `done/fields.json`
FIELDS = fields({"crc32c": _CRCS})
#: `done/results/FILE.json`
RESULT = fields({"crc32c": CRC})
#: `done/eigenvectors/FOLDER/identity.json` and `finished.json`
EIGENVECTORS = fields(
    {"block": text, "parameters": listed(text), "top": whole(1), "centered": flag, "grams": listed(anything)},
    {"gram_keys": listed(text)},
)
FINISHED_EIGENVECTORS = fields({"orthonormality_error": number}, {"files": CRC, "marker": text})
_OF_PARAMETER = fields({"overlap": listed(listed(number))}, {"vectors": CRC, "marker": text})
_EIGENVECTOR_MARKERS = {
    "finished": FINISHED_EIGENVECTORS,
    "solved": fields({"overlap_before": number}, {"coefficients": CRC, "rotation": CRC, "marker": text}),
    "begun": fields({"coefficients": CRC}, {"marker": text}),
}


def eigenvector_marker(what: str) -> Form:
    """Return the form of `done/eigenvectors/FOLDER/WHAT.json`; those of single parameters are of one form."""
    return _EIGENVECTOR_MARKERS.get(what, _OF_PARAMETER)


_PARAMETER = fields(
    {"name": text, "shape": listed(whole()), "dtype": text, "chunk_columns": whole(1)}, {"columns": whole(1)}
)
_LAYOUT = fields(
    {
        "chunk_rows": whole(1),
        "dtype_row": _FLOAT,
        "dtype_store": _FLOAT,
        "bitround": nothing_or(whole(1, 23)),
        "codec": one_of("blosc-lz4", "zstd", "raw"),
        "centered": flag,
    },
    {
        "representation": mapped(one_of("dense", "factors")),
        "waves": listed(listed(text)),
        "grams": mapped(listed(text)),
        "keep": listed(text),
        "batch_tokens": whole(1),
        "hold": one_of("disk", "host", "device"),
        "holds": nothing_or(listed(one_of("host", "device"))),
        "unit_buffers": whole(1, 2),
        "copy": nothing_or(one_of("host", "device")),
        "packs": mapped(listed(text), _pack_key),
        "streamed": flag,
        "kept_apart": nothing_or(flag),
        "arithmetic": text,
    },
)
_RULE = fields(
    {"rule": text, "numel": whole(), "error": nothing_or(number), "share": nothing_or(number)}
    | {"zero": flag, "noise": flag},
    {"reason": text},
    only=True,
)
_GROUP = fields(
    {"site": text, "rule": text, "names": mapped(text), "layouts": listed(text)},
    {"expands": flag, "flat_keys": nothing_or(listed(text)), "flat_length": nothing_or(whole())}
    | {"known": mapped(listed(text))},
    only=True,
)
_PROBE = fields(
    {
        "n_samples": whole(),
        "tolerance": number,
        "parameters": mapped(_RULE),
        "excluded": mapped(text),
        "excluded_numel": whole(),
        "coverage_parameters": number,
        "coverage_norm": number,
        "groups": listed(_GROUP),
    },
    {"worst_error": nothing_or(number), "notes": listed(text), "arithmetic": listed(_FLOAT)}
    | {"alone": one_of("as given", "unpadded", "twice")},
)
#: `manifest.json`, but for its format and version
MANIFEST = fields(
    {
        "config": mapped(anything),
        "identity": mapped(anything),
        "model": fields({"class": text, "fingerprint": text, "n_params": whole()}),
        "parameters": listed(_PARAMETER),
        "excluded": mapped(text),
        "data": fields(
            {"n_samples": whole(1), "chunk_digests": listed(text), "fingerprint": text},
            {"sample_unit": text, "chunk_size": whole(1), "n_sequences": nothing_or(whole())}
            | {
                "queries": listed(listed(whole())),
                "n_inputs": whole(1),
                "classes_per_input": whole(1),
                "n_classes": whole(1),
            }
            | {"left_out_probability": fields({"mean": number, "largest": number})},
        ),
        "loss": fields({"loss": text, "loss_reduction": text}, {"loss_reason": text}),
        "layout": _LAYOUT,
        "probe": empty_or(_PROBE),
        "versions": mapped(text),
    }
)
