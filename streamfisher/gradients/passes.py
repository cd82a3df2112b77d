"""Passes of a model over a batch: forward and backward, with hooks that form per-sample gradients on the way."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from streamfisher.config import dtype_name
from streamfisher.errors import CaptureError
from streamfisher.gradients.batch_axis import position_counts
from streamfisher.gradients.batch_rows import RowSink
from streamfisher.gradients.capture import Capture
from streamfisher.gradients.factors import FactorPair, matrix_shape
from streamfisher.gradients.groups import GENERIC, Group, Pass
from streamfisher.gradients.parameters import ParameterInfo, select_parameters
from streamfisher.gradients.plain import PlainAutograd, copies
from streamfisher.gradients.producer import BatchGradients
from streamfisher.gradients.rules import rule_named
from streamfisher.gradients.shared_forward import SharedInputs, backward_of_shared
from streamfisher.gradients.state import (
    as_it_was,
    inputs_of_checkpoints,
    notes_on,
    prepare_recurrent,
    without_fast_paths,
    without_packing,
    without_parameter_hooks,
)
from streamfisher.gradients.tolerance import FLOOR, TOLERANCE
from streamfisher.gradients.uses import UseWatch, nonzero
from streamfisher.models.calling import batch_size, sample_of
from streamfisher.models.kept_tensors import KeptTensors
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.offload import working_device

if TYPE_CHECKING:
    from streamfisher.gradients.probe_report import ProbeReport
    from streamfisher.gradients.projection import Projection, Sides

#: Where they are used on the way of float32 parameters, a rule is right up to their rounding.
_HALVES = frozenset({torch.float16, torch.bfloat16})


class GradientPasses:
    """The passes of a `GradientEngine`, which adds the probe and the guard and says what the arguments are.

    Raises:
        ModelError: nothing can be captured, see `select_parameters`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: PerSampleLoss,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        dtype_compute: torch.dtype = torch.float32,
        deterministic: bool = False,
    ) -> None:
        self.model = getattr(model, "_orig_mod", model)
        self._given = model
        self.loss = loss
        self.deterministic = deterministic
        selection = select_parameters(self.model, include, exclude)
        self.tensors = selection.tensors
        self.slots = selection.slots
        self.parameters: dict[str, ParameterInfo] = selection.infos
        self.excluded: dict[str, str] = selection.excluded
        self.left_out = {
            name: p for name, p in self.model.named_parameters() if name in selection.excluded and p.requires_grad
        }
        self.row_dtype = dtype_compute
        for parameter in self.tensors.values():
            self.row_dtype = torch.promote_types(self.row_dtype, parameter.dtype)
        self.capture = Capture(self.model)
        self._kept = KeptTensors(self.model)
        self.plain = PlainAutograd(self.model, loss, self.capture, self.slots, self._kept)
        self.projection: Projection | None = None  # serves buffers that are as narrow as it makes a row
        self.notes: tuple[str, ...] = ()  # what is done otherwise than the model would by itself
        self.arithmetic: frozenset[torch.dtype] = frozenset()  # dtypes in which the model computes
        self.noise = 0.0  # by how much plain autograd differs between a sample in a batch and alone
        self._groups: list[Group] | None = None
        self._per_sample: tuple[str, ...] = ()
        self._unproved: frozenset[str] = frozenset()  # parameters whose gradient no probed sample showed
        self._undo: contextlib.ExitStack | None = None

    @property
    def device(self) -> torch.device:
        """The device of the first captured parameter, where rows are formed."""
        return working_device(self.model, *next(iter(self.tensors.items())))

    @property
    def tolerance(self) -> float:
        """Norm-relative error that counts as agreement, by the coarsest dtype in play and the model's own rounding."""
        return max(TOLERANCE[self._coarsest()], 10.0 * self.noise)

    @property
    def floor(self) -> float:
        """Share of the whole gradient's norm below which a difference is rounding."""
        return FLOOR[self._coarsest()]

    @property
    def guard_tolerance(self) -> float:
        """As `tolerance`, for sums over a batch: where only part of a float64 model is float32, they agree to that."""
        return max(self.tolerance, *(TOLERANCE[dtype] for dtype in self.arithmetic), 0.0)

    @property
    def guard_floor(self) -> float:
        """As `floor`, for sums over a batch."""
        return max(self.floor, *(FLOOR[dtype] for dtype in self.arithmetic), 0.0)

    @property
    def factorable(self) -> tuple[str, ...]:
        """Parameters whose gradients are products of two factors at every place where they are used."""
        modules = dict(self.model.named_modules())
        served: dict[str, bool] = {}
        for group in self._groups or []:
            for attribute, name in group.names.items():
                by_product = attribute == "weight" and group.rule not in GENERIC
                good = by_product and rule_named(group.rule).factors(modules[group.site])
                served[name] = served.get(name, True) and good
        return tuple(name for name in self.parameters if served.get(name) and name not in self._per_sample)

    def __enter__(self) -> Self:
        if self._undo is not None:
            raise CaptureError("This GradientEngine is already in use. Make another one, or leave the first.")
        self.notes = notes_on(self._given)
        with contextlib.ExitStack() as stack:
            stack.enter_context(as_it_was(self.model))
            stack.enter_context(without_parameter_hooks(self.model))
            stack.callback(self.capture.remove)
            stack.enter_context(without_fast_paths(self.model))
            stack.enter_context(without_packing(self.model))
            if self.deterministic:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            self.model.eval()
            stack.enter_context(self._kept.held())
            prepare_recurrent(self.model, self.device)
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
            if self._groups is not None:
                self.capture.install(self._groups)
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def use_groups(
        self,
        groups: Sequence[Group],
        per_sample: Mapping[str, str] | Sequence[str],
        unproved: Collection[str] = (),
    ) -> None:
        """Serve parameters by `groups`, and those in `per_sample` by a pass per sample.

        Parameters in `unproved` take a pass per sample in every batch where their gradient is not zero: rules agree on
        zeros whether they are right or wrong.
        """
        self._groups = list(groups)
        self._unproved = frozenset(unproved)
        self._per_sample = tuple(name for name in self.parameters if name in per_sample)
        if self._undo is not None:
            self.capture.install(self._groups)

    def allocate(
        self, n_rows: int, names: Collection[str] | None = None, columns: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Return buffers `(n_rows, P_k)` in `row_dtype` on each parameter's device, to be reused for every batch.

        Args:
            n_rows: rows of each buffer.
            names: of which parameters; `None` means all.
            columns: numbers of a row of parameters that are to be projected.
        """
        widths = {name: p.numel() for name, p in self.tensors.items()} | dict(columns or {})
        return {
            name: torch.zeros(n_rows, widths[name], dtype=self.row_dtype, device=working_device(self.model, name, p))
            for name, p in self.tensors.items()
            if names is None or name in names
        }

    def projected(self, out: Mapping[str, Tensor]) -> dict[str, Sides]:
        """Return the projections of those parameters whose buffers are as narrow as a projected row."""
        if self.projection is None:
            return {}
        return {
            name: self.projection.sides(name, rows.device, rows.dtype)
            for name, rows in out.items()
            if rows.shape[1] == self.projection.columns.get(name)
        }

    def rows(
        self,
        batch: Mapping[str, Any],
        out: Mapping[str, Tensor],
        factored: Collection[str] = (),
        shared: SharedInputs | None = None,
    ) -> BatchGradients:
        """Fill `out[name][:B]` with the gradient of each sample's loss, or return its factors.

        Args:
            batch: a dict of batched tensors, B samples.
            out: as from `allocate`, with at least B rows; row slices of larger buffers will do. Where a buffer is
                as narrow as `projection` makes a row, the row is projected. Parameters that are neither in `out` nor
                in `factored` are not formed, and the backward pass stops at the lowest that is.
            factored: parameters, of those in `factorable`, of which the factors are returned instead.
            shared: which samples are of one input and differ in their labels only.

        Raises:
            LossError: the loss has the wrong shape, or a sample has no target.
            CaptureError: the engine was not entered and probed, or a parameter of `factored` is not factorable.
        """
        batch, _ = self._ready(batch)
        names = [name for name in self.parameters if name in out or name in factored]
        wrong = [name for name in names if name in factored and name in self._per_sample]
        if wrong:
            raise CaptureError(f"{', '.join(wrong[:5])} take a pass per sample and have no factors.")
        fast = [name for name in names if name not in self._per_sample]
        if batch_size(batch) == 1 and self.plain.changes(batch):
            fast = []  # this model is not to be trusted with it
        losses, pending, factors = self._captured(batch, out, fast, factored, shared)
        slow = [name for name in names if name not in fast or name in pending]
        if slow or losses is None:
            rows = {name: out[name] if name in out else self._row_buffer(name, batch) for name in slow}
            tensors = {name: self.tensors[name] for name in slow}
            losses = self.plain.one_by_one(batch, rows, tensors, self.projected(rows))
            factors |= {name: [self._as_factors(name, rows[name])] for name in slow if name in factored}
        n_samples = batch_size(batch)
        filled = {name: values[:n_samples] for name, values in out.items()}
        return BatchGradients(losses.detach().double().cpu(), self.loss.n_targets(batch).cpu(), factors, filled)

    def _row_buffer(self, name: str, batch: Mapping[str, Any]) -> Tensor:
        parameter = self.tensors[name]
        return torch.zeros(batch_size(batch), parameter.numel(), dtype=self.row_dtype, device=self.device)

    def _as_factors(self, name: str, rows: Tensor) -> FactorPair:
        """Return rows (B, m n) as a product with the identity, for a batch whose layout the probe never saw."""
        values = rows.unflatten(1, matrix_shape(self.parameters[name].shape))
        ids = torch.arange(values.shape[1], device=rows.device).expand(values.shape[:2])
        return FactorPair(ids, values)

    def plain_gradients(
        self,
        batch: Mapping[str, Any],
        *,
        index: int | None = None,
        names: Collection[str] | None = None,
        left_out: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the loss and the flat gradients of plain autograd, without hooks.

        Args:
            batch: a dict of batched tensors.
            index: the sample whose loss to differentiate; None: the sum.
            names: of which captured parameters; `None` means all.
            left_out: also of trainable parameters that are not captured.
        """
        tensors = {name: tensor for name, tensor in self.tensors.items() if names is None or name in names}
        tensors |= self.left_out if left_out else {}
        return self.plain.gradients(batch, tensors, index)

    def gradients_alone(
        self, batch: Mapping[str, Any], index: int, *, names: Collection[str] | None = None, left_out: bool = False
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return what `plain_gradients` gives of one sample of a batch alone, taken as the probe found right."""
        sample, place = self.plain.sample(self._prepared(batch), index)
        return self.plain_gradients(sample, index=place, names=names, left_out=left_out)

    def gradients_among_copies(
        self, batch: Mapping[str, Any], index: int, count: int, names: Collection[str]
    ) -> dict[str, Tensor | None]:
        """Return the gradient of one sample of a batch in another one, of so many copies of it."""
        sample = sample_of(self._prepared(batch), index)
        return self.plain_gradients(copies(sample, count), index=0, names=names)[1]

    def see_arithmetic(self, batch: Mapping[str, Any]) -> None:
        """Note in which dtypes the model computes, whatever that of its parameters is."""
        seen = self.plain.saved_dtypes(batch, self.tensors.values())
        self.arithmetic = frozenset(seen & TOLERANCE.keys())

    def use_precision(self, report: ProbeReport) -> None:
        """Compare as the probe did that gave this report."""
        self.noise = report.tolerance / 10.0
        self.arithmetic = frozenset(dtype for dtype in TOLERANCE if dtype_name(dtype) in report.arithmetic)
        self.plain.alone = report.alone

    def learning_pass(
        self, batch: Mapping[str, Any], out: Mapping[str, Tensor], names: Sequence[str]
    ) -> dict[str, str]:
        """Fill `out` with the installed groups, recording layouts; return parameter -> reason for what failed."""
        state = self._pass(batch, out, names, learning=True)
        self._backward(batch, state)
        unclear = dict.fromkeys(state.deferred, "the batch axis cannot be found")
        return {**unclear, **state.failed}

    def _pass(
        self,
        batch: Mapping[str, Any],
        out: Mapping[str, Tensor],
        names: Sequence[str],
        factored: Collection[str] = (),
        **options: Any,
    ) -> Pass:
        n_samples = batch_size(batch)
        shapes = {name: self.parameters[name].shape for name in names}
        served = {name: out[name] for name in names if name in out}
        sink = RowSink(out, n_samples, shapes, factored, self.projected(served))
        return Pass(sink, position_counts(batch, n_samples), **options)

    def _backward(self, batch: Mapping[str, Any], state: Pass) -> Tensor:
        """Run one forward and backward pass that serves `state`; return the losses."""
        checkpoints = inputs_of_checkpoints(self.model, self.capture)
        with self.capture.serving(state), torch.enable_grad(), checkpoints, warnings.catch_warnings():
            # vmap says so where it falls back to a loop over one operator: right, and no news to the user.
            warnings.filterwarnings("ignore", message=".*not yet implemented the batching rule.*")
            self._kept.forget()
            losses = self.loss(self.model, batch)
            if losses.requires_grad:
                losses.sum().backward()
        state.sink.finish()
        return losses.detach()

    def _captured(
        self,
        batch: Mapping[str, Any],
        out: Mapping[str, Tensor],
        names: Sequence[str],
        factored: Collection[str],
        shared: SharedInputs | None,
    ) -> tuple[Tensor | None, set[str], dict[str, list[FactorPair]]]:
        """Form the gradients of `names` in one pass; return losses, parameters not understood, and factors."""
        if self.loss.sequential or not names:
            return None, set(), {}
        if shared is not None and not self._unproved.intersection(names) and shared.worthwhile(batch):
            return self._captured_by_input(batch, out, names, factored, shared)
        watch = UseWatch({name: self.tensors[name] for name in names}, self._unproved)
        state = self._pass(batch, out, names, factored, watch=watch)
        with watch.watching():
            losses = self._backward(batch, state)
        return losses, state.deferred | self._left_out_by_rules(batch, state, watch), state.sink.factors

    def _captured_by_input(
        self,
        batch: Mapping[str, Any],
        out: Mapping[str, Tensor],
        names: Sequence[str],
        factored: Collection[str],
        shared: SharedInputs,
    ) -> tuple[Tensor, set[str], dict[str, list[FactorPair]]]:
        """As `_captured`, by one forward pass of the inputs that samples share."""
        watch = UseWatch({name: self.tensors[name] for name in names})
        self._kept.forget()
        with watch.watching():
            sink = self._pass(batch, out, names, factored).sink
            losses, deferred, factors = backward_of_shared(
                self.capture, self.loss, batch, shared, sink, factored, watch
            )
        return losses, deferred | self._not_zero(batch, watch, {}), factors

    def _left_out_by_rules(self, batch: Mapping[str, Any], state: Pass, watch: UseWatch) -> set[str]:
        """Return parameters of which the rules did not give the whole gradient, or gave one that nothing proves."""
        return self._not_zero(batch, watch, state.sink.formed(self._unproved))

    def _not_zero(self, batch: Mapping[str, Any], watch: UseWatch, rows: Mapping[str, Tensor]) -> set[str]:
        wrong = nonzero(rows) | nonzero(watch.grads)
        # A sum of zero may be one of gradients that cancel, but not with other weights.
        unclear = watch.grads.keys() - wrong - rows.keys()
        if unclear and batch_size(batch) > 1:
            weights = torch.arange(2, batch_size(batch) + 2).sqrt()
            _, grads = self.plain.gradients(batch, {n: self.tensors[n] for n in sorted(unclear)}, weights=weights)
            wrong |= nonzero({name: grad for name, grad in grads.items() if grad is not None})
        return wrong

    def _prepared(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value.detach().to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()
        }

    def _ready(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        self._check_entered()
        if self._groups is None:
            raise CaptureError("Call probe (or apply_routes) before taking gradients: no rule is used unverified.")
        batch = self._prepared(batch)
        return batch, batch_size(batch)

    def _check_entered(self) -> None:
        if self._undo is None:
            raise CaptureError("Use the GradientEngine in a with statement, which restores the model at its end.")

    @cached_property
    def _model_dtypes(self) -> frozenset[torch.dtype]:
        return frozenset(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def _coarsest(self) -> torch.dtype:
        dtypes = {*self._model_dtypes, *(self.arithmetic & _HALVES)}
        if torch.is_autocast_enabled(self.device.type):
            dtypes.add(torch.get_autocast_dtype(self.device.type))
        known = [dtype for dtype in dtypes if dtype in TOLERANCE]
        return max(known, key=TOLERANCE.__getitem__, default=torch.float32)
