"""The tokenizer that belongs to a model, and the refusal of bytes where its vocabulary is another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from streamfisher.data.tokenizing import BYTES_BY_DEFAULT, Tokenizer, as_tokenizer
from streamfisher.errors import DataError, ModelError, require
from streamfisher.models.calling import base_model
from streamfisher.models.loading import check_pretrained, in_a_sentence, is_adapter
from streamfisher.runtime.paths import expanded

#: 256 bytes, and room for special tokens.
_VOCABULARIES_OF_BYTES = range(256, 513)
_REMEDY = (
    "Give one with --tokenizer FOLDER_OR_ID (tokenize=... in Python), or let the callable return (model, tokenizer); "
    "--tokenizer bytes takes bytes all the same."
)


def load_tokenizer(spec: str, *, trust_remote_code: bool = False, what: str = "--tokenizer") -> Any:
    """Return the tokenizer of a Hugging Face folder or id; of an id, the cache is looked into before the network.

    Args:
        spec: of a tokenizer, or of a model with one.
        trust_remote_code: run code that comes with it.
        what: the argument that named it, MODEL or --tokenizer.

    Raises:
        ModelError: there is none.
        MissingExtraError: transformers is not installed.
    """
    spec = str(expanded(spec)) if spec.startswith("~") else spec
    check_pretrained(spec, what, needs_config=what == "MODEL")
    require("transformers", "hf", f"tokenize text for {spec}")
    import transformers

    if is_adapter(spec) and not (Path(spec) / "tokenizer_config.json").is_file():
        config = json.loads((Path(spec) / "adapter_config.json").read_text(encoding="utf-8"))
        spec = str(config.get("base_model_name_or_path") or spec)
    if not Path(spec).is_dir():
        try:
            return transformers.AutoTokenizer.from_pretrained(
                spec, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError):
            pass  # it is not in the cache
    remedy = " Use --tokenizer bytes, or give token ids."
    with in_a_sentence(f"no tokenizer could be loaded from {spec}", remedy, named=spec):
        return transformers.AutoTokenizer.from_pretrained(spec, trust_remote_code=trust_remote_code)


def own_tokenizer(model: nn.Module, *, trust_remote_code: bool = False) -> Tokenizer:
    """Return the tokenizer that a model's text is encoded by where nobody names one.

    That of the folder or id that a Hugging Face model says it was loaded from (of an adapter, its base); UTF-8 bytes
    for a model that says nothing, where its vocabulary can be one of bytes.

    Args:
        model: may be on the meta device, or in wrappers.
        trust_remote_code: run code of the tokenizer's folder.

    Raises:
        DataError: the model says nothing, and bytes are not its tokens.
        ModelError: no tokenizer can be loaded from there.
    """
    name = _loaded_from(model)
    size = vocabulary_size(model)
    if name:
        try:
            return as_tokenizer(load_tokenizer(name, trust_remote_code=trust_remote_code))
        except ModelError as error:
            if size is None or size not in _VOCABULARIES_OF_BYTES:
                raise ModelError(
                    f"the text needs the model's tokenizer, and the model says that it is from {name}: "
                    f"{str(error).removesuffix(' Use --tokenizer bytes, or give token ids.')} {_REMEDY}"
                ) from error
    check_bytes(model, BYTES_BY_DEFAULT)
    return BYTES_BY_DEFAULT


def check_bytes(model: nn.Module, tokenizer: Tokenizer | None) -> None:
    """Refuse text that became bytes because nobody named a tokenizer, for a model whose tokens are no bytes.

    Args:
        model: may be on the meta device, or in wrappers.
        tokenizer: that the samples were made by; `None`: they were no text.

    Raises:
        DataError: the model's vocabulary has less than 256 tokens, or too many for bytes and special ones.
    """
    size = vocabulary_size(model) if tokenizer is not None and tokenizer.by_default else None
    if size is not None and size not in _VOCABULARIES_OF_BYTES:
        raise DataError(
            f"no tokenizer is known for the text, and UTF-8 bytes are not the tokens of {type(model).__name__}, whose "
            f"vocabulary has {size:,}. {_REMEDY}"
        )


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many token ids a model knows: the rows of its embedding of tokens; `None` where it has none."""
    base = base_model(model)
    get = getattr(base, "get_input_embeddings", None)
    if callable(get):
        try:
            embedding = get()
        except (NotImplementedError, AttributeError):  # several, or none of tokens
            return None
        size = getattr(embedding, "num_embeddings", None)
        return size if isinstance(size, int) else None
    embeddings = (module for module in base.modules() if isinstance(module, nn.Embedding))
    first = next(embeddings, None)  # positions come after tokens
    return None if first is None else first.num_embeddings


def _loaded_from(model: nn.Module) -> str:
    """Return the folder or id that a Hugging Face model was loaded from, or nothing."""
    config = getattr(base_model(model), "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    return name if isinstance(name, str) else ""
