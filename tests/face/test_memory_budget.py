"""`FisherSpectral` within a memory budget: some parameters at a time, and the same numbers."""

import numpy as np
import pytest
from factored_models import llama, sequences

import streamfisher as sf
from streamfisher.collection import in_memory
from streamfisher.data import collate
from streamfisher.errors import CapacityError


def compute(monkeypatch, **options):
    passes = []
    original = in_memory.run_pass
    monkeypatch.setattr(in_memory, "run_pass", lambda *given, **named: (passes.append(1), original(*given, **named)))
    config = sf.SpectralConfig(dtype_compute="float64", block_structure="layer", **options)
    found = sf.FisherSpectral(config).compute_fisher_spectrum(llama().double(), collate(sequences()))
    return found, len(passes)


@pytest.mark.parametrize("options", [{}, {"representation": "factors"}, {"max_params_per_block": 300}], ids=str)
def test_less_memory_takes_more_passes_and_gives_the_same_numbers(monkeypatch, options):
    whole, once = compute(monkeypatch, **options)
    tight, several = compute(monkeypatch, memory_budget="1MB", n_workers=1, **options)
    assert once == 1 and several > 1
    assert list(tight["per_block"]) == list(whole["per_block"])
    for block, metrics in whole["per_block"].items():
        np.testing.assert_allclose(tight["per_block"][block]["top_eigenvalues"], metrics["top_eigenvalues"], rtol=1e-9)


def test_a_parameter_that_does_not_fit_names_what_would_do(monkeypatch):
    with pytest.raises(CapacityError, match=r"memory_budget leaves .*storage_mode='streaming'"):
        compute(monkeypatch, memory_budget="150kB", n_workers=1)
