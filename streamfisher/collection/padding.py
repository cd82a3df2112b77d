"""Whether padding that we add changes a sample: then samples of unequal length never share a batch.

A model that gets no mask, or does not heed it, averages and attends over whatever fills a short sequence up; another
chooses its positions by the longest of the batch. So where lengths differ, a few samples are taken together with one of
another length and compared with themselves alone and unpadded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import psutil
import torch

from streamfisher.data.batches import collate
from streamfisher.data.samples import Sample, Samples
from streamfisher.errors import StreamfisherError
from streamfisher.gradients import GradientEngine
from streamfisher.gradients.norms import norm
from streamfisher.gradients.probe import parts_within
from streamfisher.gradients.reference import gradient_error
from streamfisher.gradients.tolerance import COUPLING
from streamfisher.models.offload import to_model
from streamfisher.models.sharding import is_sharded

#: Padded and unpadded kernels add up in another order, which may be a little more than repeating the same one.
_ROUNDING = 10.0

Lengths = tuple[tuple[str, int], ...]


def lengths_of(sample: Sample) -> Lengths:
    """Return the first axis of every tensor of a sample: what `collate` pads where it differs."""
    return tuple(sorted((key, value.shape[0]) for key, value in sample.items() if value.ndim))


def unequal_pairs(lengths: Sequence[Lengths]) -> list[tuple[int, int]]:
    """Return up to two pairs of samples of unequal length: the shortest with the longest, and the first two."""
    totals = [sum(length for _, length in of_sample) for of_sample in lengths]
    shortest, longest = totals.index(min(totals)), totals.index(max(totals))
    other = next((number for number, length in enumerate(lengths) if length != lengths[0]), 0)
    pairs = {tuple(sorted((shortest, longest))), (0, other)}
    return [(i, j) for i, j in sorted(pairs) if lengths[i] != lengths[j]]


def padding_changes(
    engine: GradientEngine, samples: Samples, lengths: Sequence[Lengths], budget: int | None = None
) -> bool | None:
    """Return whether samples of unequal length must not share a batch; `None`: there are none of unequal length.

    Args:
        engine: of the run; entered here.
        samples: of the run.
        lengths: of each sample, see `lengths_of`.
        budget: bytes of memory; `None`: what is free.
    """
    pairs = unequal_pairs(lengths)
    if not pairs:
        return None
    if engine.loss.sequential:  # one sample at a time, so that nothing is lost
        return True
    memory = sys.maxsize  # with sharded weights all ranks take the same passes, whatever they have free
    if not is_sharded(engine.model):
        free = psutil.virtual_memory().available // 4
        memory = free if budget is None else min(free, budget // 2)
    with engine:
        for pair in pairs:
            try:
                if _differs(engine, [samples[number] for number in pair], memory):
                    return True
            except (StreamfisherError, RuntimeError, ValueError, TypeError, IndexError, KeyError):
                continue  # what ails these samples is said, with their names, when their turn comes
    return False


def numbered(lengths: Sequence[Lengths]) -> list[int]:
    """Return the same number for samples of the same length."""
    numbers: dict[Lengths, int] = {}
    return [numbers.setdefault(length, len(numbers)) for length in lengths]


def _differs(engine: GradientEngine, pair: Sequence[Sample], memory: int) -> bool:
    """Return whether one of two samples has another loss or gradient in a batch with the other one than alone."""
    together = to_model(collate(pair), engine.model)
    engine.see_arithmetic(together)
    limit = max(engine.tolerance, COUPLING)
    offloaded = any(tensor.is_meta for tensor in engine.tensors.values())
    for i, sample in enumerate(pair):
        alone = to_model(collate([sample]), engine.model)
        if offloaded:  # each gradient reads the whole model once more
            with torch.no_grad():
                one, other = float(engine.loss(engine.model, alone)[0]), float(engine.loss(engine.model, together)[i])
            if _gap(one, other) > limit:
                return True
            continue
        for part in parts_within(engine, 1, memory):
            first, truth = engine.plain_gradients(alone, names=part, index=0)
            second, grads = engine.plain_gradients(together, names=part, index=i)
            if _gap(float(first), float(second)) > limit:
                return True
            whole = sum(norm(grad) ** 2 for grad in truth.values() if grad is not None) ** 0.5
            floor = _ROUNDING * engine.floor
            errors = [gradient_error(grads[name], truth[name], whole, floor) for name in part]
            if any(error > limit and significant for error, significant in errors):
                return True
    return False


def _gap(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), 1e-3)
