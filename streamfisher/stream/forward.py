"""The forward stream: boundaries of all batches, layer by layer; and again, of those that are missing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from streamfisher.data.batches import BatchRef
from streamfisher.models.calling import batch_size
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.weights import AROUND, Resident
from streamfisher.stream.boundaries import MISSING, Boundaries
from streamfisher.stream.replay import Boundary, replay_batch, shell_loss, value_name
from streamfisher.stream.segments import Segment, Stack
from streamfisher.stream.shell import Shell
from streamfisher.stream.trace import Key

#: Batches of a run; whatever tells them apart (it is hashed, and names a folder) will do where there is no run.
Batches = Mapping[BatchRef, Mapping[str, Any]]


class ForwardStream:
    """Fills boundaries from below.

    Args:
        shell: of the model.
        stack: its segments.
        loss: the run's.
        weights: of the model.
        boundaries: to fill.
        device: where the model runs.
        keep_every: of the hidden states between layers, only every so-many-th is kept for good; the others are made
            again when the backward stream comes by.
    """

    def __init__(
        self,
        shell: Shell,
        stack: Stack,
        loss: PerSampleLoss,
        weights: Resident,
        boundaries: Boundaries,
        device: torch.device,
        keep_every: int = 1,
    ) -> None:
        self.shell, self.stack, self.loss, self.weights = shell, stack, loss, weights
        self.boundaries, self.device, self.keep_every = boundaries, device, keep_every
        self.after_batch: Callable[[], None] = lambda: None  # called when a batch went through a segment
        self.n_layer_passes = 0  # batches times segments run forward, repeated ones included
        self._wanted = stack.kept()
        self._read = set().union(*stack.reads.values())

    def run(self, batches: Batches, keys: Iterable[Key] | None = None) -> None:
        """Make what is missing, for all batches one segment after the other from the bottom up.

        Args:
            batches: by index.
            keys: what is needed; `None`: all that the layers and the code after them get.
        """
        layers = self.stack.layers
        everything = keys is None
        keys = list(self._wanted if keys is None else keys)
        todo: dict[
            tuple[int, int, int], dict[BatchRef, None]
        ] = {}  # when, segment (or -1), call of fresh arguments -> batches
        for index in batches:
            for event in self._needed(index, keys):
                todo.setdefault(event, {})[index] = None
        events = sorted(todo)
        for at, event in enumerate(events):
            _, position, k = event
            if position < 0:
                with self.shell, self.weights.held(AROUND):
                    for index in todo[event]:
                        self.make_fresh(index, batches[index], k)
                continue
            with self.weights.held(*layers[position].modules):
                following = next((p for _, p, _ in events[at + 1 : at + 2] if p >= 0), None)
                if following is not None:
                    self.weights.prefetch(*layers[following].modules)
                names = [value_name(key) for key in layers[position].inputs]
                for index, then in itertools.zip_longest(todo[event], list(todo[event])[1:]):
                    self.boundaries.prefetch(index, names)
                    if then is not None:
                        self.boundaries.prefetch(then, names)
                    self._through(index, batches[index], layers[position])
                    self.after_batch()
            if everything:
                self._thin(position, todo[event])

    def _needed(self, index: BatchRef, keys: Iterable[Key]) -> set[tuple[int, int, int]]:
        """Return what must be done, so that a batch has `keys`: (order, segment, -1) or (order, -1, call)."""
        layers = self.stack.layers
        found: set[tuple[int, int, int]] = set()
        seen: set[Key] = set()
        waiting = list(keys)
        while waiting:
            key = waiting.pop()
            if key in seen or self._has(index, key):
                continue
            seen.add(key)
            position = next(p for p, segment in enumerate(layers) if key[1] in segment.calls)
            start = 2 * layers[position].calls[0]
            if key[0] == "in":
                found.add((start, -1, key[1]))
                waiting.extend(self.stack.reads.get(key[1], ()))
            else:
                found.add((start + 1, position, -1))
                waiting.extend(layers[position].inputs)
        return found

    def value(self, index: BatchRef, key: Key, batch: Mapping[str, Any]) -> Any:
        """Return a boundary; what is missing or damaged is made again."""
        value = self.boundaries.get(index, value_name(key), self.device)
        if value is MISSING:
            self.run({index: batch}, [key])
            value = self.boundaries.get(index, value_name(key), self.device)
        return value

    def make_fresh(self, index: BatchRef, batch: Mapping[str, Any], k: int) -> None:
        """Record what the model's code makes for call k; its shell is open."""
        stack = self.stack
        with torch.no_grad():
            replayed = self.shell_batch(index, batch, (k,))
            loss, notes = shell_loss(self.shell, stack, self.loss, through=False, terms=(k,))
            loss(self.shell.model, replayed)
        for key in stack.trace.fresh(k):
            self.boundaries.put(index, value_name(key), notes[0].fresh[key])

    def shell_batch(self, index: BatchRef, batch: Mapping[str, Any], calls: Iterable[int]) -> dict[str, Any]:
        """Return the batch with which the shell is run.

        Args:
            index: of the batch.
            batch: a dict of batched tensors.
            calls: the code before these calls (`n_calls`: after the last one) gets what it reads; other outputs of
                layers are zeros.
        """
        stack, traced = self.stack, self.stack.trace.values
        needed = {key for k in calls for key in stack.reads.get(k, ())}
        values, shapes = {}, {}
        outs = [key for call in stack.trace.calls for key in call.outputs if key[0] == "out"]
        for key in outs:
            if not isinstance(traced[key], Tensor):
                values[key] = traced[key]
            elif key in needed:
                values[key] = self.value(index, key, batch)
            else:
                known = self.boundaries.shape(index, value_name(key))
                shapes[key] = known or (tuple(traced[key].shape), traced[key].dtype)
        return replay_batch(stack, outs, Boundary(values, {}, shapes), batch_size(batch), self.device, batch)

    def _through(self, index: BatchRef, batch: Mapping[str, Any], segment: Segment) -> None:
        """Run a segment's calls on one batch and record what others use."""
        stack = self.stack
        values = {key: self.value(index, key, batch) for key in segment.inputs}
        self.n_layer_passes += 1
        with torch.no_grad():
            for k in segment.calls:
                call = stack.trace.calls[k]
                args, kwargs = pytree.tree_unflatten([values[key] for key in call.sources], call.spec)
                returned = pytree.tree_leaves(self.shell.layers[call.module](*args, **kwargs))
                for key, leaf in zip(call.outputs, returned, strict=True):
                    values.setdefault(key, leaf)
                    if key[:2] != ("out", k) or not isinstance(leaf, Tensor):
                        continue
                    self.boundaries.note_shape(index, value_name(key), leaf)
                    if key in self._wanted:
                        self.boundaries.put(index, value_name(key), leaf)

    def _thin(self, position: int, indices: Iterable[BatchRef]) -> None:
        """Forget what this segment got, if it is not to be kept and nobody above needs it."""
        layers = self.stack.layers
        if self.keep_every == 1 or position == 0 or position % self.keep_every == 0:
            return
        later = {key for segment in layers[position + 1 :] for key in segment.inputs} | self._read
        for key in layers[position].inputs:
            if key[0] == "out" and key not in later:
                for index in indices:
                    self.boundaries.drop(index, value_name(key))

    def _has(self, index: BatchRef, key: Key) -> bool:
        if key[0] == "out" and not isinstance(self.stack.trace.values[key], Tensor):
            return True
        return self.boundaries.has(index, value_name(key))
