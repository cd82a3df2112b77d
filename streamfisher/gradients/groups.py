"""Routing: which parameters one rule serves from one module, and where the samples are in what that module returns.

The probe tries groups and settles them; a run only reads them, so they can be stored and used again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamfisher.gradients.batch_axis import find_layout, is_ambiguous
from streamfisher.gradients.batch_rows import RowSink
from streamfisher.gradients.uses import UseWatch

GENERIC = {"generic": True, "generic_loop": False}  # rule name -> batched by vmap


@dataclass
class Pass:
    """One forward and backward pass of a batch."""

    sink: RowSink
    lengths: dict[str, int]  # see layout.position_counts
    watch: UseWatch | None = None  # of uses that no rule accounts for
    learning: bool = False  # the probe runs: layouts are tried and recorded, failures collected
    deferred: set[str] = field(default_factory=set)  # parameters that met a layout the probe never saw right
    failed: dict[str, str] = field(default_factory=dict)  # parameter -> reason, only while learning

    @property
    def n_samples(self) -> int:
        """B."""
        return self.sink.n_samples


@dataclass
class Group:
    """Parameters that one rule serves from one module's inputs and output gradients."""

    site: str  # name of the module that is watched
    rule: str  # a name in rules.RULES, or in GENERIC
    names: dict[str, str]  # name relative to the site -> parameter
    layouts: tuple[str, ...]  # tried in this order; after the probe, those that it saw right
    expands: bool = True  # whether outputs (1, ...) may be expanded over the batch
    used: set[str] = field(default_factory=set)  # layouts met while learning
    flat_keys: list[str] | None = None  # which lengths of the batch explain a flat layout
    flat_length: int | None = None  # ... or else its constant length
    known: dict[str, list[str]] = field(default_factory=dict)  # generic: signature of a call -> kinds of its tensors

    def layout_of(self, shape: Sequence[int], state: Pass) -> str | None:
        """Return the layout of an output of this shape, or None where it cannot be told."""
        if not state.learning and len(self.layouts) > 1 and self._is_ambiguous(tuple(shape), state):
            return None
        layout = find_layout(tuple(shape), state.n_samples, self.layouts)
        if layout == "flat" and not self._flat_is_safe(shape[0] // state.n_samples, state):
            return None
        if layout is not None and state.learning:
            self.used.add(layout)
        return layout

    def _is_ambiguous(self, shape: tuple[int, ...], state: Pass) -> bool:
        flat = bool(shape) and self._flat_is_safe(shape[0] // state.n_samples, state)
        used = self.layouts if flat else tuple(layout for layout in self.layouts if layout != "flat")
        return is_ambiguous(shape, state.n_samples, used)

    def _flat_is_safe(self, length: int, state: Pass) -> bool:
        if not state.learning:
            if self.flat_keys:
                return any(state.lengths.get(key) == length for key in self.flat_keys)
            return self.flat_length == length
        keys = [key for key, value in state.lengths.items() if value == length]
        if self.flat_length is None:
            self.flat_keys, self.flat_length = keys, length
        else:
            self.flat_keys = [key for key in self.flat_keys or [] if key in keys]
        # Experts see as many tokens as a router sends them: an even split between samples would be a coincidence.
        return bool(self.flat_keys) or (self.flat_length == length and "expert" not in self.site.lower())

    def settle(self) -> None:
        """Keep only what the probe saw."""
        self.layouts = tuple(layout for layout in self.layouts if layout in self.used)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "site": self.site,
            "rule": self.rule,
            "names": dict(self.names),
            "layouts": list(self.layouts),
            "expands": self.expands,
            "flat_keys": self.flat_keys,
            "flat_length": self.flat_length,
            "known": {key: list(value) for key, value in self.known.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Group:
        """Rebuild what `to_dict` returned."""
        return cls(**{**values, "layouts": tuple(values["layouts"]), "names": dict(values["names"])})
