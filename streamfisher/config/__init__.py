"""Every knob of an analysis, once: typed, checked, documented; in sections, and flat in `SpectralConfig`."""

from streamfisher.config.dtypes import dtype_name, parse_dtype
from streamfisher.config.gradients import GradientOptions, LossName, OnNonfinite
from streamfisher.config.kinds import check_keys
from streamfisher.config.reduction import GramPer, ReductionOptions
from streamfisher.config.resources import ResourceOptions, Stream
from streamfisher.config.samples import Labels, SampleOptions, SampleUnit
from streamfisher.config.solving import Solver, SolvingOptions
from streamfisher.config.spectral import IDENTITY_FIELDS, SECTIONS, UNCENTERED, SpectralConfig
from streamfisher.config.storage import Codec, DirectIo, HeldAs, Hold, StorageMode, StorageOptions

__all__ = [
    # the config and its sections
    "SpectralConfig",
    "SampleOptions",
    "GradientOptions",
    "StorageOptions",
    "ReductionOptions",
    "SolvingOptions",
    "ResourceOptions",
    "SECTIONS",
    "IDENTITY_FIELDS",
    "UNCENTERED",
    # what their fields take
    "SampleUnit",
    "Labels",
    "LossName",
    "OnNonfinite",
    "StorageMode",
    "Codec",
    "DirectIo",
    "HeldAs",
    "Hold",
    "GramPer",
    "Solver",
    "Stream",
    "dtype_name",
    "parse_dtype",
    "check_keys",
]
