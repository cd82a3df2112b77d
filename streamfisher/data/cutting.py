"""Which tensors of a sample lie along its tokens, and are cut with them: by their role, never by their size alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from streamfisher.data.batches import sequence_length
from streamfisher.errors import DataError

_ALONG = frozenset(
    (
        *("input_ids", "labels", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "langs"),
        *("special_tokens_mask", "loss_mask", "segment_ids", "sequence_ids", "global_attention_mask"),
    )
)
#: Starts of the names of what belongs to something else than the text: a memory, a picture, a sound, the other side.
_ELSEWHERE = ("encoder_", "decoder_", "cross_attn_", "pixel_", "image_", "video_", "audio_", "input_features")
_LOOKED_AT = 16


class TokenCutter:
    """Cuts samples of one source; a name that is not known is judged by whether it follows the text's length.

    Args:
        source: of samples, of which the first few are looked at, and only if an unknown name makes it necessary.
    """

    def __init__(self, source: Any) -> None:
        self.source = source
        self._roles: dict[str, bool] = {}

    def cut(self, sample: dict[str, Tensor], length: int, stop: int) -> dict[str, Tensor]:
        """Return a sample of `length` tokens with the first `stop` of them.

        Raises:
            DataError: whether a tensor lies along the tokens cannot be told.
        """
        return {
            key: value[:stop]
            if value.ndim and value.shape[0] == length and self._is_along(key, value, length)
            else value
            for key, value in sample.items()
        }

    def _is_along(self, key: str, value: Tensor, length: int) -> bool:
        if key in _ALONG:
            return True
        if key.startswith(_ELSEWHERE):
            return False
        if key not in self._roles:
            self._roles[key] = self._follows(key, value, length)
        return self._roles[key]

    def _follows(self, key: str, value: Tensor, length: int) -> bool:
        """Return whether a tensor is as long as the text in samples whose texts differ in length."""
        lengths = {length}
        for number in range(min(_LOOKED_AT, len(self.source))):
            sample = self.source[number]
            own = sequence_length(sample)
            if own is None or key not in sample:
                continue
            if sample[key].ndim == 0 or sample[key].shape[0] != own:
                return False
            lengths.add(own)
        if len(lengths) == 1 and value.ndim > 1:
            raise DataError(
                f"sequences of {length} tokens are to be cut, and {key!r} has shape {tuple(value.shape)}: whether it "
                "lies along the tokens cannot be told, as all texts are equally long. Cut the samples beforehand, or "
                "call it 'encoder_...' if it belongs to something else."
            )
        return True
