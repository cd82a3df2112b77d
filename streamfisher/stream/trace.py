"""Tracing one batch: which layers are called in which order, and where each of their arguments comes from.

Every leaf of a layer's arguments gets a key. `("in", k, i)` was made by the model's own code on the way to call k (a
mask, an embedded text); `("out", k, i)` was returned by call k. An argument that is the very object that an earlier
call got or returned has that call's key, so that between most layers nothing but a hidden state is new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from streamfisher.errors import StreamError
from streamfisher.gradients.tolerance import TOLERANCE
from streamfisher.models.calling import batch_size
from streamfisher.models.losses import PerSampleLoss
from streamfisher.stream.shell import Shell

Key = tuple[str, int, int]  # 'in' or 'out', number of the call, number of the leaf


@dataclass(frozen=True)
class Call:
    """One call of a layer."""

    module: str
    sources: tuple[Key, ...]  # of each leaf of (args, kwargs)
    spec: pytree.TreeSpec  # of (args, kwargs)
    outputs: tuple[Key, ...]  # of each leaf that is returned; an argument that is handed through keeps its key
    out_spec: pytree.TreeSpec


@dataclass
class Trace:
    """What one batch showed, and everything that was met on the way."""

    calls: list[Call] = field(default_factory=list)
    values: dict[Key, Any] = field(default_factory=dict)  # detached tensors, and what is no tensor
    carrying: set[Key] = field(default_factory=set)  # tensors whose gradient is needed
    batched: set[Key] = field(default_factory=set)  # tensors whose first axis is the batch
    fixed: set[Key] = field(default_factory=set)  # tensors whose first axis is neither the batch nor 1
    # Of the model's own code before call k (len(calls): after the last one):
    parameters: dict[int, set[str]] = field(default_factory=dict)  # captured ones that its outputs depend on
    reads: dict[int, set[Key]] = field(default_factory=dict)  # layers' outputs that it reads
    losses: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,), once the batch went through

    def fresh(self, k: int) -> list[Key]:
        """Return the keys of what the model's code made for call k."""
        return [key for key in dict.fromkeys(self.calls[k].sources) if key[:2] == ("in", k)]

    @property
    def glue(self) -> list[int]:
        """Calls before which the model's own code makes something that the layers get."""
        return [k for k in range(len(self.calls)) if self.fresh(k)]


def trace_stack(
    shell: Shell,
    loss: PerSampleLoss,
    batch: Mapping[str, Any],
    *,
    ids: Mapping[int, str],
    trainable: Callable[[str], bool],
    held: Callable[[str], AbstractContextManager[None]],
    upcoming: Callable[[str], None],
    visit: Callable[[Trace, int], None],
) -> Trace:
    """Run `loss` on `batch` once and return the trace.

    Args:
        shell: entered; parameters around the layers require grad where they are captured.
        loss: the run's loss.
        batch: a dict of batched tensors, whose number of samples is no other axis' size.
        ids: id of each captured parameter of the code around the layers -> its name.
        trainable: whether a layer of this name has captured parameters.
        held: a context in which the weights of the layer of this name are in memory.
        upcoming: told which layer probably comes next.
        visit: called after each call, while its weights are held.

    Raises:
        StreamError: the model is no stack of layers that can be replayed; the message says why.
    """
    recorder = _Recorder(shell, batch_size(batch), ids, trainable, held, upcoming, visit)
    with shell.handled_by(recorder.called), torch.enable_grad():
        losses = loss(shell.model, batch)
    trace = recorder.trace
    if not trace.calls:
        raise StreamError(
            f"{type(shell.model).__name__} calls no member of a ModuleList, so there are no layers to stream."
        )
    trace.losses = losses.detach()
    recorder.note_glue(len(trace.calls), [losses])
    return trace


class _Recorder:
    """Handles the calls of the placeholders by running the layers, and takes notes."""

    def __init__(
        self,
        shell: Shell,
        n_samples: int,
        ids: Mapping[int, str],
        trainable: Callable[[str], bool],
        held: Callable[[str], AbstractContextManager[None]],
        upcoming: Callable[[str], None],
        visit: Callable[[Trace, int], None],
    ) -> None:
        self.shell, self.n_samples, self.ids, self.trainable = shell, n_samples, ids, trainable
        self.held, self.upcoming, self.visit = held, upcoming, visit
        self.following = dict(zip(shell.layers, list(shell.layers)[1:], strict=False))
        self.trace = Trace()
        self.known: dict[int, tuple[Key, Tensor, int]] = {}  # id -> key, the tensor (kept alive), its version
        self.frames: dict[int, list[Any]] = {}  # call -> leaves of its arguments
        self.busy = ""

    def called(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.busy:
            raise StreamError(f"layer {name} is called from within layer {self.busy}, so layers are not a sequence.")
        trace, k = self.trace, len(self.trace.calls)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        frame = self._frame_of(leaves, spec)
        sources: list[Key] = []
        for i, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                key = ("in", k if frame is None else frame, i)
                trace.values[key] = leaf
            elif (found := self.known.get(id(leaf))) is not None and found[2] == leaf._version:
                key = found[0]
            else:
                key = ("in", k, i)
                self.note_glue(k, [leaf])
                self._note(key, leaf, leaf.requires_grad)
            sources.append(key)
        if frame is None:
            self.frames[k] = leaves
        carries = self.trainable(name) or any(key in trace.carrying for key in sources)
        detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        with self.held(name):
            if name in self.following:
                self.upcoming(self.following[name])
            outputs, out_spec, handed = self._run(name, detached, spec)
            returned, keys = self._returned(outputs, handed, leaves, sources, carries)
            trace.calls.append(Call(name, tuple(sources), spec, keys, out_spec))
            self.visit(trace, k)
        return pytree.tree_unflatten(returned, out_spec)

    def _returned(
        self, outputs: list[Any], handed: dict[int, int], leaves: list[Any], sources: list[Key], carries: bool
    ) -> tuple[list[Any], tuple[Key, ...]]:
        """Return what a layer's outputs are for the code around it, and their keys."""
        k = len(self.trace.calls)
        keys: list[Key] = []
        returned: list[Any] = []
        for j, leaf in enumerate(outputs):
            if isinstance(leaf, Tensor) and id(leaf) in handed:  # what came in goes out
                i = handed[id(leaf)]
                keys.append(sources[i])
                returned.append(leaves[i])
                continue
            key = ("out", k, j)
            if isinstance(leaf, Tensor):
                leaf = leaf.detach().requires_grad_(carries and leaf.is_floating_point())
                self._note(key, leaf, leaf.requires_grad)
            else:
                self.trace.values[key] = leaf
            keys.append(key)
            returned.append(leaf)
        return returned, tuple(keys)

    def _run(
        self, name: str, leaves: list[Any], spec: pytree.TreeSpec
    ) -> tuple[list[Any], pytree.TreeSpec, dict[int, int]]:
        """Run a layer twice; return what it returns, its structure, and which leaves are arguments handed through."""
        handed = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        versions = [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        self.busy = name
        try:
            with torch.no_grad():
                result = self.shell.layers[name](*args, **kwargs)
                again = self.shell.layers[name](*args, **kwargs)
        finally:
            self.busy = ""
        changed = [i for i, v in enumerate(versions) if isinstance(leaves[i], Tensor) and leaves[i]._version != v]
        if changed:
            raise StreamError(f"layer {name} changes its argument {changed[0]} in place, so it cannot be replayed.")
        outputs, out_spec = pytree.tree_flatten(result)
        for one, other in zip(outputs, pytree.tree_leaves(again), strict=True):
            if isinstance(one, Tensor) and not agree(one, other):
                raise StreamError(
                    f"layer {name} gives another output when it is replayed on the same input: dropout is on, or its "
                    "routing is random. Make it deterministic in eval mode."
                )
        return outputs, out_spec, handed

    def _frame_of(self, leaves: list[Any], spec: pytree.TreeSpec) -> int | None:
        """Return the latest call whose arguments had this structure and the same values besides tensors."""
        for k in sorted(self.frames, reverse=True):
            if self.trace.calls[k].spec == spec and all(map(same_value, leaves, self.frames[k])):
                return k
        return None

    def _note(self, key: Key, tensor: Tensor, carries: bool) -> None:
        trace = self.trace
        trace.values[key] = tensor.detach().clone()  # the model's own code may go on to write into it
        self.known[id(tensor)] = (key, tensor, tensor._version)
        if tensor.dim() and tensor.shape[0] == self.n_samples:
            trace.batched.add(key)
        elif not carries and tensor.dim() and tensor.shape[0] != 1:
            trace.fixed.add(key)
        elif carries and (tensor.dim() == 0 or tensor.shape[0] != 1):
            where = f"call {key[1]} of a layer {'gets' if key[0] == 'in' else 'returns'}"
            raise StreamError(
                f"{where} a tensor of shape {tuple(tensor.shape)} that carries gradient, and its first axis is not the "
                f"batch of {self.n_samples}."
            )
        if carries:
            trace.carrying.add(key)

    def note_glue(self, k: int, made: Iterable[Tensor]) -> None:
        """Note which parameters and which layers' outputs the tensors made before call k depend on."""
        leaves = leaves_reached(made)
        parameters = self.trace.parameters.setdefault(k, set())
        reads = self.trace.reads.setdefault(k, set())
        for leaf in leaves:
            if id(leaf) in self.known:
                reads.add(self.known[id(leaf)][0])
            elif id(leaf) in self.ids:
                parameters.add(self.ids[id(leaf)])


def same_value(one: Any, other: Any) -> bool:
    """Return whether two leaves are both tensors, or equal as far as that can be told without calling foreign code."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor)
    if one is other:
        return True
    plain = bool | int | float | str | torch.dtype | torch.device
    return type(one) is type(other) and isinstance(one, plain) and one == other


def agree(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal up to the rounding of their dtype."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    if bool(torch.equal(one, other)):
        return True
    one, other = one.nan_to_num(), other.nan_to_num()
    difference = float((one.double() - other.double()).norm())
    return difference <= 0.1 * TOLERANCE.get(one.dtype, 1e-4) * float(one.double().norm())


def leaves_reached(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the leaf tensors that require grad and that `tensors` were computed from."""
    found: dict[int, Tensor] = {}
    nodes: list[Any] = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            nodes.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found[id(tensor)] = tensor
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        nodes.extend(parent for parent, _ in node.next_functions if parent is not None)
    return list(found.values())
