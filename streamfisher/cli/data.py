"""The samples that a command names, and by what their text was encoded."""

from __future__ import annotations

import sys
from typing import Any

from streamfisher.cli.options import RunOptions
from streamfisher.runtime.printable import printable


def samples_of(options: RunOptions, model: Any = None, returned: Any = None, n_samples: int | None = None) -> Any:
    """Return the samples that the options name.

    Args:
        options: of the command.
        model: where a callable has made it, and its tokenizer counts.
        returned: the tokenizer that the callable gave beside it.
        n_samples: no more than so many of what a callable yields; `None`: as the options say.
    """
    from streamfisher.data.loading import load_samples

    return load_samples(
        options.data,
        tokenize=options.tokenizer(model, returned),
        field=options.field,
        max_length=options.config.max_length,
        n_samples=options.samples if n_samples is None else n_samples,
    )


def say_tokenizer(source: Any) -> None:
    """Print by what text was encoded, whatever else is quiet: other tokens give other numbers."""
    from streamfisher.data.tokenizing import tokenizer_of

    tokenizer = tokenizer_of(source)
    if tokenizer is not None:
        chosen = (
            "; nobody named another, and the model's vocabulary can be one of bytes" if tokenizer.by_default else ""
        )
        print(f"Tokenizer: {printable(str(tokenizer))}{chosen}", file=sys.stderr)
