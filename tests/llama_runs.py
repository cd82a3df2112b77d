"""Stored runs of a tiny Llama in float64, whole or in waves."""

from __future__ import annotations

from factored_models import llama, sequences

import streamfisher as sf

GRAMS = 8 * 11**2 * 21  # bytes of the Grams of 11 samples of the tiny Llama


def collected(path, *, model=None, samples=None, **options):
    settings = {"hold": "disk", "chunk_size": 4, "batch_tokens": 25, "dtype_compute": "float64"} | options
    model = llama() if model is None else model
    samples = sequences() if samples is None else samples
    return sf.collect(model.double(), samples, path, config=sf.SpectralConfig(**settings))


def budget(whole, share=0.4):
    return GRAMS + int(share * whole.store.rows.bytes_of(11))
