"""Boundaries in host memory: the same bits as where they were made, in memory that is used again."""

import pytest
import torch
from factored_models import llama, sequences
from stream.stream_models import assert_same_bits, model_and_batches, ordinary_rows, streamed_rows

import streamfisher as sf
from streamfisher.planning import held_where, run_layout
from streamfisher.stream import Boundaries, StreamProducer
from streamfisher.stream.boundaries import MISSING
from streamfisher.stream.host_copies import HostBuffers, HostCopies

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_a_tensor_comes_back_as_it_was(dtype, shape):
    value = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    copies = HostCopies(CPU)
    parked = copies.park(value)
    expected = value.clone()
    value.zero_()  # what waits is a copy
    assert torch.equal(copies.on_host(parked), expected)
    assert torch.equal(copies.arrive(copies.fetch(parked)), expected)


def test_memory_that_was_given_back_is_used_again_and_little_is_wasted():
    buffers = HostBuffers(pinned=False)
    for size in (1000, 1_000_000, 1_000_001, 67_108_864):
        taken = buffers.take(size)
        assert size <= len(taken) <= max(1.13 * size, 1024)
        allocated = buffers.allocated
        buffers.give(taken)
        assert buffers.take(size).data_ptr() == taken.data_ptr() and buffers.allocated == allocated


def test_two_that_wait_at_the_same_time_do_not_share_memory():
    boundaries = Boundaries(copies=HostCopies(CPU))
    for name in "ab":
        boundaries.put(0, name, torch.full((100,), float(ord(name))))
    boundaries.prefetch(0, ["a", "b", "not there"])
    boundaries.put(0, "a", torch.zeros(100))  # instead of what is on its way
    assert torch.equal(boundaries.get(0, "a", CPU), torch.zeros(100))
    assert torch.equal(boundaries.get(0, "b", CPU), torch.full((100,), 98.0))
    boundaries.drop(0, "b")
    assert boundaries.get(0, "b", CPU) is MISSING and boundaries.bytes_in_memory == 400


@pytest.mark.parametrize("name", ["Llama", "T5", "Mixtral"])
def test_a_stream_whose_boundaries_wait_in_host_memory_has_the_same_bits(name):
    model, batches, loss = model_and_batches(name)
    boundaries = Boundaries(copies=HostCopies(CPU))
    assert_same_bits(ordinary_rows(model, batches, loss), streamed_rows(model, batches, loss, boundaries=boundaries))
    assert boundaries.copies.buffers.allocated > 0


def streamed(path, **options):
    config = sf.SpectralConfig(
        **{"stream": "layers", "chunk_size": 4, "batch_tokens": 40, "device": "cpu", "keep_gradients": "none"} | options
    )
    return sf.collect(llama(), sequences(14), path, config=config)


def grams(run):
    return {key: run.store.grams.read(key)[0].tobytes() for key in run.store.gram_members}


@pytest.mark.parametrize("share", [0.1, 1e-6])
def test_boundaries_of_gradients_that_are_held_stay_in_memory_and_spill_to_the_disk(tmp_path, monkeypatch, share):
    monkeypatch.setitem(run_layout._BOUNDARY_MEMORY, "host", share)
    written = []
    write = Boundaries._write
    monkeypatch.setattr(Boundaries, "_write", lambda *arguments: written.append(1) or write(*arguments))
    held = streamed(tmp_path / "host", hold="host", memory_budget="2GB")
    assert held.store.run.hold == "host" and (not written) == (share == 0.1)
    assert not (held.path / "stream").exists()
    written.clear()
    assert grams(streamed(tmp_path / "disk", hold="disk")) == grams(held) and written


def test_a_stream_that_was_stopped_makes_its_boundaries_again(tmp_path, monkeypatch):
    whole = streamed(tmp_path / "whole", hold="host")
    finish = StreamProducer.finish

    def stopped(producer, wave):
        if wave.index == 2:
            raise KeyboardInterrupt
        finish(producer, wave)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StreamProducer, "finish", stopped)
        streamed(tmp_path / "run", hold="host")
    assert grams(streamed(tmp_path / "run", hold="host")) == grams(whole)


def test_a_layer_that_does_not_fit_the_device_is_taken_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(run_layout, "device_room", lambda device, budget: 1 << 30)
    options = {"hold": "device", "representation": "dense", "dtype_compute": "float64"}
    whole = streamed(tmp_path / "whole", **options)
    layer = max(sum(whole.parameters[name] for name in names) for names in whole.store.waves)
    largest = max(whole.parameters.values())
    room = 8 * whole.n_samples * max(layer // 2, largest) + 1
    monkeypatch.setattr(
        run_layout, "device_room", lambda device, budget: int(room / held_where.DEVICE_SHARE) + 24 * 14**2
    )
    parts = streamed(tmp_path / "parts", **options)
    assert len(parts.store.waves) > len(whole.store.waves)
    assert [name for names in parts.store.waves for name in names] == [n for names in whole.store.waves for n in names]
    assert grams(parts) == grams(whole)
