"""What a sample is, and how samples are put together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from streamfisher.config.kinds import one_of, optional, whole
from streamfisher.config.option import Section, documented, option
from streamfisher.errors import ConfigError

SampleUnit = Literal["sequence", "token", "example"]
Labels = Literal["data", "model", "expected"]


@documented
@dataclass(frozen=True, kw_only=True)
class SampleOptions(Section):
    """What N counts, and how samples are drawn, cut, labelled and batched."""

    max_length: int | None = option(
        None,
        optional(whole(1)),
        "tokens per sequence; longer ones are cut",
        group="data",
        unset="128 where text is cut",
    )
    sample_unit: SampleUnit = option(
        "sequence",
        one_of(*get_args(SampleUnit)),
        "what N counts: sequence (or an example of other data), or token: one gradient per token's loss",
        group="data",
    )
    tokens_per_sequence: int | None = option(
        None,
        optional(whole(1)),
        "draw so many target tokens of each sequence, where N counts tokens",
        group="data",
        unset="all",
    )
    labels: Labels = option(
        "data",
        one_of(*get_args(Labels)),
        "data: empirical Fisher; model: labels drawn from the model's own prediction; expected: every class of a "
        "sample, weighted by its probability, which is the exact Fisher of a classifier (generalised Gauss-Newton)",
        group="data",
    )
    classes_per_sample: int | None = option(
        None,
        optional(whole(1)),
        "with labels='expected', only so many most probable classes of each sample; what is left out is reported",
        group="data",
        unset="all",
    )
    seed: int = option(42, whole(0, 2**64 - 1), "seed of all that is drawn at random", group="data")
    chunk_size: int = option(
        32, whole(1), "samples written and marked together: the rows of one Zarr chunk", group="data"
    )
    batch_tokens: int = option(4096, whole(1), "padded tokens per backward pass; bounds the activations", group="data")

    def check(self) -> None:
        """Refuse a number of tokens to draw where N counts sequences, and one of classes where a sample has one."""
        if self.tokens_per_sequence is not None and self.sample_unit != "token":
            raise ConfigError(
                f"tokens_per_sequence={self.tokens_per_sequence} draws tokens and sample_unit is "
                f"{self.sample_unit!r}; set sample_unit='token'."
            )
        if self.classes_per_sample is not None and self.labels != "expected":
            raise ConfigError(
                f"classes_per_sample={self.classes_per_sample} chooses among the classes of each sample and labels is "
                f"{self.labels!r}, which takes one; set labels='expected'."
            )
