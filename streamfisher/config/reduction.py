"""How gradients become Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from streamfisher.config.kinds import dtype_among, one_of
from streamfisher.config.option import Section, documented, option

GramPer = Literal["parameter", "layer-module", "layer", "all"]
Processor = Literal["auto", "cpu", "cuda"]


@documented
@dataclass(frozen=True, kw_only=True)
class ReductionOptions(Section):
    """How many Grams are kept, and where and in which precision they are multiplied."""

    gram_per: GramPer = option(
        "parameter",
        one_of(*get_args(GramPer)),
        "keep a Gram for each parameter, layer-module, layer, or all: fewer bytes, fewer questions",
        group="store",
    )
    dtype_gram: torch.dtype = option(
        torch.float32,
        dtype_among(torch.float32, torch.float64),
        "float32 or float64 products; their sums are always float64",
        name="gram_dtype",
        group="reduction",
    )
    gram_device: Processor = option(
        "cpu",
        one_of(*get_args(Processor)),
        "cpu, cuda, auto: where products are formed",
        group="reduction on a GPU or cluster",
    )
