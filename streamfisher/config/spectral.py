"""Every option of an analysis, flat: the sections in one.

A field is either part of a run's *identity* (it changes stored gradients or Grams, so a run refuses to resume when it
differs) or it is not (it changes where and how fast, never what). `IDENTITY_FIELDS` is that list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from streamfisher.config.dtypes import dtype_name
from streamfisher.config.gradients import GradientOptions
from streamfisher.config.kinds import check_keys
from streamfisher.config.option import Section, documented, options_of
from streamfisher.config.reduction import ReductionOptions
from streamfisher.config.resources import ResourceOptions
from streamfisher.config.samples import SampleOptions
from streamfisher.config.solving import SolvingOptions
from streamfisher.config.storage import StorageOptions
from streamfisher.errors import ConfigError

S = TypeVar("S", bound=Section)

SECTIONS: tuple[type[Section], ...] = (
    SampleOptions,
    GradientOptions,
    StorageOptions,
    ReductionOptions,
    SolvingOptions,
    ResourceOptions,
)

#: Fields that decide the bits of stored gradients and Grams.
IDENTITY_FIELDS = (
    "seed",
    "chunk_size",
    "batch_tokens",
    "max_length",
    "sample_unit",
    "tokens_per_sequence",
    "labels",
    "classes_per_sample",
    "loss",
    "include",
    "exclude",
    "dtype_model",
    "dtype_compute",
    "dtype_store",
    "bitround",
    "store_centered",
    "representation",
    "project",
    "gram_per",
    "on_nonfinite",
    "use_deterministic",
)

#: Why there is no covariance of the rows of labels='expected'.
UNCENTERED = (
    "over a model's own labels the mean gradient of every sample is zero, so that its covariance is its Fisher. Leave "
    "out the centering."
)

# The order in which manifests list what they have listed from the first; a field that is not here comes after these.
_LISTED_FIRST = (
    *("block_structure", "center_gradients", "sample_unit", "tokens_per_sequence", "labels", "loss"),
    *("include", "exclude", "max_length", "max_params_per_block"),
    *("seed", "chunk_size", "batch_tokens", "guard_every", "on_nonfinite"),
    *("dtype_model", "dtype_compute", "dtype_store", "bitround", "dtype_gram", "dtype_eigensolve", "eps"),
    *("top_k_eigenvalues", "solver", "regularization", "eigensolve_device"),
    *("storage_mode", "store_path", "store_centered", "representation", "project", "keep_gradients", "gram_per"),
    *("codec", "device", "gram_device", "n_workers", "memory_budget", "disk_budget", "stream", "rank_timeout"),
    *("fsync", "use_deterministic"),
)


@documented
@dataclass(frozen=True, kw_only=True, repr=False)
class SpectralConfig(  # a dataclass lists the fields of its last base first
    ResourceOptions, SolvingOptions, ReductionOptions, StorageOptions, GradientOptions, SampleOptions
):
    """How gradients are taken, held, multiplied and solved.

    Every option is a keyword and an attribute; `samples`, `gradients`, `storage`, `reduction`, `solving` and
    `resources` are the same options by section.

    Raises:
        ConfigError: a field has a value that cannot be used; the message names the field and the value.
    """

    def check(self) -> None:
        """Check each section."""
        for section in SECTIONS:
            section.check(self)
        if self.labels == "expected" and (self.center_gradients or self.store_centered):
            field = "center_gradients" if self.center_gradients else "store_centered"
            raise ConfigError(f"{field}=True and labels='expected' do not go together: {UNCENTERED}")

    @property
    def samples(self) -> SampleOptions:
        """What a sample is, and how samples are put together."""
        return self._section(SampleOptions)

    @property
    def gradients(self) -> GradientOptions:
        """Which gradients are taken, and how."""
        return self._section(GradientOptions)

    @property
    def storage(self) -> StorageOptions:
        """What is stored of gradients, and how."""
        return self._section(StorageOptions)

    @property
    def reduction(self) -> ReductionOptions:
        """How gradients become Gram matrices."""
        return self._section(ReductionOptions)

    @property
    def solving(self) -> SolvingOptions:
        """How Gram matrices become spectra."""
        return self._section(SolvingOptions)

    @property
    def resources(self) -> ResourceOptions:
        """Devices, memory, disk and time that a run may take."""
        return self._section(ResourceOptions)

    def _section(self, section: type[S]) -> S:
        return section(**{name: getattr(self, name) for name in options_of(section)})

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain JSON values."""
        return {name: _plain(getattr(self, name)) for name in self.names()}

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
    def names(cls) -> tuple[str, ...]:
        """Return the names of all fields, in the order in which manifests list them."""
        return tuple(dict.fromkeys((*_LISTED_FIRST, *(field.name for field in dataclasses.fields(cls)))))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpectralConfig:
        """Build a config from plain values.

        Raises:
            ConfigError: a key is not an option; the message names it and the nearest ones.
        """
        check_keys(values, cls.names(), "option")
        return cls(**values)

    @classmethod
    def of(cls, given: Any) -> SpectralConfig:
        """Return the config that a caller gave; the defaults for `None`.

        Raises:
            ConfigError: it is something else, for example a dict.
        """
        if given is None:
            return cls()
        if isinstance(given, SpectralConfig):
            return given
        how = "SpectralConfig(**config)" if isinstance(given, Mapping) else "SpectralConfig(...)"
        raise ConfigError(f"config is a {type(given).__name__}, not a SpectralConfig; write config={how}.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self.names())})"


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return list(value) if isinstance(value, tuple) else value


def _refuse_assignment(self: SpectralConfig, name: str, value: Any) -> None:
    """Say how to get what an assignment was to give; configs are frozen, so that a run's is what it was made with."""
    check_keys({name: value}, SpectralConfig.names(), "option")
    raise dataclasses.FrozenInstanceError(
        f"a config does not change: write config = config.replace({name}={value!r}), which gives a checked copy."
    )


SpectralConfig.__setattr__ = _refuse_assignment  # type: ignore[assignment, method-assign]  # in place of the dataclass's own
