"""What is stored of gradients, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from streamfisher.config.kinds import DTYPE, FLAG, FOLDER, KEPT, one_of, optional, whole
from streamfisher.config.option import Section, documented, option
from streamfisher.errors import ConfigError

StorageMode = Literal["full", "chunked", "streaming"]
Codec = Literal["auto", "blosc-lz4", "zstd", "raw"]
HeldAs = Literal["auto", "dense", "factors"]
DirectIo = Literal["auto", "always", "never"]
Hold = Literal["auto", "device", "host", "disk"]


@documented
@dataclass(frozen=True, kw_only=True)
class StorageOptions(Section):
    """Where gradients are held, as what, in how many bits, and for how long."""

    storage_mode: StorageMode = option(
        "full",
        one_of(*get_args(StorageMode)),
        "where FisherSpectral holds rows: full: on the device; chunked: in host memory; streaming: through Zarr",
    )
    store_path: str | None = option(
        None,
        optional(FOLDER),
        "folder of FisherSpectral's rows, where storage_mode is streaming",
        unset="a temporary one",
    )
    hold: Hold = option(
        "auto",
        one_of(*get_args(Hold)),
        "where gradients are until they are reduced: device: where they are made; host: in memory; disk: in the run; "
        "auto: the nearest that has room. What is kept is written in any case",
        group="store",
    )
    dtype_store: torch.dtype | None = option(
        None,
        DTYPE,
        "of rows on disk; bfloat16 halves them",
        name="store_dtype",
        group="store",
        unset="that of the computation",
    )
    bitround: int | None = option(
        None,
        optional(whole(1)),
        "keep so many mantissa bits of float32 rows (BitRound)",
        group="store",
        metavar="BITS",
        unset="all",
    )
    codec: Codec = option(
        "auto",
        one_of(*get_args(Codec)),
        "of stored chunks: blosc-lz4, zstd, raw; auto: packed where this disk and these cores make that faster",
        group="store",
    )
    representation: HeldAs = option(
        "auto",
        one_of(*get_args(HeldAs)),
        "dense rows, factors of linear layers, or auto: of each parameter the smaller",
        group="store",
    )
    project: int | None = option(
        None,
        optional(whole(1)),
        "project larger gradients to K random numbers: an estimate, with error bars",
        group="store",
        metavar="K",
        unset="exact",
    )
    keep_gradients: tuple[str, ...] | None = option(
        None,
        optional(KEPT),
        "after the reduction: all, none, or patterns of parameters",
        group="store",
        metavar="PATTERN",
        unset="all, if they fit at once",
    )
    store_centered: bool = option(False, FLAG, "write centered gradients (one more pass)", group="store")
    store_text: int | None = option(
        None,
        optional(whole(1)),
        "keep so many characters of what each sample says, to be shown in tables and reports",
        group="store",
        metavar="CHARACTERS",
        unset="none",
    )
    direct_io: DirectIo = option(
        "auto",
        one_of(*get_args(DirectIo)),
        "write gradients past the page cache: always, never; auto: those that the disk takes in time",
        group="store",
    )
    fsync: bool = option(False, FLAG, "flush the disk before each marker, against power cuts", group="store")

    def check(self) -> None:
        """Refuse a projection of factors, and rounding of rows that are not float32."""
        if self.project is not None and self.representation == "factors":
            raise ConfigError(
                f"project={self.project} makes rows of at most {self.project} numbers, and representation='factors' "
                "keeps what rows are made of; leave out --project, or take representation='auto'."
            )
        if self.bitround is not None and (self.bitround > 23 or self.dtype_store not in (None, torch.float32)):
            raise ConfigError(f"bitround={self.bitround} needs float32 rows and at most 23 bits.")
