"""`SpectralConfig`: every knob of an analysis, from all sections, under flat names.

A field is either part of a run's *identity* (it changes stored gradients or Grams, so a run refuses to resume when it
differs) or it is not (it changes where and how fast, never what). `IDENTITY_FIELDS` is that list.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from streamfisher.config.option import dtype_name, option_of
from streamfisher.config.sections import (
    GradientOptions,
    ReductionOptions,
    ResourceOptions,
    SampleOptions,
    SolvingOptions,
    StorageOptions,
)
from streamfisher.errors import ConfigError

Section = TypeVar("Section")

_SECTIONS = (SampleOptions, GradientOptions, StorageOptions, ReductionOptions, SolvingOptions, ResourceOptions)


@dataclass(frozen=True, kw_only=True)
class SpectralConfig(ResourceOptions, SolvingOptions, ReductionOptions, StorageOptions, GradientOptions, SampleOptions):
    """How gradients are taken, held, multiplied and solved.

    Every option is a keyword: `SpectralConfig(seed=1, memory_budget="8GB")`. Options belong to sections, which
    `config.samples`, `.gradients`, `.storage`, `.reduction`, `.solving` and `.resources` give back.

    Raises:
        ConfigError: a field has a value that cannot be used; the message names the field and the value.
    """

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, option_of(item).check(item.name, getattr(self, item.name)))
        for section in _SECTIONS:
            section.check(self)

    @property
    def samples(self) -> SampleOptions:
        """What N counts, and what a sample's loss is."""
        return self._section(SampleOptions)

    @property
    def gradients(self) -> GradientOptions:
        """Whose gradients are taken, and how."""
        return self._section(GradientOptions)

    @property
    def storage(self) -> StorageOptions:
        """How gradients are held until they are reduced, and what stays of them."""
        return self._section(StorageOptions)

    @property
    def reduction(self) -> ReductionOptions:
        """How gradients are multiplied to Grams."""
        return self._section(ReductionOptions)

    @property
    def solving(self) -> SolvingOptions:
        """From Grams to eigenvalues."""
        return self._section(SolvingOptions)

    @property
    def resources(self) -> ResourceOptions:
        """With what: devices, memory, disk, workers."""
        return self._section(ResourceOptions)

    def _section(self, kind: type[Section]) -> Section:
        return kind(**{item.name: getattr(self, item.name) for item in dataclasses.fields(kind)})  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain JSON values."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide stored bits, as plain JSON values."""
        everything = self.to_dict()
        return {name: everything[name] for name in IDENTITY_FIELDS}

    def gram_options(self, other: SpectralConfig) -> SpectralConfig:
        """Return this config with those of `other` that say where and how fast Grams are built, but never what."""
        fields = ("gram_device", "n_workers", "memory_budget", "use_deterministic")
        return self.replace(**{name: getattr(other, name) for name in fields})

    def replace(self, **changes: Any) -> SpectralConfig:
        """Return a copy with `changes`, validated again."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpectralConfig:
        """Build a config from plain values.

        Raises:
            ConfigError: a key is not an option; the message names it and the nearest ones.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        check_keys(values, known, "option")
        return cls(**values)

    def check(self) -> None:
        """Every section checks its own fields, see `__post_init__`."""


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return list(value) if isinstance(value, tuple) else value


def _refuse_assignment(self: SpectralConfig, name: str, value: Any) -> None:
    """Say how to get what an assignment was to give; configs are frozen, so that a run's is what it was made with."""
    check_keys({name: value}, [item.name for item in dataclasses.fields(self)], "option")
    raise dataclasses.FrozenInstanceError(
        f"a config does not change: write config = config.replace({name}={value!r}), which gives a checked copy."
    )


SpectralConfig.__setattr__ = _refuse_assignment  # type: ignore[assignment, method-assign]  # in place of the dataclass's own

#: Fields that decide the bits of stored gradients and Grams.
IDENTITY_FIELDS = tuple(item.name for item in dataclasses.fields(SpectralConfig) if option_of(item).identity)


def _documented() -> str:
    """Return the class's docstring with a line for each field, section by section."""
    lines = [(SpectralConfig.__doc__ or "").rstrip(), ""]
    for section in _SECTIONS:
        lines.append(f"    {(section.__doc__ or '').splitlines()[0]}")
        lines += [
            f"        {item.name} (default {_plain(item.default)!r}): {option_of(item).help}"
            for item in dataclasses.fields(section)
        ]
    return "\n".join(lines) + "\n"


SpectralConfig.__doc__ = _documented()


def check_keys(values: Mapping[str, Any], known: list[str], what: str) -> None:
    """Raise `ConfigError` naming the first key of `values` that is not in `known`, with near matches."""
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."
            raise ConfigError(f"{key!r} is not a known {what}. {hint}")
