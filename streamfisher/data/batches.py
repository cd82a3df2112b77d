"""Units of samples, the batches they are cut into, and a batch put together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from streamfisher.errors import DataError

#: What a missing position is filled with when sequences of unequal length are batched.
_PADDING = {"labels": -100}
#: Of all samples, the guard takes at most this share; and of a batch that it compares so many in any case.
_GUARD_SHARE, _GUARD_LEAST = 0.02, 2
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Unit:
    """Consecutive samples that are computed, written and marked together."""

    index: int
    start: int  # first sample
    stop: int  # one past the last sample

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, order=True)
class BatchRef:
    """One batch of a run, known by the samples that it holds and never by their contents."""

    start: int  # first sample
    stop: int  # one past the last sample
    unit: Unit = field(compare=False)  # the unit that it is part of
    index: int = field(compare=False)  # its place in the unit

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start:08d}-{self.stop:08d}"

    @property
    def samples(self) -> range:
        """The numbers of its samples."""
        return range(self.start, self.stop)


def make_units(n_samples: int, chunk_size: int) -> list[Unit]:
    """Return the units of `n_samples`: `chunk_size` samples each, the last one shorter."""
    starts = range(0, n_samples, chunk_size)
    return [Unit(index, start, min(start + chunk_size, n_samples)) for index, start in enumerate(starts)]


def make_batches(lengths: Sequence[int], batch_tokens: int) -> list[range]:
    """Cut `len(lengths)` consecutive samples into ranges of at most `batch_tokens` padded tokens, at least one each.

    A batch of B sequences is padded to the longest, so it costs `B * max(lengths)` tokens.
    """
    batches, start, longest = [], 0, 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if index > start and (index - start + 1) * longest > batch_tokens:
            batches.append(range(start, index))
            start, longest = index, length
    if len(lengths):
        batches.append(range(start, len(lengths)))
    return batches


def batches_of(
    unit: Unit, lengths: Sequence[int], batch_tokens: int, apart: Sequence[int] | None = None
) -> list[BatchRef]:
    """Return the batches of one unit, see `make_batches`.

    Args:
        unit: to be cut.
        lengths: tokens of all samples of the run.
        batch_tokens: padded tokens of one batch.
        apart: of all samples: those with different numbers never share a batch; `None`: any may.
    """
    runs = [(unit.start, unit.stop)]
    if apart is not None:
        starts = [n for n in range(unit.start, unit.stop) if n == unit.start or apart[n] != apart[n - 1]]
        runs = list(zip(starts, [*starts[1:], unit.stop], strict=True))
    cut = [
        range(start + batch.start, start + batch.stop)
        for start, stop in runs
        for batch in make_batches(lengths[start:stop], batch_tokens)
    ]
    return [BatchRef(batch.start, batch.stop, unit, index) for index, batch in enumerate(cut)]


def guarded_batches(batches: Iterable[BatchRef], every: int, seed: int) -> list[BatchRef]:
    """Return the batches of which the guard compares the gradients: two of every so many units.

    One is the first, the other is drawn at random: data that are sorted show at their beginning what the probe saw.

    Args:
        batches: of all units, in order.
        every: units; 0: none is compared.
        seed: of the draw.
    """
    among: dict[int, list[BatchRef]] = {}
    for batch in batches if every else ():
        among.setdefault(batch.unit.index // every, []).append(batch)
    chosen = []
    for index, members in among.items():
        chosen.append(members[0])
        if len(members) > 1:
            chosen.append(members[int(np.random.default_rng([seed, index]).integers(1, len(members)))])
    return chosen


def guarded_share(n_samples: int, n_guarded: int) -> int:
    """Return of how many samples of each guarded batch the ordinary gradient is taken: what plans and runs both ask.

    Together at most a share of all samples, in small runs too; a few in any case.

    Args:
        n_samples: N.
        n_guarded: batches that are compared.
    """
    return max(_GUARD_LEAST, int(_GUARD_SHARE * n_samples / max(n_guarded, 1)))


def sequence_length(sample: Mapping[str, Tensor]) -> int | None:
    """Return the number of tokens of a sample that is a sequence of token ids, else `None`."""
    for key in ("input_ids", "labels"):
        value = sample.get(key)
        if value is not None and value.ndim == 1 and not value.is_floating_point():
            return value.shape[0]
    return None


def padded_total(
    lengths: Sequence[int], units: Sequence[Unit], batch_tokens: int, apart: Sequence[int] | None = None
) -> int:
    """Return the padded tokens of all batches of all units, see `batches_of`."""
    batches = (batch for unit in units for batch in batches_of(unit, lengths, batch_tokens, apart))
    return sum(len(batch) * max(lengths[batch.start : batch.stop]) for batch in batches)


def padded_tokens(batch: Mapping[str, Tensor]) -> int:
    """Return the tokens of a batch as batches are measured: `B T` for sequences of token ids, else B."""
    for key in ("input_ids", "labels"):
        value = batch.get(key)
        if value is not None and value.ndim == 2 and not value.is_floating_point():
            return value.numel()
    return next(value.shape[0] for value in batch.values() if value.ndim)


def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack samples into a batch, padded on the right where sequences differ in length.

    Padding is 0, except -100 for `labels`; an `attention_mask` of shape (B, T) is added when something was padded and
    the samples bring none. Packed sequences (several documents in one, `position_ids` that start again at each) get no
    mask: models tell the documents apart by the positions only as long as none is given. Their labels are made
    explicit instead, so that padding is no target.

    Raises:
        DataError: samples differ in keys, dtypes or in more than their first axis.
    """
    lengths = [sequence_length(sample) for sample in samples]
    packed = len(set(lengths)) > 1 and any(_is_packed(sample) for sample in samples)
    if packed:
        samples = [{**sample, "labels": sample.get("labels", sample["input_ids"])} for sample in samples]
    first = samples[0]
    for sample in samples[1:]:
        if sample.keys() != first.keys():
            raise DataError(f"samples of one batch have different keys: {sorted(first)} and {sorted(sample)}.")
    batch: dict[str, Tensor] = {}
    for key in first:
        values = [sample[key] for sample in samples]
        if len({(value.dtype, value.ndim, value.shape[1:]) for value in values}) > 1:
            shapes = sorted({f"{tuple(value.shape)} {value.dtype}" for value in values})
            raise DataError(f"{key!r} cannot be batched: the samples have {' and '.join(shapes)}.")
        if first[key].ndim == 0 or len({value.shape[0] for value in values}) == 1:
            batch[key] = torch.stack(values)
        else:
            padding = _PADDING.get(key, 0)
            batch[key] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding)
    if "input_ids" in batch and "attention_mask" not in batch and len(set(lengths)) > 1 and not packed:
        positions = torch.arange(batch["input_ids"].shape[1])
        batch["attention_mask"] = (positions < torch.tensor(lengths)[:, None]).long()
    return batch


def _is_packed(sample: Mapping[str, Tensor]) -> bool:
    """Return whether a sample holds several documents: `position_ids` that start again."""
    positions = sample.get("position_ids")
    has_ids = "input_ids" in sample and "attention_mask" not in sample
    return has_ids and positions is not None and positions.ndim == 1 and bool((positions[1:] <= positions[:-1]).any())
