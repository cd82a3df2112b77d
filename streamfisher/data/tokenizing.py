"""Text to token ids, and what did it: a run says which tokenizer its samples were made with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from streamfisher.errors import ConfigError, DataError

#: What is taken for one: text -> token ids, a tokenizer of transformers, or one of tokenizers.
Tokenize = Any


@dataclass(frozen=True)
class Tokenizer:
    """How text becomes token ids, and what that is called."""

    name: str  # 'UTF-8 bytes', the folder or id of a tokenizer, or the name of a function
    encode: Callable[[str], list[int]]
    kind: str = ""  # its class
    n_tokens: int | None = None  # in its vocabulary, where it says so
    by_default: bool = False  # nobody asked for it
    decode: Callable[[list[int]], str] | None = None  # token ids to text, where it can

    def facts(self) -> dict[str, Any]:
        """Return what the manifest of a run says about it, as plain JSON values."""
        return {"name": self.name, "class": self.kind, "n_tokens": self.n_tokens}

    def __str__(self) -> str:
        count = "" if self.n_tokens is None else f"{self.n_tokens:,} tokens"
        about = ", ".join(part for part in (self.kind, count) if part)
        return f"{self.name} ({about})" if about else self.name


def tokenize_bytes(text: str) -> list[int]:
    """Return the UTF-8 bytes of a text: the vocabulary of 256 that needs no tokenizer."""
    return list(text.encode("utf-8"))


def text_of_bytes(ids: list[int]) -> str:
    """Return the text of UTF-8 bytes; what is none, as half a character, is replaced."""
    return bytes(number for number in ids if 0 <= number < 256).decode("utf-8", errors="replace")


BYTES = Tokenizer("UTF-8 bytes", tokenize_bytes, n_tokens=256, decode=text_of_bytes)
BYTES_BY_DEFAULT = Tokenizer("UTF-8 bytes", tokenize_bytes, n_tokens=256, by_default=True, decode=text_of_bytes)


def as_tokenizer(given: Tokenize) -> Tokenizer:
    """Return what turns text into token ids.

    Args:
        given: `None`: UTF-8 bytes; a function from text to token ids, a tokenizer of transformers (with the special
            tokens that it adds by itself), or one of the package tokenizers.

    Raises:
        ConfigError: it cannot be called, and has no `encode`.
    """
    if isinstance(given, Tokenizer):
        return given
    if given is None:
        return BYTES_BY_DEFAULT
    if given is tokenize_bytes:
        return BYTES
    encode = given if callable(given) else getattr(given, "encode", None)
    if encode is None:
        raise ConfigError(
            f"a {type(given).__name__} is no tokenizer; give a function from text to token ids, or one of transformers."
        )
    kind = "" if isinstance(given, type(as_tokenizer)) else type(given).__name__
    name = getattr(given, "name_or_path", None) or getattr(given, "__qualname__", None) or kind
    decode = getattr(given, "decode", None)
    return Tokenizer(
        str(name),
        lambda text: _ids(encode(text), str(name)),
        kind,
        _count(given),
        decode=decode if callable(decode) else None,
    )


@dataclass(frozen=True)
class LaterTokenizer:
    """A tokenizer that is looked for when the first text is met: data that hold token ids need none."""

    find: Callable[[], Tokenizer]


class TextEncoder:
    """Encodes text and remembers by what; `tokenizer` stays `None` until there is a text."""

    def __init__(self, given: Tokenize = None):
        self._given = given
        self.tokenizer: Tokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        if self.tokenizer is None:
            given = self._given.find() if isinstance(self._given, LaterTokenizer) else self._given
            self.tokenizer = as_tokenizer(given)
        return self.tokenizer.encode(text)


class TextSamples(list[dict[str, Tensor]]):
    """Samples that were text or records: a list of dicts that knows more than a model is given.

    Args:
        samples: token ids.
        tokenizer: by which text was encoded; `None`: the records held ids.
        numbers: name -> a number of each sample, which become fields of the run.
    """

    def __init__(
        self,
        samples: list[dict[str, Tensor]],
        tokenizer: Tokenizer | None,
        numbers: Mapping[str, list[float]] | None = None,
    ):
        super().__init__(samples)
        self.tokenizer, self.numbers = tokenizer, dict(numbers or {})


def numbers_of(source: Any) -> dict[str, list[float]]:
    """Return the numbers that came with the samples and are no part of them; none where nothing says so."""
    return source.numbers if isinstance(source, TextSamples) else {}


def tokenizer_of(source: Any) -> Tokenizer | None:
    """Return by what the samples were encoded; `None` where they were no text, or were encoded elsewhere."""
    found = getattr(source, "tokenizer", None)
    return found if isinstance(found, Tokenizer) else None


def _ids(encoded: Any, name: str) -> list[int]:
    """Return the ids among what a tokenizer gives."""
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else getattr(encoded, "ids", encoded)
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, list | tuple) and all(type(token) is int for token in ids):
        return list(ids)
    raise DataError(f"the tokenizer {name} gives a {type(encoded).__name__}; it must give the token ids of one text.")


def _count(tokenizer: Any) -> int | None:
    if hasattr(tokenizer, "get_vocab_size"):  # of the package tokenizers
        return int(tokenizer.get_vocab_size())
    try:
        return len(tokenizer)
    except (TypeError, NotImplementedError):
        return None
