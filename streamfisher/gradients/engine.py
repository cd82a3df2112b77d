"""The engine: a model and a batch in, one gradient row per sample and parameter out, verified before it is used."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import psutil
from torch import Tensor
from torch.distributed.tensor import DTensor

from streamfisher.data.batches import padded_tokens
from streamfisher.errors import CaptureError, LossError
from streamfisher.gradients.activations import SavedBytes
from streamfisher.gradients.factors import FactorPair
from streamfisher.gradients.groups import Group
from streamfisher.gradients.guard import Comparison
from streamfisher.gradients.passes import GradientPasses
from streamfisher.gradients.probe import run_probe
from streamfisher.gradients.probe_report import ProbeReport
from streamfisher.gradients.shapes import GradientShape, shapes_of_batch
from streamfisher.models.calling import batch_size


class GradientEngine(GradientPasses):
    """Per-sample gradients of every selected trainable parameter, one backward pass per batch.

    A context manager: inside, the model is in eval mode with every parameter frozen, and carries hooks; on leaving it
    is as it was. In eval mode BatchNorm uses its running statistics and dropout is off, which makes a sample's
    gradient a function of that sample alone.

        with GradientEngine(model, resolve_loss(model, batch)) as engine:
            print(engine.probe(batch).summary())
            rows = engine.allocate(32)
            for batch in batches:
                losses = engine.rows(batch, rows).losses  # rows[name][:B] is filled

    Args:
        model: any module; compiled ones are run eagerly, because hooks cannot see inside.
        loss: what `resolve_loss` returned.
        include: glob patterns of parameter names to capture; empty: all trainable ones.
        exclude: glob patterns of parameter names to leave out.
        dtype_compute: the least dtype in which rows are formed.
        deterministic: use the attention kernel whose result does not depend on padding or batch mates.

    Raises:
        ModelError: nothing can be captured, see `select_parameters`.
    """

    def probe(self, batch: Mapping[str, Any], memory: int | None = None) -> ProbeReport:
        """Decide which rule serves which parameter, and verify it against plain autograd on each sample alone.

        Args:
            batch: a dict of batched tensors with at least 2 samples; at most 3 are used.
            memory: bytes for the gradients that are compared; what does not fit is probed in parts. `None` means a
                quarter of what is free.

        Raises:
            LossError: the loss couples samples, is random, or has the wrong shape.
            CaptureError: a parameter disagrees on every path; the message names it.
        """
        self._check_entered()
        batch = self._prepared(batch)
        n_samples = batch_size(batch)
        if n_samples < 2:
            raise LossError("The probe compares a sample in a batch with the sample alone, so it needs 2 samples.")
        # Two samples, unless an axis of length two could be taken for the batch.
        ambiguous = any(2 in value.shape[1:] for value in batch.values() if isinstance(value, Tensor))
        n_used = 3 if ambiguous and n_samples >= 3 else 2
        batch = {
            key: value[:n_used] if isinstance(value, Tensor) and value.dim() and value.shape[0] == n_samples else value
            for key, value in batch.items()
        }
        return run_probe(self, batch, memory or psutil.virtual_memory().available // 4)

    def apply_routes(self, report: ProbeReport) -> None:
        """Reuse the routing of an earlier probe, so that a resumed run has the same bits.

        Raises:
            CaptureError: the report is about other parameters.
        """
        if list(report.parameters) != list(self.parameters):
            different = set(report.parameters).symmetric_difference(self.parameters)
            raise CaptureError(
                "The stored routing is for other parameters; they differ in "
                f"{', '.join(sorted(different)[:5]) or 'their order'}."
            )
        self.use_precision(report)
        self.use_groups([Group.from_dict(group) for group in report.groups], report.per_sample, report.unproved)

    def shapes(self, batch: Mapping[str, Any]) -> tuple[list[GradientShape], float]:
        """Return what each parameter's gradient is made of, and the bytes a backward pass takes for each padded token.

        Args:
            batch: a dict of batched tensors that stands for all.
        """
        parameters = {name: (info.shape, info.dtype) for name, info in self.parameters.items()}
        names = self.factorable
        if not names:
            return shapes_of_batch(parameters, {}), 0.0
        saved = SavedBytes(self.model)
        with saved.counting():
            factors = self.rows(batch, {}, names).factors
        return shapes_of_batch(parameters, factors), saved.peak / padded_tokens(batch)

    def guard(
        self,
        batch: Mapping[str, Any],
        out: Mapping[str, Tensor],
        factors: Mapping[str, Sequence[FactorPair]] | None = None,
        names: Collection[str] = (),
    ) -> dict[str, float]:
        """Compare the sum of the rows of `batch` with its ordinary gradient (one plain backward pass).

        Args:
            batch: a dict of batched tensors, B samples.
            out: their rows; parameters that are in neither `out` nor `factors` are not compared.
            factors: of further parameters, as `rows` returned them.
            names: further parameters of which the ordinary gradient is taken all the same: with sharded weights, where
                all ranks take the same pass and one of them compares.

        Returns:
            Parameter -> relative difference, to be compared with `guard_tolerance`. A difference that is within the
            rounding of the whole gradient is scaled to lie below it.
        """
        batch, n_samples = self._ready(batch)
        factors = factors or {}
        wanted = {*out, *factors, *names}
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in wanted}
        comparison = Comparison(self, {name: values[:n_samples] for name, values in out.items()}, factors)

        def take(name: str, grad: Tensor | None) -> None:
            if name in out or name in factors:
                comparison.take(name, grad)

        self.plain.each_gradient(batch, tensors, take)
        return comparison.differences()

    @property
    def one_gradient_at_a_time(self) -> bool:
        """Whether `guard` holds the ordinary gradient of one parameter only; not if weights are elsewhere."""
        return not any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in self.tensors.values())

    def loss_alone(self, sample: Mapping[str, Any]) -> float:
        """Return the loss of a batch of one, taken as the probe found right."""
        return self.plain.loss_alone(self._prepared(sample))

    def guard_alone(
        self, sample: Mapping[str, Any], rows: Mapping[str, Tensor], factors: Mapping[str, Sequence[FactorPair]]
    ) -> dict[str, float]:
        """Compare the gradient of one sample with what `rows` gave for it in a larger batch: see `guard`.

        Args:
            sample: a batch of one.
            rows: (1, P_k) of each parameter that is held as rows.
            factors: of one sample, of the others.
        """
        comparison = Comparison(self, rows, factors)
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in rows or name in factors}
        alone, place = self.plain.sample(self._prepared(sample), 0)
        self.plain.each_gradient(alone, tensors, comparison.take, place)
        return comparison.differences()
