"""Samples from a text file, a folder of text files, JSON lines, numpy arrays, or the user's own callable."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamfisher.data.hub import hub_records, is_hub_spec
from streamfisher.data.records import is_of_records, read_records, samples_of_records
from streamfisher.data.sources import as_source
from streamfisher.data.tokenizing import TextEncoder, TextSamples, Tokenize
from streamfisher.errors import DataError
from streamfisher.runtime.callables import call, is_callable_spec
from streamfisher.runtime.paths import expanded

_TEXT_SUFFIXES = {".txt", ".md", ".rst", ".py", ".text", ".tex", ".html", ".c", ".h", ".cpp", ".js", ".ts", ".java"}
DEFAULT_LENGTH = 128


def load_samples(
    spec: str,
    *,
    tokenize: Tokenize = None,
    field: str = "text",
    max_length: int | None = None,
    n_samples: int | None = None,
) -> Any:
    """Return a map-style dataset for what `spec` names.

    - a text file, or a folder of them (sorted by path): the tokens of each file are cut into sequences of `max_length`
      that do not overlap; what remains at a file's end is kept if it has at least 2 tokens;
    - `.jsonl` (also `.jsonl.gz`, `.jsonl.zst`), `.parquet`, `.arrow`: one sample per record, the text in `field`, cut
      to `max_length`; a list of integers there is taken as ids, and numbers that every record has become fields;
    - `.npy`: token ids (1-D, cut into sequences; 2-D, one per row) or an array of inputs, one per row;
    - `.npz`: one array per key, all with the same first axis;
    - `hf:ID:SPLIT`, `hf:ID:CONFIG:SPLIT`: a dataset of the Hugging Face Hub, or a folder that `datasets` reads (extra
      `datasets`); as records of a file, but for those without text, which are left out. Without a network, the cache;
    - `package.module:callable`: returns or yields dicts of tensors without batch axis.

    Args:
        spec: as above.
        tokenize: a function from text to token ids, or a tokenizer of transformers; `None` takes UTF-8 bytes, which
            `collect` refuses for a model of another vocabulary.
        field: of JSON lines.
        max_length: tokens per sequence; `None` means 128 where text must be cut.
        n_samples: take no more than so many of what a callable yields, or a dataset of the Hub has; `None` means all.

    Raises:
        DataError: nothing is there, it is empty, or of a kind that is not known.
    """
    path = Path(spec) if is_hub_spec(spec) else expanded(spec)  # `hf::train` looks like a chain of URLs
    encode = TextEncoder(tokenize)
    length = max_length or DEFAULT_LENGTH
    if not path.exists() and is_hub_spec(spec):
        samples, numbers = samples_of_records(hub_records(spec, field, n_samples), encode, field, max_length)
        return _nonempty(samples, spec, encode, numbers)
    if not path.exists() and is_callable_spec(spec):
        return _called(spec, n_samples)
    if not path.exists():
        raise DataError(f"DATA {spec}: there is no such file or folder, and it is not of the form module:callable.")
    if path.is_dir():
        return _nonempty(list(_folder(path, encode, length)), spec, encode)
    if is_of_records(path):
        samples, numbers = read_records(path, encode, field, max_length)
        return _nonempty(samples, spec, encode, numbers)
    if path.suffix in (".npy", ".npz"):
        return _arrays(path, length)
    return _nonempty(list(_sequences(encode(_read_text(path)), length)), spec, encode)


def text_samples(texts: Iterable[str], tokenizer: Tokenize, *, max_length: int | None = None) -> TextSamples:
    """Return a sample of each text: its token ids, cut to `max_length`.

    Args:
        texts: strings, for example a column of a dataset or of a frame.
        tokenizer: of transformers, or a function from text to token ids.
        max_length: tokens; `None` cuts nothing.

    Raises:
        DataError: there is no text, one is no string, or one has no token.
    """
    if isinstance(texts, str):
        raise DataError("texts are one string; give a list of them, one for each sample.")
    encode, samples = TextEncoder(tokenizer), []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"text {index} is a {type(text).__name__}, not a string.")
        ids = encode(text)[:max_length]
        if not ids:
            raise DataError(f"text {index} has no token: {text!r:.60}. Leave it out.")
        samples.append({"input_ids": torch.tensor(ids, dtype=torch.int64)})
    if encode.tokenizer is None:
        raise DataError("there are no texts.")
    return TextSamples(samples, encode.tokenizer)


def _called(spec: str, n_samples: int | None) -> Any:
    source = call(spec, "DATA")
    if not isinstance(source, Iterable) and not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise DataError(f"DATA {spec} returned a {type(source).__name__}; it must return or yield dicts of tensors.")
    return source if isinstance(source, Mapping) else as_source(source, n_samples)


def _folder(folder: Path, encode: TextEncoder, length: int) -> Iterator[dict[str, Tensor]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in _TEXT_SUFFIXES)
    if not files:
        raise DataError(f"DATA {folder}: the folder holds no text files ({', '.join(sorted(_TEXT_SUFFIXES))}).")
    for path in files:
        yield from _sequences(encode(_read_text(path)), length)


def _sequences(tokens: list[int], length: int) -> Iterator[dict[str, Tensor]]:
    ids = torch.tensor(tokens, dtype=torch.int64)
    for start in range(0, len(ids), length):
        piece = ids[start : start + length]
        if len(piece) >= min(2, length):
            yield {"input_ids": piece}


def _arrays(path: Path, length: int) -> Any:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if path.suffix == ".npz" else {"input_ids": loaded}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = "it holds Python objects, or is not of that format" if "pickle" in str(error) else str(error)
        raise DataError(f"DATA {path} cannot be read as numpy arrays of numbers: {reason}.") from error
    if not arrays or any(array.size == 0 for array in arrays.values()):
        raise DataError(f"DATA {path} holds no samples.")
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise DataError(f"DATA {path}: {key!r} has dtype {array.dtype}; only numbers can be samples.")
        if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
            raise DataError(f"DATA {path}: {key!r} holds {array.max()}, which does not fit into int64.")
        if array.dtype.kind in "iu":
            arrays[key] = array.astype(np.int64)  # torch indexes with int64 and does not know all of the others
        elif array.dtype.kind == "f":  # torch knows neither other byte orders nor more than 64 bits
            arrays[key] = array.astype(f"=f{min(array.dtype.itemsize, 8)}", copy=False)
    ids = arrays.get("input_ids")
    if len(arrays) == 1 and ids is not None and ids.ndim == 1 and ids.dtype.kind == "i":
        return _nonempty(list(_sequences(ids.tolist(), length)), str(path))
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"DATA {path} cannot be read: {error}") from error


def _nonempty(
    samples: list[dict[str, Tensor]],
    spec: str,
    encode: TextEncoder | None = None,
    numbers: Mapping[str, list[float]] | None = None,
) -> list[dict[str, Tensor]]:
    if not samples:
        raise DataError(f"DATA {spec} is empty: no sequence of at least 2 tokens was found.")
    tokenizer = None if encode is None else encode.tokenizer
    return samples if tokenizer is None and not numbers else TextSamples(samples, tokenizer, numbers)
