"""`texts.json`: what each sample says, in a few characters, where it was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.durable import LARGEST_JSON, read_json, write_json

TEXT_FILE = "texts.json"
#: Bytes of the largest character as JSON, of what stands around each text, and characters where nobody says how many.
_WIDEST, _AROUND, _USUAL = 12, 8, 1000


def write_texts(path: Path, texts: Sequence[str]) -> None:
    """Write a text for each sample into the folder of a run."""
    write_json(path / TEXT_FILE, {"texts": list(texts)})


def read_texts(path: Path, n_samples: int, length: int | None) -> tuple[str, ...] | None:
    """Return a text for each sample, empty where a sample came later and had none; `None`: the run has no texts.

    Args:
        path: folder of the run.
        n_samples: N.
        length: characters that were asked for, if that is known.

    Raises:
        CorruptRunError: they are not what was written.
    """
    if not (path / TEXT_FILE).exists():
        return None
    largest = max(LARGEST_JSON, n_samples * (_WIDEST * (length or _USUAL) + _AROUND))
    content = read_json(path / TEXT_FILE, largest)
    texts = content.get("texts") if isinstance(content, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise CorruptRunError(f"{path / TEXT_FILE} is not what was written.")
    return tuple([*texts, *[""] * (n_samples - len(texts))][:n_samples])
