"""Samples of which each is one class of an input: N inputs of k classes make N k samples, one input after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from streamfisher.data.batches import IGNORED_LABEL
from streamfisher.data.samples import Sample, Samples


class ClassSamples:
    """Inputs with each of some classes as their label.

    Args:
        inputs: of which each has one target: a class, or a token among labels that are masked otherwise.
        classes: (N, k) int64, which classes of each input.
    """

    def __init__(self, inputs: Samples, classes: np.ndarray) -> None:
        self.inputs, self.classes = inputs, classes
        self._last: tuple[int, Sample] | None = None  # the classes of an input are asked for one after the other

    @property
    def per_input(self) -> int:
        """Return k."""
        return int(self.classes.shape[1])

    def __len__(self) -> int:
        return int(self.classes.size)

    def __getitem__(self, index: int) -> Sample:
        number, place = divmod(index, self.per_input)
        if self._last is None or self._last[0] != number:
            self._last = number, self.inputs[number]
        sample, chosen = dict(self._last[1]), int(self.classes[number, place])
        labels = sample["labels"] if "labels" in sample else sample["input_ids"]
        if labels.ndim == 0 or labels.numel() == 1:
            return sample | {"labels": torch.full_like(labels, chosen, dtype=torch.int64)}
        return sample | {"labels": torch.where(labels == IGNORED_LABEL, labels.long(), torch.tensor(chosen))}


def inputs_of(rows: np.ndarray | Sequence[int], per_input: int) -> np.ndarray:
    """Return the number of the input that each row is of."""
    return np.asarray(rows, dtype=np.int64) // per_input
