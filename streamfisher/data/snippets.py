"""What samples say, in a few characters, for people who read tables of them: never an input of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from streamfisher.data.samples import Samples
from streamfisher.data.sources import named_entries
from streamfisher.data.tokenizing import Tokenizer
from streamfisher.errors import ConfigError


def snippets(given: Samples, rows: Samples, of: Sequence[int], length: int, tokenizer: Tokenizer | None) -> list[str]:
    """Return the beginning of what each sample says; of tokens the end, which is the token and what comes before it.

    A text that a sample of the data brings beside its numbers is taken as it is; else token ids are decoded.

    Args:
        given: samples as the user gave them.
        rows: the same, or tokens of them.
        of: which given sample each of `rows` is of.
        length: characters.
        tokenizer: by which text became token ids; `None`: not known.

    Raises:
        ConfigError: a sample has no text, and its tokens cannot be decoded.
    """
    same = rows is given
    texts: list[str] = []
    for place, number in enumerate(of):
        text = _text_of(given.source[int(number)]) if same else None
        if text is None:
            text = _decoded(rows[place], place, tokenizer)
        words = " ".join(text.split())
        texts.append(words[:length] if same else words[-length:])
    return texts


def _text_of(sample: Any) -> str | None:
    """Return the first text of a sample of the data; `None` where it has none."""
    entries = named_entries(sample)
    values = entries.values() if isinstance(entries, Mapping) else ()
    return next((str(value) for value in values if isinstance(value, str | np.str_)), None)


def _decoded(sample: Mapping[str, Tensor], place: int, tokenizer: Tokenizer | None) -> str:
    ids = sample.get("input_ids")
    if ids is None or ids.ndim != 1 or ids.is_floating_point():
        raise ConfigError(
            f"store_text keeps what samples say, and sample {place} has neither text nor token ids; leave it out."
        )
    decode: Callable[[list[int]], str] | None = None if tokenizer is None else tokenizer.decode
    if decode is None:
        who = "no tokenizer is known" if tokenizer is None else f"the tokenizer {tokenizer.name} has no decode()"
        raise ConfigError(
            f"store_text decodes token ids, and {who}. Give texts: sf.text_samples(texts, tokenizer), or a text beside "
            "the ids of each sample, which no model is given."
        )
    return decode(ids.tolist())
