"""Where gradients come from: the seam between a pass over the data and whatever forms per-sample gradients in it.

A producer is asked for one batch after the other, wave by wave. Two exist: the whole model (`model_producer.py`) and
the stream of its layers (`stream/producer.py`); what passes the batches and what becomes of the gradients (`sinks/`)
know neither.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from streamfisher.data.batches import BatchRef
from streamfisher.gradients.factors import FactorPair
from streamfisher.gradients.parameters import ParameterInfo
from streamfisher.gradients.probe_report import ProbeReport
from streamfisher.gradients.shapes import GradientShape
from streamfisher.models.batches import ModelBatches


@dataclass(frozen=True)
class Wave:
    """Some of the parameters, in the model's order, and the samples to take their gradients of."""

    index: int
    parameters: tuple[str, ...]
    batches: ModelBatches  # of the whole run
    todo: tuple[BatchRef, ...]  # whose gradients are still to be taken, by whichever rank
    own: tuple[BatchRef, ...] | None = None  # those that this rank takes, where it is settled


@dataclass(frozen=True)
class Asked:
    """How a sink wants the gradients of one batch of B samples; parameters that are in neither are not formed."""

    rows: Mapping[str, Tensor]  # parameter -> buffer (B, P_k) that is filled; one narrower than P_k: projected
    factored: Collection[str] = ()  # parameters whose factors are returned instead


@dataclass(frozen=True)
class BatchGradients:
    """The gradients of one batch of B samples. Tensors are where they were made."""

    losses: Tensor  # (B,) float64 on the CPU
    n_targets: Tensor  # (B,) int64 on the CPU
    factors: Mapping[str, Sequence[FactorPair]] = field(default_factory=dict)  # of parameters asked for as factors
    rows: Mapping[str, Tensor] = field(default_factory=dict)  # (B, P_k) each: the buffers that were asked to be filled


class GradientProducer(Protocol):
    """Forms the gradients of batches, wave after wave; entered, probed and given routes before the first."""

    @property
    def parameters(self) -> Mapping[str, ParameterInfo]:
        """Captured parameters, in the model's order."""

    @property
    def excluded(self) -> Mapping[str, str]:
        """Trainable parameters that are left out, with the reason."""

    @property
    def columns(self) -> Mapping[str, int]:
        """Numbers of a row of parameters that are projected."""

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype in which rows are formed."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def tolerance(self) -> float:
        """Norm-relative difference from plain autograd that counts as agreement."""

    # Before a run

    def probe(self, memory: int | None = None) -> ProbeReport:
        """Choose a rule for each parameter and verify it; `memory` in bytes bounds what is compared at a time."""

    def shapes(self) -> tuple[list[GradientShape], float]:
        """Return what each parameter's gradient is made of, and the bytes a backward pass takes a padded token."""

    def apply_routes(self, report: ProbeReport) -> None:
        """Use the routing of an earlier probe, so that a resumed run has the same bits."""

    def segments(self) -> list[list[str]] | None:
        """Return groups of parameters that must not share a wave, in the order of the waves; `None`: any may."""

    def beside_weights(self, budget: int) -> int:
        """Return what a memory budget leaves beside weights that are read while the gradients are formed."""

    def keep_between_waves(self, room: int, n_tokens: int, folder: Path | None = None, memory: int = 0) -> None:
        """Settle what is kept from wave to wave.

        Args:
            room: bytes on the disk for it.
            n_tokens: padded tokens of all batches.
            folder: where it is kept; `None`: it is only checked that there is room.
            memory: bytes of host memory for it, before the disk is taken; 0: it is to be found by other processes.

        Raises:
            CapacityError: there is not.
        """

    # A pass

    def allocate(
        self, n_rows: int, names: Collection[str] | None = None, columns: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Return zeroed buffers `(n_rows, P_k)` in `row_dtype` where rows are formed; of all, or of `names`."""

    def begin(self, wave: Wave) -> None:
        """Make ready for the pass of a wave; all ranks do."""

    def gradients(self, batch: BatchRef, asked: Asked) -> BatchGradients:
        """Take the gradients of one of the wave's batches."""

    def guard(
        self,
        batch: BatchRef,
        gradients: BatchGradients | None,
        names: Collection[str],
        places: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """Compare the sums of the gradients of a batch with its ordinary gradient.

        Args:
            batch: one of the wave's; the one that was asked for last, if its gradients are given.
            gradients: `None`: of another rank's batch, of which the ordinary gradient is taken together.
            names: parameters to compare.
            places: of samples in the batch that are enough; `None`: all.

        Returns:
            Parameter -> relative difference, to be compared with `tolerance`; empty without gradients.
        """

    def guard_alone(self, batch: BatchRef, gradients: BatchGradients, names: Collection[str]) -> dict[int, float]:
        """Compare some samples of a batch that was taken with the same samples alone.

        Args:
            batch: the one that was asked for last.
            gradients: of it.
            names: parameters to compare.

        Returns:
            Sample number -> relative difference, of samples whose loss is another one alone; empty if all agree, or
            where a sample cannot be taken alone.
        """

    @property
    def guards_in_parts(self) -> bool:
        """Whether `guard` holds the ordinary gradients of all that it compares, so that parameters take turns."""

    def finish(self, wave: Wave) -> None:
        """Forget what no later wave needs; the gradients of this one are safe on every rank."""

    def close(self) -> None:
        """Forget what was kept between waves; the run is complete."""
