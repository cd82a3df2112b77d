"""Masks that samples bring: padding should change nothing, and documents packed into one sample must not meet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from streamfisher.data.batches import collate
from streamfisher.data.samples import Sample, Samples
from streamfisher.errors import DataError, StreamfisherError
from streamfisher.gradients import GradientEngine
from streamfisher.gradients.tolerance import COUPLING
from streamfisher.models.calling import unpadded
from streamfisher.models.offload import to_model

_REMEDY = {
    "left": "Left padding moves absolute positions: pad on the right, or give position_ids from the first token on",
    "right": "The model does not heed attention_mask everywhere: leave the padding out",
}


@dataclass
class Masks:
    """Samples whose mask may matter, by how."""

    left: list[int] = field(default_factory=list)  # padded at the start
    right: list[int] = field(default_factory=list)  # padded at the end
    packed: list[int] = field(default_factory=list)  # several documents under one mask

    def note(self, number: int, sample: Sample) -> None:
        """Take a look at one sample."""
        mask = sample.get("attention_mask")
        if mask is None or mask.ndim != 1 or not len(mask) or not ((mask == 0) | (mask == 1)).all():
            return
        positions = sample.get("position_ids")
        kept = mask != 0
        if positions is not None and positions.shape == mask.shape:
            own = positions[kept]
            if bool((own[1:] <= own[:-1]).any()):
                self.packed.append(number)
        elif bool(kept.any()):
            if not kept[0]:
                self.left.append(number)
            elif not kept[-1]:
                self.right.append(number)

    @property
    def matter(self) -> bool:
        """Whether there is anything to check."""
        return bool(self.left or self.right or self.packed)


def check_masks(engine: GradientEngine, samples: Samples, masks: Masks) -> None:
    """Refuse packed documents that see each other, and warn of padding that changes a sample.

    The first sample of each kind is evaluated; one that cannot be is left to the run, which names it.

    Args:
        engine: of the run; entered here.
        samples: of the run.
        masks: of all of them.

    Raises:
        DataError: a packed sample has another loss with its mask than without.
    """
    if not masks.matter or engine.loss.sequential:
        return
    with engine:
        if masks.packed:
            number = masks.packed[0]
            given = _batch(engine, samples[number])
            apart = {key: value for key, value in unpadded(given, leading=True).items() if key != "attention_mask"}
            losses = _losses(engine, given, apart)
            if losses is not None:
                raise DataError(
                    f"sample {number} holds several documents (its position_ids start again) and an attention_mask, "
                    f"with which this model lets them see each other: its loss is {losses[0]:.6g}, and {losses[1]:.6g} "
                    f"without the mask. Leave attention_mask out of such samples ({len(masks.packed)} in all)."
                )
        for side, numbers in (("left", masks.left), ("right", masks.right)):
            if not numbers:
                continue
            given = _batch(engine, samples[numbers[0]])
            losses = _losses(engine, given, unpadded(given, leading=True, labels=not engine.loss.labels_to_model))
            if losses is not None:
                warnings.warn(
                    f"sample {numbers[0]} has the loss {losses[0]:.6g} with the padding that it brings and "
                    f"{losses[1]:.6g} without; {len(numbers)} samples are padded on the {side}. {_REMEDY[side]}. "
                    "Gradients are taken of the samples as they are.",
                    stacklevel=2,
                )


def _batch(engine: GradientEngine, sample: Sample) -> dict[str, Tensor]:
    return to_model(collate([sample]), engine.model)


def _losses(engine: GradientEngine, one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the losses of two batches of one, or `None` where they agree or cannot be had.

    Some models heed the mask of larger batches only, so a sample is evaluated twice in one.
    """
    try:
        first, second = (engine.plain.loss_twice(batch) for batch in (one, other))
    except (StreamfisherError, RuntimeError, ValueError, TypeError, IndexError, KeyError):
        return None
    limit = max(engine.tolerance, COUPLING) * max(abs(second), 1e-3)
    return None if abs(first - second) <= limit else (first, second)
