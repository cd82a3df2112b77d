"""How long a sequence may be for a model, by its config: some fail beyond, others answer and mean nothing by it."""

from __future__ import annotations

import warnings

from torch import nn

from streamfisher.errors import DataError
from streamfisher.models.calling import base_model


def most_positions(model: nn.Module) -> int | None:
    """Return how many positions the config of a Hugging Face model names; `None` where it names none."""
    config = getattr(base_model(model), "config", None)
    of_text = getattr(config, "get_text_config", None)
    config = of_text() if callable(of_text) else config
    most = getattr(config, "max_position_embeddings", None)
    return most if isinstance(most, int) and not isinstance(most, bool) and most > 0 else None


class LongestSequence:
    """Watches the lengths of samples for those that have more tokens than a model has positions.

    Args:
        model: whose config says how many there are.
    """

    def __init__(self, model: nn.Module):
        self.most = most_positions(model)
        self._has_table = self.most is not None and _has_table(model, self.most)
        self._longest = (0, 0)  # tokens, and of which sample

    def note(self, index: int, length: int | None) -> None:
        """Take note of the length of a sample.

        Raises:
            DataError: the model looks positions up in a table, and the sample is longer than it.
        """
        if self.most is None or length is None or length <= self.most:
            return
        if self._has_table:
            raise DataError(f"{self._sentence(index, length)} Cut the samples: --max-length {self.most}.")
        self._longest = max(self._longest, (length, -index))

    def warn(self) -> None:
        """Say of which length the longest sample is, where the model was made for shorter ones."""
        length, index = self._longest
        if length:
            warnings.warn(
                f"{self._sentence(-index, length)} Positions are rotary or relative, so it gives numbers beyond, of "
                f"another quality than its own. To stay within: --max-length {self.most}.",
                stacklevel=3,
            )

    def _sentence(self, index: int, length: int) -> str:
        return f"sample {index} has {length:,} tokens, and the model's config names {self.most:,} positions."


def _has_table(model: nn.Module, most: int) -> bool:
    """Return whether positions are the rows of an embedding: `wpe`, `position_embeddings`, `embed_positions`."""
    return any(
        isinstance(module, nn.Embedding)
        and module.num_embeddings >= most
        and any(word in name.rpartition(".")[2].lower() for word in ("wpe", "position"))
        for name, module in base_model(model).named_modules()
    )
