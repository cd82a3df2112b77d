"""Samples: numbered, cut into units and batches, and read from files."""

from streamfisher.data.batches import (
    BatchRef,
    Unit,
    batches_of,
    collate,
    guarded_batches,
    guarded_share,
    make_batches,
    make_units,
    sequence_length,
)
from streamfisher.data.loading import load_samples, text_samples
from streamfisher.data.samples import Samples, TokenSamples
from streamfisher.data.sources import SampleSource
from streamfisher.data.tokenizing import LaterTokenizer, Tokenizer, as_tokenizer, tokenizer_of

__all__ = [
    # Samples
    "Samples",
    "TokenSamples",
    "SampleSource",
    "load_samples",
    "text_samples",
    # How text became token ids
    "Tokenizer",
    "LaterTokenizer",
    "as_tokenizer",
    "tokenizer_of",
    # Units and batches
    "Unit",
    "BatchRef",
    "make_units",
    "make_batches",
    "batches_of",
    "guarded_batches",
    "guarded_share",
    "collate",
    "sequence_length",
]
