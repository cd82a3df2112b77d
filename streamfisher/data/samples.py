"""Samples, numbered once and for all, and the fixed batches made of them.

What is in a batch decides the last bits of a gradient, so batches depend on the samples and two settings only, never on
the number of processes: a *unit* is `chunk_size` consecutive samples (the rows of one Zarr chunk, written and marked
together), and within a unit consecutive samples share a backward pass while they fit `batch_tokens` padded tokens.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamfisher.data.batches import IGNORED_LABEL, Unit, sequence_length
from streamfisher.data.cutting import TokenCutter
from streamfisher.data.sources import SampleSource, as_source, named_entries
from streamfisher.errors import DataError

Sample = dict[str, Tensor]


class Samples:
    """A validated, numbered view of a sample source.

    Args:
        source: a map-style dataset of dicts of tensors (or arrays) without batch axis, a dict of batched tensors, an
            iterable of dicts, or a DataLoader of batches; see `as_source`.
        n_samples: how many to use, from the first; `None` means all.
        max_length: tokens; longer sequences are cut. `None` means never.

    Raises:
        DataError: there is nothing in it, or less than `n_samples`.
    """

    def __init__(self, source: Any, n_samples: int | None = None, max_length: int | None = None):
        self.source: SampleSource = source.source if isinstance(source, Samples) else as_source(source, n_samples)
        self.max_length = max_length
        self._cutter = TokenCutter(_Whole(self))
        self._said = False  # what is left out
        available = len(self.source)
        if available == 0:
            raise DataError("The data holds no samples; at least 2 are needed for a spectrum.")
        if n_samples is not None and n_samples < 1:
            raise DataError(f"--samples {n_samples}: ask for at least 2 samples.")
        if n_samples is not None and n_samples > available:
            raise DataError(f"{n_samples} samples were asked for and the data holds {available}; ask for fewer.")
        self.n_samples = available if n_samples is None else n_samples

    def __len__(self) -> int:
        return self.n_samples

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index` as CPU tensors, cut to `max_length` and checked.

        Raises:
            DataError: it is not a dict of tensors, or it is a sequence of fewer than one token.
        """
        tensors = self._whole(index)
        length = sequence_length(tensors)
        if self.max_length is not None and length is not None and length > self.max_length:
            tensors = self._cutter.cut(tensors, length, self.max_length)
        return tensors

    def _whole(self, index: int) -> Sample:
        """Return sample `index` as CPU tensors, not cut."""
        sample = named_entries(self.source[index])
        if isinstance(sample, str):
            raise DataError(
                f"sample {index} is text. streamfisher.text_samples(texts, tokenizer) makes samples of texts."
            )
        if not isinstance(sample, Mapping) or not sample:
            raise DataError(f"sample {index} is a {type(sample).__name__}, not a dict of tensors.")
        kept = {str(key): value for key, value in sample.items() if not _is_text(value)}
        if len(kept) < len(sample):
            self._say_what_is_left_out([str(key) for key in sample if str(key) not in kept], index)
        if not kept:
            raise DataError(
                f"sample {index} has nothing but text ({', '.join(map(str, sample))}). "
                "streamfisher.text_samples(texts, tokenizer) makes samples of texts."
            )
        return {key: _tensor(value, key, index) for key, value in kept.items()}

    def _say_what_is_left_out(self, keys: list[str], index: int) -> None:
        if not self._said:
            self._said = True
            warnings.warn(f"left out of the samples, as no numbers: {', '.join(keys)}.", stacklevel=4)

    def digest(self, unit: Unit) -> str:
        """Return the SHA-256 of the contents of the samples of `unit`: keys, dtypes, shapes and bytes."""
        digest = hashlib.sha256()
        for index in range(unit.start, unit.stop):
            add_contents(digest, self[index])
        return digest.hexdigest()


def add_contents(digest: hashlib._Hash, sample: Mapping[str, Tensor]) -> None:
    """Feed a digest with the contents of a sample: keys, dtypes, shapes and bytes."""
    for key, value in sorted(sample.items()):
        digest.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def sample_digest(sample: Mapping[str, Tensor]) -> bytes:
    """Return a digest of the contents of one sample, short and for comparing within one process only."""
    digest = hashlib.sha256()
    add_contents(digest, sample)
    return digest.digest()[:16]


def check_unchanged(index: int, sample: Mapping[str, Tensor], digest: bytes) -> None:
    """Refuse a sample that is not what it was when it was first read.

    Raises:
        DataError: it is another one now.
    """
    if sample_digest(sample) != digest:
        raise DataError(
            f"sample {index} is another one each time it is read: the data changes at random or while the run goes on. "
            "Every pass must see the same samples; switch augmentation off, or draw it once and keep it."
        )


class TokenSamples:
    """One sample per target token: its sequence, with every other label masked.

    The gradient of such a sample is that of one token's loss, which flows back through attention to earlier positions.

    Args:
        sequences: the sequences that the tokens come from.
        shifted: the label at position t is predicted from the tokens before it (causal models). The sequence is then
            cut after t, which changes nothing and saves the rest.
        per_sequence: draw at most so many target tokens of each sequence; `None` takes all.
        seed: of the draw, which depends on it and on the sequence's number only.

    Raises:
        DataError: no sequence has a target token.
    """

    def __init__(self, sequences: Samples, *, shifted: bool, per_sequence: int | None = None, seed: int = 0):
        self.sequences = sequences
        self.shifted = shifted
        self._cutter = TokenCutter(sequences)
        self.targets: list[tuple[int, int]] = []  # (sequence, position) of each sample
        for index in range(len(sequences)):
            sample = sequences[index]
            labels = sample.get("labels", sample.get("input_ids"))
            if labels is None or labels.ndim != 1 or labels.is_floating_point():
                raise DataError(
                    "sample_unit='token' needs sequences of integer `input_ids` or `labels`; "
                    f"sample {index} has {', '.join(sample)}."
                )
            valid = labels != IGNORED_LABEL
            if "attention_mask" in sample:
                valid = valid & (sample["attention_mask"] != 0)
            if shifted:  # what comes first, or first after left padding, is predicted by nothing
                valid[1:] &= sample["attention_mask"][:-1] != 0 if "attention_mask" in sample else True
                valid[0] = False
            positions = valid.nonzero().flatten().numpy()
            if per_sequence is not None and len(positions) > per_sequence:
                generator = np.random.Generator(np.random.PCG64([seed, index]))
                positions = np.sort(generator.choice(positions, size=per_sequence, replace=False))
            self.targets += [(index, int(position)) for position in positions]
        if not self.targets:
            raise DataError("no sequence has a target token: every label is masked, or every sequence has one token.")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Sample:
        sequence, position = self.targets[index]
        sample = dict(self.sequences[sequence])
        original = sample.get("labels", sample["input_ids"])
        labels = torch.full_like(original, IGNORED_LABEL)
        labels[position] = original[position]
        length = sample["input_ids"].shape[0]
        sample["labels"] = labels
        if self.shifted:
            sample = self._cutter.cut(sample, length, position + 1)
        return sample


class _Whole:
    """The samples as they are before they are cut."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples.source)

    def __getitem__(self, index: int) -> Sample:
        return self.samples._whole(index)


def _is_text(value: Any) -> bool:
    """Return whether a value is text, a list of texts, or nothing: what comes with a dataset and no model takes."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(isinstance(part, str | bytes) for part in value)
    return value is None or isinstance(value, str | bytes | np.str_)


def _tensor(value: Any, key: str, index: int) -> Tensor:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.clone() if value.is_inference() else value  # autograd can save none of inference mode
    try:
        return torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{key!r} of sample {index} is a {type(value).__name__}, not a tensor: {error}") from error
