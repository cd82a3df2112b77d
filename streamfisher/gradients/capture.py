"""Hooks: a module's inputs and its output gradient meet in the backward pass and become rows at once.

A forward hook passes the module's outputs through `_Capture`, an autograd function that changes nothing: its backward
sees the output gradients beside the saved inputs, hands both to the rules, and passes the gradients on. Three things
follow from using a function instead of a tensor hook with a closure: outputs require grad although every parameter is
frozen (an empty anchor tensor makes them), so no weight gradient is ever computed and the graph starts at the lowest
captured module; later in-place operations on the output are legal; and the saved inputs go through autograd's saved
tensors, so that gradient checkpointing and offloading drop and restore them like any other activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from streamfisher.errors import CaptureError, first_line
from streamfisher.gradients.batch_axis import as_batch
from streamfisher.gradients.generic import kinds_fit, kinds_of, per_sample_vjp, tensor_leaves
from streamfisher.gradients.groups import GENERIC, Group, Pass
from streamfisher.gradients.rules import rule_named


class _Capture(torch.autograd.Function):
    """The identity; its backward hands saved inputs and output gradients to the rules."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: _Call, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.saved)
        call.saved = ()
        ctx.call = call
        # `.data` shares the memory without being a view, so that the model may go on to write into it.
        return tuple(
            output.data.expand(size, *output.shape[1:]) if size else output.data
            for output, size in zip(outputs, call.expand, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call = ctx.call
        call.consume(ctx.saved_tensors, grads)
        passed = [
            grad.sum(0, keepdim=True) if size and grad is not None else grad
            for grad, size in zip(grads, call.expand, strict=True)
        ]
        return (None, None, *passed)


@dataclass
class _Call:
    """One call of a watched module, on its way from the forward to the backward pass."""

    site: Site
    state: Pass
    saved: tuple[Tensor, ...]
    expand: list[int]  # per output: the number of samples to expand its first axis to, or 0
    parts: list[tuple[Group, Any, slice]]  # group, how to read its tensors, where they are in `saved`

    def consume(self, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        if all(grad is None for grad in grads):
            return
        for group, how, where in self.parts:
            if not self.state.learning:
                self.site.write(group, how, saved[where], grads, self.state)
                continue
            # While probing, a formula that cannot even be evaluated is an answer: another one is tried.
            try:
                self.site.write(group, how, saved[where], grads, self.state)
            except Exception as error:  # whatever a module's own code raises under vmap
                reason = f"{group.rule}: {first_line(error)}"
                self.state.failed.update(dict.fromkeys(group.names.values(), reason))


class Site:
    """A watched module and the groups of parameters that are served from it."""

    def __init__(self, capture: Capture, name: str, module: nn.Module, groups: Sequence[Group]) -> None:
        self.capture, self.name, self.module, self.groups = capture, name, module, list(groups)
        self.served = [parameter for group in groups for parameter in group.names.values()]
        self.handles = [
            module.register_forward_pre_hook(self._enter, prepend=True),
            module.register_forward_hook(self._hook, with_kwargs=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        state = self.capture.current
        if state is not None and state.watch is not None:
            state.watch.enter(self.served)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        state = self.capture.current
        if state is not None and state.watch is not None:
            state.watch.leave(self.served)

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        state = self.capture.current
        if state is None or not torch.is_grad_enabled():
            return None
        leaves, spec = pytree.tree_flatten(output)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        outputs = [leaves[i] for i in where]
        saved: list[Tensor] = []
        parts: list[tuple[Group, Any, slice]] = []
        for group in self.groups:
            if not any(map(state.sink.wants, group.names.values())):
                continue  # so that the graph starts at the lowest module that this pass captures
            plan = self._plan(group, args, kwargs, outputs, state)
            if plan is None:
                state.deferred.update(group.names.values())
                continue
            how, tensors = plan
            parts.append((group, how, slice(len(saved), len(saved) + len(tensors))))
            saved.extend(tensor.detach() for tensor in tensors)
        if not parts:
            return None
        n = state.n_samples
        expand = [n if n > 1 and any(_is_single(how, i) for _, how, _ in parts) else 0 for i in range(len(outputs))]
        captured = _Capture.apply(
            self.capture.anchor(outputs[0].device), _Call(self, state, tuple(saved), expand, parts), *outputs
        )
        for i, tensor in zip(where, captured, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, spec)

    def _plan(
        self, group: Group, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], state: Pass
    ) -> tuple[Any, list[Tensor]] | None:
        """Return how to read the tensors of this call and which to save, or None where it cannot be told."""
        main = next((y for y in outputs if y.dim()), None)  # beside it, a model may return a scalar loss
        if main is None:
            return None
        layout = group.layout_of(main.shape, state)
        if layout is None:
            return None
        if group.rule not in GENERIC:
            needs = rule_named(group.rule).needs_input.intersection(group.names)
            if not needs:
                return layout, []
            x = args[0] if args else next(iter(kwargs.values()), None)
            return (layout, [x]) if isinstance(x, Tensor) else None
        tensors, rebuild = tensor_leaves((args, kwargs))
        shapes = [t.shape for t in tensors] + [y.shape for y in outputs]
        signature = ",".join(str(len(shape)) for shape in shapes) + f"|{layout}"
        kinds = group.known.get(signature)
        if kinds is None and state.learning:
            kinds = list(kinds_of(shapes, layout, state.n_samples, main.shape[0] // state.n_samples))
            if not group.expands:
                kinds = kinds[: len(tensors)] + [k.replace("single", "shared") for k in kinds[len(tensors) :]]
            group.known[signature] = kinds
        if kinds is None or not kinds_fit(shapes, tuple(kinds), state.n_samples):
            return None
        return (rebuild, tuple(kinds[: len(tensors)]), tuple(kinds[len(tensors) :])), tensors

    def write(
        self, group: Group, how: Any, saved: Sequence[Tensor], grads: Sequence[Tensor | None], state: Pass
    ) -> None:
        """Turn one call's saved inputs and output gradients into rows (or factors) of a group's parameters."""
        n_samples = state.n_samples
        if group.rule not in GENERIC:
            grad = grads[0]  # a module with a closed formula has one output
            assert grad is not None, "nothing is written of a call without gradients"
            d = as_batch(grad, how, n_samples)
            x = as_batch(saved[0], how, n_samples) if saved else d
            wanted = {attribute: name for attribute, name in group.names.items() if state.sink.wants(name)}
            if wanted:
                rule_named(group.rule).write(self.module, x, d, wanted, state.sink)
            return
        names = [name for name, parameter in group.names.items() if parameter in state.sink.rows]
        if not names:
            return
        rebuild, input_kinds, output_kinds = how
        with self.capture.suspended():
            rows = per_sample_vjp(
                self.module,
                names,
                saved,
                input_kinds,
                rebuild,
                grads,
                output_kinds,
                n_samples,
                GENERIC[group.rule],
            )
        for name, value in rows.items():
            state.sink.add(group.names[name], value)


def _is_single(how: Any, output: int) -> bool:
    """Return whether a call is read with this output shared by all samples, `(1, ...)`."""
    return how == "single" if isinstance(how, str) else how[2][output] == "single"


class Capture:
    """All hooks on a model, and the pass that they currently serve (none: they do nothing)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.current: Pass | None = None
        self.sites: list[Site] = []
        self._anchors: dict[torch.device, Tensor] = {}

    def anchor(self, device: torch.device) -> Tensor:
        """Return an empty tensor that requires grad: through it, outputs require grad while parameters do not."""
        if device not in self._anchors:
            self._anchors[device] = torch.zeros(0, device=device, requires_grad=True)
        return self._anchors[device]

    def install(self, groups: Sequence[Group]) -> None:
        """Watch the modules that `groups` name, instead of any watched before.

        Raises:
            CaptureError: a group names a module that the model does not have.
        """
        self.remove()
        modules = dict(self.model.named_modules())
        by_site: dict[str, list[Group]] = {}
        for group in groups:
            by_site.setdefault(group.site, []).append(group)
        for name, members in by_site.items():
            if name not in modules:
                raise CaptureError(f"The stored routing names module {name!r}, which this model does not have.")
            self.sites.append(Site(self, name, modules[name], members))

    def remove(self) -> None:
        """Take every hook off."""
        for site in self.sites:
            for handle in site.handles:
                handle.remove()
        self.sites = []

    def suspended(self) -> _Serving:
        """Return a context in which the hooks do nothing."""
        return _Serving(self, None)

    def serving(self, state: Pass) -> _Serving:
        """Return a context in which the hooks serve `state`."""
        return _Serving(self, state)


class _Serving:
    def __init__(self, capture: Capture, state: Pass | None) -> None:
        self.capture, self.state = capture, state

    def __enter__(self) -> None:
        self.before, self.capture.current = self.capture.current, self.state

    def __exit__(self, *exc: object) -> None:
        self.capture.current = self.before
