"""Datasets of the Hugging Face Hub by their ids, `hf:ID:SPLIT`; of the cache alone where there is no network."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlparse

from streamfisher.errors import DataError, first_line, require

PREFIX = "hf:"
_FORM = "hf:ID:SPLIT or hf:ID:CONFIG:SPLIT, as in hf:Salesforce/wikitext:wikitext-2-raw-v1:test"


def is_hub_spec(spec: str) -> bool:
    """Return whether DATA names a dataset of the Hub."""
    return spec.startswith(PREFIX)


def hub_records(spec: str, field: str, n_samples: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yield where a record stands, in words, and the record; those whose text is empty are left out.

    Args:
        spec: `hf:ID:SPLIT` or `hf:ID:CONFIG:SPLIT`; ID may be a folder of files that `datasets` reads.
        field: that holds the text.
        n_samples: no more than so many; `None` means all.

    Raises:
        DataError: it is of another form; there is no such dataset, configuration or split; or there is no network and
            the dataset is not in the cache.
        MissingExtraError: datasets is not installed.
    """
    name, config, split = _parts(spec)
    require("datasets", "datasets", f"read {spec}")
    dataset = _loaded(spec, name, config, split)
    count = 0
    for number, record in enumerate(dataset):
        text = record.get(field) if isinstance(record, dict) else None
        if isinstance(text, str) and not text.strip():
            continue
        yield f"DATA {spec}, record {number}", record
        count += 1
        if count == n_samples:
            return


def _parts(spec: str) -> tuple[str, str | None, str]:
    parts = spec.removeprefix(PREFIX).split(":")
    if len(parts) not in (2, 3) or not all(part.strip() for part in parts):
        raise DataError(f"DATA {spec}: a dataset of the Hub is given as {_FORM}.")
    return parts[0], parts[1] if len(parts) == 3 else None, parts[-1]


def _loaded(spec: str, name: str, config: str | None, split: str) -> Any:
    online = os.path.isdir(name) or _is_reachable()  # noqa: PTH112  # a folder by its name, as datasets looks for it
    with contextlib.nullcontext() if online else _offline():
        import datasets

        try:
            return datasets.load_dataset(name, config, split=split)
        except Exception as error:  # of a hundred kinds, by as many libraries
            if isinstance(error, MemoryError):
                raise
            if not online:
                raise DataError(
                    f"DATA {spec}: the Hub cannot be reached, and {name} is not in the cache of datasets "
                    f"({datasets.config.HF_DATASETS_CACHE}). Load it once where there is a network, copy the cache "
                    "(HF_HOME), or give a file."
                ) from error
            raise DataError(f"DATA {spec} cannot be loaded: {first_line(error)}") from error


def _is_reachable() -> bool:
    """Return whether the Hub has an address here, which takes no second; else datasets tries for most of a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True  # names are looked up elsewhere
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or "huggingface.co"
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let datasets and the client of the Hub look into their caches only."""
    import datasets
    from huggingface_hub import constants

    places = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [(place, name, getattr(place, name)) for place, name in places if hasattr(place, name)]
    try:
        for place, name, _ in before:
            setattr(place, name, True)
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
