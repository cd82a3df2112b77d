"""One forward pass for samples that differ in their labels only, and a backward pass for each label.

The logits of an input are those of all its classes. So the forward pass is taken of the inputs alone, its graph is
kept, and round c of the backward passes forms the rows of class c of every input at once: `(1 + 2 k) / 3 k` of what k
samples of their own would cost, and the activations of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamfisher.data.batches import padded_tokens
from streamfisher.errors import LossError
from streamfisher.gradients.batch_axis import position_counts
from streamfisher.gradients.batch_rows import RowSink
from streamfisher.gradients.capture import Capture
from streamfisher.gradients.factors import FactorPair
from streamfisher.gradients.groups import Pass
from streamfisher.gradients.state import inputs_of_checkpoints
from streamfisher.gradients.uses import UseWatch
from streamfisher.models.calling import batch_size, samples_of
from streamfisher.models.losses import PerSampleLoss

#: With fewer inputs and tokens a pass costs what its calls cost, and one of all samples has fewer of them.
LEAST_INPUTS, LEAST_TOKENS = 4, 256


@dataclass(frozen=True)
class SharedInputs:
    """How the consecutive samples of a batch are parts of inputs: k of each, but for the first and the last."""

    first: int  # number of the first sample among those of its input
    per_input: int  # k

    def starts(self, n_samples: int) -> list[int]:
        """Return the place of the first sample of each input in a batch."""
        return [0, *range(self.per_input - self.first, n_samples, self.per_input)]

    def rounds(self, n_samples: int) -> Iterator[tuple[slice, slice]]:
        """Yield, for each number among its input's, the places of the samples that have it, and of which inputs."""
        for number in range(self.per_input):
            begins = number - self.first + (self.per_input if number < self.first else 0)
            places = range(begins, n_samples, self.per_input)
            if len(places):
                first = int(number < self.first)
                yield slice(begins, n_samples, self.per_input), slice(first, first + len(places))

    def worthwhile(self, batch: Mapping[str, Any]) -> bool:
        """Return whether one forward pass of the inputs is cheaper than one of all samples."""
        n_samples = batch_size(batch)
        inputs = len(self.starts(n_samples))
        tokens = padded_tokens(batch) // n_samples * inputs
        return inputs < n_samples and (inputs >= LEAST_INPUTS or tokens >= LEAST_TOKENS)


def backward_of_shared(
    capture: Capture,
    loss: PerSampleLoss,
    batch: Mapping[str, Any],
    shared: SharedInputs,
    sink: RowSink,
    factored: Collection[str],
    watch: UseWatch,
) -> tuple[Tensor, set[str], dict[str, list[FactorPair]]]:
    """Fill the rows of a batch; return losses, parameters not understood, and factors.

    Args:
        capture: whose hooks are installed.
        loss: of classes.
        batch: B samples.
        shared: which of them share an input.
        sink: of the whole batch: its rows are filled.
        factored: parameters of which the factors are returned instead.
        watch: of uses that no rule accounts for.

    Raises:
        LossError: the model's logits ignore the batch axis, or a label is no class of theirs.
    """
    n_samples = batch_size(batch)
    inputs = samples_of(batch, shared.starts(n_samples))
    n_inputs = batch_size(inputs)
    sinks: list[tuple[slice, RowSink]] = []
    whole = RowSink({}, n_inputs, sink.shapes, sink.shapes)  # says what is wanted in the forward pass
    state = Pass(whole, position_counts(inputs, n_inputs), watch=watch)
    losses: Tensor | None = None
    checkpoints = inputs_of_checkpoints(capture.model, capture)
    with capture.serving(state), torch.enable_grad(), checkpoints, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not yet implemented the batching rule.*")
        logits = loss.logits(capture.model, inputs)
        if logits.dim() == 0 or logits.shape[0] != n_inputs:
            raise LossError(f"The model returned logits of shape {tuple(logits.shape)} for {n_inputs} samples.")
        rounds = list(shared.rounds(n_samples))
        for places, of_inputs in rounds:
            parts = {name: rows[places] for name, rows in sink.rows.items()}
            state.sink = RowSink(parts, n_inputs, sink.shapes, factored, sink.projected, window=of_inputs)
            sinks.append((places, state.sink))
            found = loss.from_logits(logits[of_inputs], samples_of(batch, places))
            losses = found.new_empty(n_samples).detach() if losses is None else losses
            losses[places] = found.detach()
            if found.requires_grad:
                found.sum().backward(retain_graph=places is not rounds[-1][0])
            state.sink.finish()
    assert losses is not None, "a batch has samples"
    return losses, state.deferred, {name: _joined(name, sinks, n_samples) for name in sink.factors}


def _joined(name: str, sinks: Sequence[tuple[slice, RowSink]], n_samples: int) -> list[FactorPair]:
    """Return the factors of all samples of a batch from those of each round."""
    joined = []
    for uses in zip(*(sink.factors[name] for _, sink in sinks), strict=True):
        sides = []
        for values in ([pair.left for pair in uses], [pair.right for pair in uses]):
            whole = values[0].new_empty(n_samples, *values[0].shape[1:])
            for (places, _), part in zip(sinks, values, strict=True):
                whole[places] = part
            sides.append(whole)
        joined.append(FactorPair(*sides))
    return joined
