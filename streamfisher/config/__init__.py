"""Every knob of an analysis, once: typed, validated, documented with its unit, in sections."""

from streamfisher.config.option import Option, dtype_name, option_of, parse_dtype
from streamfisher.config.sections import (
    Codec,
    GradientOptions,
    GramPer,
    HeldAs,
    Labels,
    LossName,
    OnNonfinite,
    ReductionOptions,
    ResourceOptions,
    SampleOptions,
    SampleUnit,
    Solver,
    SolvingOptions,
    StorageMode,
    StorageOptions,
    Stream,
)
from streamfisher.config.spectral import IDENTITY_FIELDS, SpectralConfig, check_keys

__all__ = [
    # The whole, and its sections
    "SpectralConfig",
    "SampleOptions",
    "GradientOptions",
    "StorageOptions",
    "ReductionOptions",
    "SolvingOptions",
    "ResourceOptions",
    "IDENTITY_FIELDS",
    # What one option is
    "Option",
    "option_of",
    "check_keys",
    "parse_dtype",
    "dtype_name",
    # What options may be
    "Codec",
    "GramPer",
    "HeldAs",
    "Labels",
    "LossName",
    "OnNonfinite",
    "SampleUnit",
    "Solver",
    "StorageMode",
    "Stream",
]
