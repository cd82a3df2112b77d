"""Every knob of an analysis, once: typed, validated, documented with its unit.

A field is either part of a run's *identity* (it changes stored gradients or Grams, so a run refuses to resume when it
differs) or it is not (it changes where and how fast, never what). `IDENTITY_FIELDS` is that list.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import torch

from streamfisher.byte_sizes import parse_bytes
from streamfisher.errors import ConfigError

StorageMode = Literal["full", "chunked", "streaming"]
SampleUnit = Literal["sequence", "token", "example"]
Stream = Literal["none", "layers", "auto"]
Codec = Literal["blosc-lz4", "zstd", "raw"]
OnNonfinite = Literal["raise", "skip"]
Labels = Literal["data", "model"]
HeldAs = Literal["auto", "dense", "factors"]
GramPer = Literal["parameter", "layer-module", "layer", "all"]
Solver = Literal["auto", "dense", "iterative"]
LossName = Literal["causal", "token", "classification", "regression", "model"]

_FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: Fields that decide the bits of stored gradients and Grams.
IDENTITY_FIELDS = (
    "seed",
    "chunk_size",
    "batch_tokens",
    "max_length",
    "sample_unit",
    "tokens_per_sequence",
    "labels",
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


@overload
def parse_dtype(value: None, field: str = "dtype") -> None: ...
@overload
def parse_dtype(value: torch.dtype | str, field: str = "dtype") -> torch.dtype: ...
def parse_dtype(value: torch.dtype | str | None, field: str = "dtype") -> torch.dtype | None:
    """Return the floating `torch.dtype` that `value` names; `None` stays `None`.

    Raises:
        ConfigError: `value` is not one of float64, float32, bfloat16, float16.
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in _FLOATS:
        raise ConfigError(f"{field}={value!r} is not a floating dtype; choose one of {', '.join(_FLOATS)}.")
    return _FLOATS[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return `'float32'` for `torch.float32`, and so on."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class SpectralConfig:
    """How gradients are taken, held, multiplied and solved.

    Raises:
        ConfigError: a field has a value that cannot be used; the message names the field and the value.
    """

    # What is computed
    block_structure: str = "layer"  # 'layer' | 'module' | 'parameter' | 'none'
    center_gradients: bool = False  # the covariance of gradients instead of the Fisher
    sample_unit: SampleUnit = "sequence"  # what N counts; 'token' takes one gradient per token's loss
    tokens_per_sequence: int | None = None  # draw so many target tokens (sample_unit='token'); None: all
    labels: Labels = "data"  # 'data': empirical Fisher; 'model': labels drawn from the model's own prediction
    loss: LossName | None = None  # None: chosen from the model's output and labels, and named in the metadata
    include: tuple[str, ...] = ()  # glob patterns of parameter names; empty: all trainable ones
    exclude: tuple[str, ...] = ()  # glob patterns of parameter names left out (listed in the result)
    max_length: int | None = None  # tokens; longer sequences are cut
    max_params_per_block: int | None = None  # columns; None: exact. Otherwise seeded subsampling, rescaled

    # Samples and batches
    seed: int = 42
    chunk_size: int = 32  # samples; rows of one Zarr chunk, the unit that is written and marked
    batch_tokens: int = 4096  # padded tokens in one backward pass; bounds the activations
    guard_every: int = (
        64  # units; on the first batch of each such unit rows are held against the batch gradient; 0: never
    )
    on_nonfinite: OnNonfinite = "raise"  # a NaN loss or gradient stops the run, or is skipped, counted and named

    # Precision
    dtype_model: torch.dtype | None = None  # cast the model; None: as it comes
    dtype_compute: torch.dtype = torch.float32  # of gradient rows; float64 models always use float64
    dtype_store: torch.dtype | None = None  # of rows on disk; None: the same. 'bfloat16' halves the store
    bitround: int | None = None  # mantissa bits kept by the BitRound codec (fp32 rows); None: all
    dtype_gram: torch.dtype = torch.float32  # of slab products; sums over slabs are always float64
    dtype_eigensolve: torch.dtype = torch.float64
    eps: float | None = None  # relative to the largest eigenvalue: what counts as noise; None: from the dtypes

    # Eigensolve
    top_k_eigenvalues: int = 100  # how many eigenvalues the metrics list
    solver: Solver = "auto"  # 'iterative': the largest eigenvalues only, with residuals; 'auto': where it pays
    regularization: float = 1e-8  # jitter, relative to the mean eigenvalue; only if the solver fails
    eigensolve_device: Literal["auto", "cpu", "cuda"] = "auto"

    # Where and how
    storage_mode: StorageMode = "full"  # FisherSpectral: in memory, in memory by chunks, or through Zarr
    store_path: str | None = None  # folder for storage_mode='streaming'; None: a temporary one
    store_centered: bool = False  # write centered gradient chunks (a mean pass first)
    representation: HeldAs = "auto"  # 'dense' rows, 'factors' of linear layers, or of each parameter the smaller
    project: int | None = None  # numbers of a row: larger gradients are projected at random; None: exact
    keep_gradients: tuple[str, ...] | None = None  # 'all', 'none' or glob patterns; None: all, unless there are waves
    gram_per: GramPer = "parameter"  # one Gram for each; 'layer-module', 'layer', 'all': fewer, for large N
    codec: Codec = "blosc-lz4"
    device: str = "auto"  # 'auto' | 'cpu' | 'cuda' | 'cuda:N' | 'mps'
    gram_device: Literal["auto", "cpu", "cuda"] = "cpu"  # of the products; 'cuda' multiplies with torch
    n_workers: int | None = None  # Dask workers; None: one per core
    memory_budget: int | str | None = None  # bytes or '2GB' of a host, beside its models; None: half of what is free
    disk_budget: int | str | None = None  # bytes or '200GB' for the run; None: what is free, with a margin
    stream: Stream = "none"  # 'layers': one at a time; 'auto': where the model or its waves do not fit, or cost more
    rank_timeout: int = 1800  # seconds without a sign of progress after which ranks stop waiting for each other
    fsync: bool = False  # flush the run's filesystem before each marker: what is marked survives a power cut
    use_deterministic: bool = False  # full determinism, CUDA included; the global state is restored

    def __post_init__(self) -> None:
        for field in ("dtype_model", "dtype_compute", "dtype_store", "dtype_gram", "dtype_eigensolve"):
            object.__setattr__(self, field, parse_dtype(getattr(self, field), field))
        if self.keep_gradients is not None:
            object.__setattr__(self, "keep_gradients", _kept(self.keep_gradients))
        for field in ("include", "exclude"):
            object.__setattr__(self, field, _patterns(field, getattr(self, field)))
        for field in ("center_gradients", "store_centered", "use_deterministic", "fsync"):
            if not isinstance(getattr(self, field), bool):
                raise ConfigError(f"{field}={_show(getattr(self, field))} must be true or false.")
        if self.store_path is not None and not isinstance(self.store_path, str | os.PathLike):
            raise ConfigError(f"store_path={self.store_path!r} must name a folder.")
        object.__setattr__(self, "store_path", None if self.store_path is None else os.fspath(self.store_path))
        if not isinstance(self.device, str | torch.device) or not str(self.device):
            raise ConfigError(f"device={self.device!r} is no device; write auto, cpu, cuda or cuda:1.")
        object.__setattr__(self, "device", str(self.device))
        for field in ("regularization", "eps"):
            object.__setattr__(self, field, _number(field, getattr(self, field)))
        self._check_choice("sample_unit", get_args(SampleUnit))
        self._check_choice("labels", get_args(Labels))
        self._check_choice("loss", (None, *get_args(LossName)))
        self._check_choice("on_nonfinite", get_args(OnNonfinite))
        self._check_choice("storage_mode", get_args(StorageMode))
        self._check_choice("codec", get_args(Codec))
        self._check_choice("stream", get_args(Stream))
        self._check_choice("representation", get_args(HeldAs))
        self._check_choice("gram_per", get_args(GramPer))
        self._check_choice("solver", get_args(Solver))
        self._check_choice("eigensolve_device", ("auto", "cpu", "cuda"))
        self._check_choice("gram_device", ("auto", "cpu", "cuda"))
        self._check_choice("block_structure", ("layer", "module", "parameter", "none"))
        self._check_choice("dtype_gram", (torch.float32, torch.float64))
        self._check_choice("dtype_compute", (torch.float32, torch.float64))
        self._check_choice("dtype_eigensolve", (torch.float32, torch.float64))
        for field in ("chunk_size", "batch_tokens", "top_k_eigenvalues", "rank_timeout"):
            self._check_integer(field, 1)
        for field in ("max_length", "max_params_per_block", "n_workers", "tokens_per_sequence", "project"):
            if getattr(self, field) is not None:
                self._check_integer(field, 1)
        if self.tokens_per_sequence is not None and self.sample_unit != "token":
            raise ConfigError(
                f"tokens_per_sequence={self.tokens_per_sequence} draws tokens and sample_unit is "
                f"{self.sample_unit!r}; set sample_unit='token'."
            )
        if self.project is not None and self.representation == "factors":
            raise ConfigError(
                f"project={self.project} makes rows of at most {self.project} numbers, and representation='factors' "
                "keeps what rows are made of; leave out --project, or take representation='auto'."
            )
        self._check_integer("seed", 0)
        self._check_integer("guard_every", 0)
        if self.bitround is not None:
            self._check_integer("bitround", 1)
            if self.bitround > 23 or self.dtype_store not in (None, torch.float32):
                raise ConfigError(f"bitround={self.bitround} needs float32 rows and at most 23 bits.")
        if self.regularization is None or not 0 <= self.regularization < float("inf"):
            raise ConfigError(f"regularization={self.regularization} must be a number and not negative.")
        if self.eps is not None and not 0 <= self.eps < 1:
            raise ConfigError(f"eps={self.eps} is relative to the largest eigenvalue and must lie in [0, 1).")
        for field in ("memory_budget", "disk_budget"):
            if getattr(self, field) is not None:
                object.__setattr__(self, field, parse_bytes(getattr(self, field), field))

    def _check_choice(self, field: str, allowed: tuple[Any, ...]) -> None:
        value = getattr(self, field)
        if value not in allowed:
            names = ", ".join(str(choice).removeprefix("torch.") for choice in allowed)
            raise ConfigError(f"{field}={_show(value)} is unknown; choose one of {names}.")

    def _check_integer(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{field}={_show(value)} must be a whole number of at least {least}.")

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


def check_keys(values: Mapping[str, Any], known: list[str], what: str) -> None:
    """Raise `ConfigError` naming the first key of `values` that is not in `known`, with near matches."""
    import difflib

    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}."
            raise ConfigError(f"{key!r} is not a known {what}. {hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    return list(value) if isinstance(value, tuple) else value


def _kept(value: Any) -> tuple[str, ...]:
    """Return the patterns of `keep_gradients`: `('*',)` for 'all', `()` for 'none'."""
    if value in ("all", ("all",), ["all"]):
        return ("*",)
    return () if value in ("none", ("none",), ["none"]) else _patterns("keep_gradients", value)


def _patterns(field: str, value: Any) -> tuple[str, ...]:
    patterns = (value,) if isinstance(value, str) else value
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{field}={value!r} must be a pattern of parameter names, or a list of patterns.")
    return tuple(patterns)


def _number(field: str, value: Any) -> float | None:
    """Return a number; text counts where it is one, because YAML reads `1e-6` as text."""
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{field}={value!r} must be a number.") from None


def _show(value: Any) -> str:
    return dtype_name(value) if isinstance(value, torch.dtype) else repr(value)
