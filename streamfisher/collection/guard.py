"""The guard: on some batches the rows of each parameter must sum to its ordinary gradient; with sharded weights too.

FSDP2 averages an ordinary gradient over the ranks. So all ranks take the guarded batch of *one* of them, which makes
the average that batch's own gradient and keeps their passes alike, whatever path its samples take through the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamfisher.collection.claims import share_of
from streamfisher.collection.survey import Survey
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import Unit, collate, make_batches
from streamfisher.errors import CaptureError
from streamfisher.gradients import GradientEngine
from streamfisher.gradients.factors import FactorPair
from streamfisher.models.model_labels import draw_labels, sample_seed
from streamfisher.models.offload import to_model
from streamfisher.runtime.ranks import Ranks


def check_sums(engine: GradientEngine, differences: Mapping[str, float], unit: Unit) -> None:
    """Refuse rows that do not sum to the ordinary gradient.

    Raises:
        CaptureError: something in the data takes a path through the model that the probe did not see.
    """
    wrong = {name: error for name, error in differences.items() if error > engine.tolerance}
    if wrong:
        name = max(wrong, key=wrong.__getitem__)
        raise CaptureError(
            f"the gradient rows of {name} do not sum to its ordinary gradient on samples from {unit.start} on: "
            f"relative difference {wrong[name]:.1e}, tolerance {engine.tolerance:.0e}; {len(wrong)} parameters in all. "
            "The model treats these samples otherwise than the probed ones. Leave the parameter out with --exclude, or "
            "report the model."
        )


#: The guard compares so many bytes of an ordinary gradient at a time; where there is more, parameters take turns.
_GUARDED_BYTES = 256 << 20


def guarded_names(engine: GradientEngine, names: Sequence[str], turn: int) -> list[str]:
    """Return the parameters that the guard compares this time: all, or those whose turn it is where they are large."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in names:
        bytes_of = 8 * engine.parameters[name].numel
        if parts[-1] and size + bytes_of > _GUARDED_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += bytes_of
    return parts[turn % len(parts)]


def only(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return what a mapping has of some names."""
    return {name: value for name, value in values.items() if name in names}


class SharedGuard:
    """The guard of one pass over the data with sharded weights: the same batches as without, on all ranks together.

    Every rank knows which rank starts which unit in which step, so nothing is agreed upon while the pass runs.

    Args:
        engine: the same on every rank.
        found: the samples.
        config: `guard_every` and `labels` count here.
        units: of all ranks, as they are shared out.
        ranks: all of them take part in every step.
        names: parameters that the pass captures.
        batch_tokens: padded tokens of one backward pass.
    """

    def __init__(
        self,
        engine: GradientEngine,
        found: Survey,
        config: SpectralConfig,
        units: Sequence[Unit],
        ranks: Ranks,
        names: Sequence[str],
        batch_tokens: int,
    ):
        self.engine, self.found, self.config, self.ranks = engine, found, config, ranks
        self.names, self.batch_tokens = list(names), batch_tokens
        self._steps = 0
        self._guarded = guarded_steps(units, found.lengths, batch_tokens, config.guard_every, ranks.count)

    def step(self, rows: Mapping[str, Tensor], factors: Mapping[str, Sequence[FactorPair]]) -> None:
        """Finish one step: every rank has formed gradients, of a batch of its own or of one that is dropped.

        Args:
            rows: of this rank's batch.
            factors: of further parameters.

        Raises:
            CaptureError: the rows of a rank do not sum to the ordinary gradient; raised on every rank.
        """
        guarded = self._guarded.get(self._steps, [])
        self._steps += 1
        for owner, unit in guarded:
            batch = self._first_batch(unit)
            own = owner == self.ranks.index
            names = guarded_names(self.engine, self.names, unit.index // self.config.guard_every)
            mine = (only(rows, names), only(factors, names)) if own else ({}, {})
            found = self.engine.guard(batch, *mine, names=names)
            values = [found.get(name, 0.0) for name in names]
            differences = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
            dist.broadcast(differences, src=owner)
            check_sums(self.engine, dict(zip(names, differences.tolist(), strict=True)), unit)

    def _first_batch(self, unit: Unit) -> dict[str, Tensor]:
        lengths = self.found.lengths[unit.start : unit.stop]
        numbers = [unit.start + offset for offset in next(iter(make_batches(lengths, self.batch_tokens)))]
        batch = to_model(collate([self.found.samples[number] for number in numbers]), self.engine.model)
        if self.config.labels == "model":
            seeds = [sample_seed(self.config.seed, number) for number in numbers]
            batch = draw_labels(self.engine.model, batch, self.found.loss, seeds)
        return batch


def guarded_steps(
    units: Sequence[Unit], lengths: Sequence[int], batch_tokens: int, every: int, count: int
) -> dict[int, list[tuple[int, Unit]]]:
    """Return `{step: [(rank, unit)]}`: who forms, in which step of all ranks, the first batch of a guarded unit."""
    found: dict[int, list[tuple[int, Unit]]] = {}
    for rank in range(count if every else 0):
        step = 0
        for unit in share_of(units, rank, count):
            if unit.index % every == 0:
                found.setdefault(step, []).append((rank, unit))
            step += len(make_batches(lengths[unit.start : unit.stop], batch_tokens))
    return found
