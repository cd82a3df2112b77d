"""The sections of a config: what is computed, how gradients are held, multiplied and solved, and with what.

Each field is defined once, here: default, meaning, what it may be, whether it is part of a run's identity, and its
place on the command line. A section checks what concerns several of its fields in `check`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from streamfisher.config.option import (
    choice,
    device,
    dtype,
    folder,
    kept,
    number,
    option,
    patterns,
    size,
    solver_device,
    whole,
    yes_or_no,
)
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
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What N counts, and what a sample's loss is."""

    sample_unit: SampleUnit = option(
        "sequence",
        "sequence (default), or token: one gradient per token's loss",
        choice(SampleUnit),
        identity=True,
        group="data",
    )
    tokens_per_sequence: int | None = option(
        None,
        "with sample_unit='token', draw so many target tokens of each (default: all)",
        whole(1, optional=True),
        identity=True,
        group="data",
        type=int,
    )
    max_length: int | None = option(
        None,
        "tokens per sequence; longer ones are cut (default: 128 where text is cut)",
        whole(1, optional=True),
        identity=True,
        group="data",
        type=int,
    )
    labels: Labels = option(
        "data",
        "data: empirical Fisher (default); model: labels drawn from the model's own prediction",
        choice(Labels),
        identity=True,
        group="data",
    )
    loss: LossName | None = option(
        None,
        "causal, token, classification, regression, model (default: chosen, and named in the result)",
        choice(LossName, optional=True),
        identity=True,
        group="gradients",
    )

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            ConfigError: the message names them.
        """
        if self.tokens_per_sequence is not None and self.sample_unit != "token":
            raise ConfigError(
                f"tokens_per_sequence={self.tokens_per_sequence} draws tokens and sample_unit is "
                f"{self.sample_unit!r}; set sample_unit='token'."
            )


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """Whose gradients are taken, and how."""

    include: tuple[str, ...] = option(
        (),
        "only parameters that match these glob patterns (default: all trainable ones)",
        patterns,
        identity=True,
        group="gradients",
        nargs="+",
        metavar="PATTERN",
    )
    exclude: tuple[str, ...] = option(
        (),
        "all but parameters that match; they are named in the result",
        patterns,
        identity=True,
        group="gradients",
        nargs="+",
        metavar="PATTERN",
    )
    batch_tokens: int = option(
        4096,
        "padded tokens per backward pass; bounds the activations (default: 4096)",
        whole(1),
        identity=True,
        group="gradients",
        type=int,
    )
    chunk_size: int = option(
        32,
        "samples that are written and marked together, rows of one Zarr chunk (default: 32)",
        whole(1),
        identity=True,
        group="gradients",
        type=int,
    )
    on_nonfinite: OnNonfinite = option(
        "raise",
        "a NaN loss or gradient: raise (default), or skip: leave out, count and name",
        choice(OnNonfinite),
        identity=True,
        group="gradients",
    )
    guard_every: int = option(
        64,
        "units; rows of the first batch of each such unit are held against the batch gradient; 0: never",
        whole(0),
    )
    dtype_model: torch.dtype | None = option(
        None,
        "cast the model (default: as it comes)",
        dtype(optional=True),
        identity=True,
        group="gradients",
        flag="--dtype",
    )
    dtype_compute: torch.dtype = option(
        torch.float32,
        "of gradient rows; float64 models always use float64",
        dtype(torch.float32, torch.float64),
        identity=True,
    )
    seed: int = option(42, "of whatever is drawn (default: 42)", whole(0), identity=True, group="gradients", type=int)
    use_deterministic: bool = option(
        False,
        "the same bits every time, on CUDA too; the global state is restored",
        yes_or_no,
        identity=True,
        group="gradients",
        flag="--deterministic",
        action="store_true",
    )
    stream: Stream = option(
        "none",
        "layers: one layer at a time, for models larger than the memory; none (default): one pass, or waves; "
        "auto: layers where the weights or the waves do not fit, or where waves cost clearly more",
        choice(Stream),
        group="gradients",
    )

    def check(self) -> None:
        """Nothing here depends on anything else."""


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How gradients are held until they are reduced, and what stays of them."""

    dtype_store: torch.dtype | None = option(
        None,
        "of rows on disk (default: as computed); bfloat16 halves them",
        dtype(optional=True),
        identity=True,
        group="store",
        flag="--store-dtype",
    )
    bitround: int | None = option(
        None,
        "keep so many mantissa bits of float32 rows (BitRound codec; default: all)",
        whole(1, optional=True),
        identity=True,
        group="store",
        type=int,
        metavar="BITS",
    )
    codec: Codec = option("blosc-lz4", "blosc-lz4 (default), zstd, raw", choice(Codec), group="store")
    representation: HeldAs = option(
        "auto",
        "dense rows, factors of linear layers, or auto (default): the smaller",
        choice(HeldAs),
        identity=True,
        group="store",
    )
    project: int | None = option(
        None,
        "project larger gradients to K random numbers: an estimate, with error bars (default: exact)",
        whole(1, optional=True),
        identity=True,
        group="store",
        type=int,
        metavar="K",
    )
    keep_gradients: tuple[str, ...] | None = option(
        None,
        "after the reduction: all, none, or patterns of parameters (default: all, if they fit at once)",
        kept,
        group="store",
        nargs="+",
        metavar="PATTERN",
    )
    store_centered: bool = option(
        False,
        "write centered gradients (one more pass)",
        yes_or_no,
        identity=True,
        group="store",
        action="store_true",
    )
    storage_mode: StorageMode = option(
        "full", "of FisherSpectral: in memory, in memory by chunks, or through Zarr", choice(StorageMode)
    )
    store_path: str | None = option(None, "folder for storage_mode='streaming' (default: a temporary one)", folder)
    fsync: bool = option(
        False,
        "flush the disk before each marker, against power cuts",
        yes_or_no,
        group="store",
        action="store_true",
    )

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            ConfigError: the message names them.
        """
        if self.project is not None and self.representation == "factors":
            raise ConfigError(
                f"project={self.project} makes rows of at most {self.project} numbers, and representation='factors' "
                "keeps what rows are made of; leave out --project, or take representation='auto'."
            )
        if self.bitround is not None and (self.bitround > 23 or self.dtype_store not in (None, torch.float32)):
            raise ConfigError(f"bitround={self.bitround} needs float32 rows and at most 23 bits.")


@dataclass(frozen=True, kw_only=True)
class ReductionOptions:
    """How gradients are multiplied to Grams."""

    gram_per: GramPer = option(
        "parameter",
        "keep a Gram for each parameter (default), layer-module, layer, or all: fewer bytes, fewer questions",
        choice(GramPer),
        identity=True,
        group="store",
    )
    dtype_gram: torch.dtype = option(
        torch.float32,
        "float32 (default) or float64 products; sums over slabs are always float64",
        dtype(torch.float32, torch.float64),
        group="products",
        flag="--gram-dtype",
    )
    gram_device: Device = option(
        "cpu", "cpu (default), cuda, auto: where products are formed", choice(Device), group="reduction"
    )
    max_params_per_block: int | None = option(
        None, "columns of a block, drawn at random and rescaled (default: all, exact)", whole(1, optional=True)
    )

    def check(self) -> None:
        """Nothing here depends on anything else."""


@dataclass(frozen=True, kw_only=True)
class SolvingOptions:
    """From Grams to eigenvalues."""

    block_structure: str = option(
        "layer", "layer, module, parameter or none", choice(("layer", "module", "parameter", "none"))
    )
    center_gradients: bool = option(False, "the covariance of gradients instead of the Fisher", yes_or_no)
    eps: float | None = option(
        None,
        "raise the noise floor to so much of the largest eigenvalue (default: what rounding leaves)",
        number,
        group="spectrum",
        type=float,
    )
    solver: Solver = option(
        "auto",
        "auto (default), dense, iterative: the largest eigenvalues only, with residuals",
        choice(Solver),
        group="spectrum",
    )
    eigensolve_device: str = option(
        "auto",
        "auto (default), cpu, cuda, cuda:1; mps, which has no such solver, is cpu",
        solver_device,
        group="spectrum",
    )
    dtype_eigensolve: torch.dtype = option(torch.float64, "of the eigensolver", dtype(torch.float32, torch.float64))
    top_k_eigenvalues: int = option(100, "how many eigenvalues the metrics list", whole(1))
    regularization: float = option(1e-8, "jitter, relative to the mean eigenvalue; only if the solver fails", number)

    def check(self) -> None:
        """Refuse numbers that make no sense.

        Raises:
            ConfigError: the message names the field.
        """
        if self.regularization is None or not 0 <= self.regularization < float("inf"):
            raise ConfigError(f"regularization={self.regularization} must be a number and not negative.")
        if self.eps is not None and not 0 <= self.eps < 1:
            raise ConfigError(f"eps={self.eps} is relative to the largest eigenvalue and must lie in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class ResourceOptions:
    """With what: devices, memory, disk, workers."""

    device: str = option("auto", "auto (default), cpu, cuda, cuda:1, mps", device, group="gradients")
    n_workers: int | None = option(
        None,
        "Dask workers (default: one per core)",
        whole(1, optional=True),
        group="products",
        flag="--workers",
        type=int,
    )
    memory_budget: int | str | None = option(
        None,
        "of a host, beside the models of its ranks, for example 2GB (default: half of what is free)",
        size,
        group="products",
        metavar="SIZE",
    )
    disk_budget: int | str | None = option(
        None,
        "of the run, for example 200GB (default: what is free, with a margin)",
        size,
        group="store",
        metavar="SIZE",
    )
    rank_timeout: int = option(
        1800,
        "give up when no rank got on for so long (default: 1800)",
        whole(1),
        group="gradients",
        type=int,
        metavar="SECONDS",
    )

    def check(self) -> None:
        """Nothing here depends on anything else."""
