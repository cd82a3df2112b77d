"""With use_deterministic the number of threads of the process decides no bit; torch's own setting is handed back."""

import numpy as np
import pytest
import threadpoolctl
import torch
from tiny_models import TinyCausal, sequences

import streamfisher as sf
from streamfisher.runtime import one_thread


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_thread_is_lent_and_taken_back(torch_threads):
    torch.set_num_threads(2)
    with one_thread(True):
        assert torch.get_num_threads() == 1
        assert all(pool["num_threads"] == 1 for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")
    assert torch.get_num_threads() == 2
    with one_thread(False):
        assert torch.get_num_threads() == 2


def test_threads_change_no_bit_of_a_deterministic_run(torch_threads, tmp_path):
    config = sf.SpectralConfig(use_deterministic=True, chunk_size=32, n_workers=1)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with threadpoolctl.threadpool_limits(threads):
            run = sf.collect(TinyCausal(16), sequences(300, 9), tmp_path / f"{threads}.zarr", config=config)
            spectrum = run.spectrum("none", center=True)
            found.append(
                (run.gram("head.weight"), spectrum.blocks["global"].eigenvalues, spectrum.to_dict()["metadata"])
            )
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])
    assert found[0][2]["block_diagonal_error"] == found[1][2]["block_diagonal_error"]
