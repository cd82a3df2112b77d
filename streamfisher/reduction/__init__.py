"""From stored gradients to Grams: rows, factors, tiles; whole or a wave at a time; in bounded memory."""

from streamfisher.reduction.folds import FOLD
from streamfisher.reduction.gram import ParameterGram, build_grams, gram_settings
from streamfisher.reduction.moment import moment_of
from streamfisher.reduction.products import NumpySum, PanelSum, TorchSum, panel_sum
from streamfisher.reduction.slabs import SlabPlan, plan_slabs
from streamfisher.reduction.stored_grams import build_stored_grams
from streamfisher.reduction.subsets import ColumnSubset, draw_columns
from streamfisher.reduction.tiles import build_tiled_grams

__all__ = [
    # Grams
    "build_grams",
    "ParameterGram",
    "gram_settings",
    "FOLD",
    "build_tiled_grams",
    "build_stored_grams",
    # How they are formed
    "PanelSum",
    "NumpySum",
    "TorchSum",
    "panel_sum",
    "SlabPlan",
    "plan_slabs",
    "ColumnSubset",
    "draw_columns",
    # Where there are fewer parameters than samples
    "moment_of",
]
