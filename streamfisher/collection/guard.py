"""The guard: on some batches the rows of each parameter must sum to its ordinary gradient; with sharded weights too.

FSDP2 averages an ordinary gradient over the ranks. So all ranks take the guarded batch of *one* of them, which makes
the average that batch's own gradient and keeps their passes alike, whatever path its samples take through the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from streamfisher.collection.claims import share_of
from streamfisher.data.batches import BatchRef, Unit, guarded_batches, guarded_share
from streamfisher.errors import CaptureError
from streamfisher.gradients.producer import BatchGradients, GradientProducer
from streamfisher.models.batches import ModelBatches
from streamfisher.runtime.ranks import Ranks


def check_sums(producer: GradientProducer, differences: Mapping[str, float], batch: BatchRef) -> None:
    """Refuse rows that do not sum to the ordinary gradient.

    Raises:
        CaptureError: something in the data takes a path through the model that the probe did not see.
    """
    wrong = {name: error for name, error in differences.items() if error > producer.tolerance}
    if wrong:
        name = max(wrong, key=wrong.__getitem__)
        raise CaptureError(
            f"the gradient rows of {name} do not sum to its ordinary gradient on samples from {batch.start} on: "
            f"relative difference {wrong[name]:.1e}, tolerance {producer.tolerance:.0e}; {len(wrong)} parameters in "
            "all. The model treats these samples otherwise than the probed ones. Leave the parameter out with "
            "--exclude, or report the model."
        )


def check_alone(differences: Mapping[int, float], tolerance: float) -> None:
    """Refuse rows that are others in a batch than of the sample alone.

    Raises:
        CaptureError: batch mates, or the padding that they cause, change a sample.
    """
    if differences:
        sample = max(differences, key=differences.__getitem__)
        raise CaptureError(
            f"the loss and the gradient of sample {sample} are others in its batch than alone: relative difference "
            f"{differences[sample]:.1e}, tolerance {tolerance:.0e}. The model mixes the samples of a batch, or lets "
            "their lengths change a sample; batches of one sample (--batch-tokens 1) keep them apart."
        )


#: The guard compares so many bytes of an ordinary gradient at a time; where there is more, parameters take turns.
_GUARDED_BYTES = 256 << 20


def guarded_names(producer: GradientProducer, names: Sequence[str], turn: int) -> list[str]:
    """Return the parameters that the guard compares this time: all, or those whose turn it is where they are large."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in names:
        bytes_of = 8 * producer.parameters[name].numel
        if parts[-1] and size + bytes_of > _GUARDED_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += bytes_of
    return parts[turn % len(parts)]


class Guard(Protocol):
    """Looks at the batches of a pass, one after the other."""

    def step(self, batch: BatchRef, gradients: BatchGradients) -> None:
        """Take note of one batch; its gradients may be compared.

        Raises:
            CaptureError: they do not sum to the ordinary gradient.
        """


class OwnGuard:
    """The guard of one rank: on samples of two batches of every so many units, see `guarded_batches`.

    Args:
        producer: of the gradients.
        batches: of the run, in order.
        names: parameters that the pass captures.
        every: units; 0: never.
        seed: of the batches that are drawn.
    """

    def __init__(
        self, producer: GradientProducer, batches: Iterable[BatchRef], names: Sequence[str], every: int, seed: int
    ) -> None:
        self.producer, self.names, self._seed = producer, list(names), seed
        batches = list(batches)
        self._turns = {batch: turn for turn, batch in enumerate(guarded_batches(batches, every, seed))}
        self._share = guarded_share(sum(map(len, batches)), len(self._turns))

    def step(self, batch: BatchRef, gradients: BatchGradients) -> None:
        """Compare a batch whose turn it is with its ordinary gradient, and some of its samples with themselves alone.

        Raises:
            CaptureError: they differ.
        """
        turn = self._turns.get(batch)
        if turn is None:
            return
        names = guarded_names(self.producer, self.names, turn) if self.producer.guards_in_parts else self.names
        check_alone(self.producer.guard_alone(batch, gradients, names), self.producer.tolerance)
        drawn = np.random.default_rng([self._seed, batch.start]).permutation(len(batch))[: self._share]
        check_sums(self.producer, self.producer.guard(batch, gradients, names, sorted(drawn.tolist())), batch)


class SharedGuard:
    """The guard of one pass over the data with sharded weights: the same batches as without, on all ranks together.

    Every rank knows which rank starts which unit in which step, so nothing is agreed upon while the pass runs.

    Args:
        producer: the same on every rank.
        batches: of the run.
        units: of all ranks, as they are shared out.
        ranks: all of them take part in every step.
        names: parameters that the pass captures.
        every: units of which two batches are compared; 0: never.
        seed: of the batches that are drawn.
    """

    def __init__(
        self,
        producer: GradientProducer,
        batches: ModelBatches,
        units: Sequence[Unit],
        ranks: Ranks,
        names: Sequence[str],
        every: int,
        seed: int,
    ):
        self.producer, self.ranks = producer, ranks
        self.names = list(names)
        self._steps = 0
        self._turns = {batch: turn for turn, batch in enumerate(guarded_batches(batches, every, seed))}
        self._guarded = guarded_steps(units, batches, self._turns, ranks.count)

    def step(self, batch: BatchRef, gradients: BatchGradients) -> None:
        """Finish one step: every rank has formed gradients, of a batch of its own or of one that is dropped.

        Raises:
            CaptureError: the rows of a rank do not sum to the ordinary gradient; raised on every rank.
        """
        guarded = self._guarded.get(self._steps, [])
        self._steps += 1
        for owner, compared in guarded:
            names = guarded_names(self.producer, self.names, self._turns[compared])
            mine = gradients if owner == self.ranks.index else None
            known = self.producer.guard(compared, mine, names)
            values = [known.get(name, 0.0) for name in names]
            differences = torch.tensor(values, dtype=torch.float64, device=self.producer.device)
            dist.broadcast(differences, src=owner)
            check_sums(self.producer, dict(zip(names, differences.tolist(), strict=True)), compared)


def guarded_steps(
    units: Sequence[Unit], batches: ModelBatches, guarded: Collection[BatchRef], count: int
) -> dict[int, list[tuple[int, BatchRef]]]:
    """Return `{step: [(rank, batch)]}`: who forms, in which step of all ranks, a batch that is guarded."""
    steps: dict[int, list[tuple[int, BatchRef]]] = {}
    for rank in range(count):
        formed = (batch for unit in share_of(units, rank, count) for batch in batches.of(unit))
        for step, batch in enumerate(formed):
            if batch in guarded:
                steps.setdefault(step, []).append((rank, batch))
    return steps
