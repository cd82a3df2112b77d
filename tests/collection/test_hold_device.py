"""Gradients that stay on the device where they are made, and are reduced there; the same code on the CPU."""

import numpy as np
import pytest
import torch
from factored_models import MODELS, llama, sequences
from tiny_models import TinyRegression, vectors
from torch import nn

import streamfisher as sf
from streamfisher.errors import CapacityError, CaptureError, ConfigError
from streamfisher.planning import held_where, run_layout
from streamfisher.reduction import device_grams
from streamfisher.runtime.run_log import read_log
from streamfisher.sinks.device import DeviceSink

SETTINGS = {"chunk_size": 4, "batch_tokens": 25, "dtype_compute": "float64", "keep_gradients": "none"}


@pytest.fixture
def room(monkeypatch):
    """Let the CPU be taken for a device with so much memory."""

    def give(size):
        monkeypatch.setattr(run_layout, "device_room", lambda device, budget: size)

    give(1 << 30)
    return give


def collected(path, model, samples, **options):
    settings = SETTINGS | options
    model = model.double() if settings["dtype_compute"] == "float64" else model
    return sf.collect(model, samples, path, config=sf.SpectralConfig(**settings))


def close(one, other, tolerance=1e-12):
    for name in one.store.gram_members:
        expected, got = (run.store.grams.read(name)[0] for run in (one, other))
        assert np.array_equal(got, got.T), name
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name)
    norms = [run.store.samples.per_sample("squared_norm") for run in (one, other)]
    np.testing.assert_allclose(*norms, rtol=1e-6, atol=1e-6 * np.nanmax(norms[0]))


@pytest.mark.parametrize("representation", ["dense", "factors", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_grams_made_on_the_device_are_those_of_the_disk(tmp_path, room, name, representation):
    make, data = MODELS[name]
    disk, device = (
        collected(tmp_path / hold, make(), data(), hold=hold, representation=representation)
        for hold in ("disk", "device")
    )
    assert device.store.run.hold == "device"
    close(disk, device)
    assert device.info()["complete"] and sf.verify(device) == []
    assert not any((device.path / "factors").rglob("c/*")) and not any((device.path / "gradients").rglob("c/*"))
    for center in (False, True):
        one, other = (run.spectrum("parameter", center).blocks for run in (disk, device))
        for key, block in one.items():
            atol = 1e-12 * block.eigenvalues.max(initial=1e-300)
            np.testing.assert_allclose(other[key].eigenvalues, block.eigenvalues, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("options", [{"gram_per": "layer"}, {"project": 8}, {"stream": "layers"}], ids=str)
def test_so_do_coarser_grams_projections_and_streams(tmp_path, room, options):
    disk, device = (
        collected(tmp_path / hold, llama(), sequences(), hold=hold, **options) for hold in ("disk", "device")
    )
    close(disk, device)


def test_slabs_and_blocks_of_any_size_add_up_to_the_same(tmp_path, room, monkeypatch):
    disk = collected(tmp_path / "disk", llama(), sequences(), hold="disk", representation="factors")
    monkeypatch.setattr(device_grams, "_SLAB_BYTES", 1)
    monkeypatch.setattr(device_grams, "PANEL", 7)
    monkeypatch.setattr(device_grams, "_BLOCK", 2)
    close(disk, collected(tmp_path / "device", llama(), sequences(), hold="device", representation="factors"))


MEMORY = {}  # of the models below; what a module itself holds is put back after each pass


class Reusing(nn.Module):
    """Writes what its second layer takes into memory that it used for the batch before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 40), nn.Linear(40, 3)
        MEMORY.clear()

    def forward(self, input):
        hidden = torch.tanh(self.first(input))
        taken = MEMORY.setdefault(hidden.shape, torch.empty_like(hidden)).detach()
        return self.second(taken.copy_(hidden))


class Erasing(Reusing):
    """Overwrites what it made for the batch before, where that had as many samples."""

    def forward(self, input):
        hidden = torch.tanh(self.first(input))
        if hidden.shape in MEMORY:
            MEMORY[hidden.shape].zero_()
        MEMORY[hidden.shape] = hidden.detach()
        return self.second(hidden)


def labelled(n=16):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (n,), generator=generator)
    return {"input": torch.randn(n, 6, generator=generator, dtype=torch.float64), "labels": labels}


@pytest.mark.parametrize("hold", ["host", "device"])
def test_memory_that_a_model_uses_again_for_the_next_batch_is_copied(tmp_path, room, hold):
    options = {"representation": "factors"}
    disk, held = (collected(tmp_path / to, Reusing(), labelled(), hold=to, **options) for to in ("disk", hold))
    assert held.store.run.hold == hold and len(held.store.units) > 1
    close(disk, held)


@pytest.mark.parametrize("hold", ["host", "device"])
def test_a_model_that_overwrites_what_it_made_is_told_to_use_the_disk(tmp_path, room, hold):
    options = {"representation": "factors"}
    with pytest.raises(CaptureError, match=r"second.weight: .* written to after their batch was done.* --hold disk"):
        collected(tmp_path / "run", Erasing(), labelled(), hold=hold, **options)
    if hold == "host":  # what is written too is copied at once
        kept = collected(tmp_path / "kept", Erasing(), labelled(), hold=hold, **options | {"keep_gradients": "all"})
        assert kept.store.run.copy == hold and sf.verify(kept) == []
    disk, plain = (
        collected(tmp_path / name, model(), labelled(), hold="disk", **options)
        for name, model in (("disk", Erasing), ("plain", Reusing))
    )
    close(plain, disk)


@pytest.mark.parametrize("scale", [1.0, 1e-18, 1e18])
def test_float32_products_of_extreme_gradients_neither_vanish_nor_overflow(scale):
    rows = torch.randn(9, 70_000, generator=torch.Generator().manual_seed(0)) * scale
    total = device_grams._SymmetricSum(9, torch.device("cpu"))
    for first in range(0, rows.shape[1], 4096):
        total.add(rows[:, first : first + 4096], torch.float32)
    exact = (rows.double() @ rows.double().T).numpy()
    assert np.abs(total.result() - exact).max() < 1e-6 * exact.max()


def test_wide_parameters_are_multiplied_in_float32_and_the_run_says_so(tmp_path, room, monkeypatch):
    monkeypatch.setattr(
        device_grams, "dtype_of_products", lambda columns, *_: np.dtype("float32" if columns > 200 else "float64")
    )
    disk, device = (
        collected(tmp_path / hold, llama(), sequences(), hold=hold, dtype_compute="float32", representation="dense")
        for hold in ("disk", "device")
    )
    close(disk, device, 1e-6)
    wide = {name for name, size in device.parameters.items() if size > 200}
    assert {name for name in device.parameters if device.store.grams.marker(name)["float32_products"]} == wide


def test_skipped_samples_count_nowhere(tmp_path, room):
    options = {"dtype_compute": "float32", "loss": "regression", "on_nonfinite": "skip"}
    for representation in ("dense", "factors"):
        disk, device = (
            collected(
                tmp_path / f"{hold}-{representation}",
                TinyRegression(),
                vectors(9, nan_at=4),
                hold=hold,
                representation=representation,
                **options,
            )
            for hold in ("disk", "device")
        )
        assert list(device.store.samples.skipped()) == [4]
        close(disk, device, 1e-6)
        for center in (False, True):
            one, other = (run.spectrum("parameter", center).blocks for run in (disk, device))
            for block in one:
                np.testing.assert_allclose(other[block].eigenvalues, one[block].eigenvalues, rtol=1e-5, atol=1e-7)


def test_auto_takes_the_device_where_it_has_room_and_the_host_where_it_has_not(tmp_path, room):
    near = collected(tmp_path / "near", llama(), sequences())
    room(1000)
    far = collected(tmp_path / "far", llama(), sequences())
    assert [run.store.run.hold for run in (near, far)] == ["device", "host"]
    close(far, near)


@pytest.mark.parametrize("stream", ["none", "layers"])
def test_parameters_too_large_for_the_device_are_held_on_the_host_and_the_others_are_not(
    tmp_path, room, monkeypatch, stream
):
    monkeypatch.setattr(held_where, "HOST_PASSES", 9)  # so many as the device needs
    options = {"representation": "dense", "stream": stream}
    disk = collected(tmp_path / "disk", llama(), sequences(), hold="disk", **options)
    most = max(disk.parameters.values())  # of the embedding, and of the head
    size, sums = 8 * disk.n_samples * most, 3 * 8 * disk.n_samples**2
    for room_for, far in ((size + 1, "device"), (size - 1, "host")):
        room(int(room_for / held_where.DEVICE_SHARE) + sums)
        run = collected(tmp_path / far, llama(), sequences(), **options)
        assert run.store.run.hold == "device"
        where = {name: run.store.run.holds[run.store.run.wave_of(name)] for name in run.parameters}
        assert where == {name: far if columns == most else "device" for name, columns in run.parameters.items()}
        assert run.store.manifest.layout["holds"] == (run.store.run.holds if far == "host" else None)
        close(disk, run)
        assert sf.verify(run) == []
    with pytest.raises(CapacityError, match=r"alone need .* on the device.*Without --hold device"):
        collected(tmp_path / "all", llama(), sequences(), hold="device", **options)
    room(20 * disk.n_samples + sums)  # for a norm: then the device is not worth a pass of its own
    assert set(collected(tmp_path / "none", llama(), sequences(), **options).store.run.holds) == {"host"}


def test_a_run_that_is_held_in_two_places_goes_on_and_grows(tmp_path, room, monkeypatch):
    monkeypatch.setattr(held_where, "HOST_PASSES", 9)
    options, samples = {"representation": "dense"}, sequences()
    whole = collected(tmp_path / "whole", llama(), samples, hold="disk", **options)
    size = 8 * whole.n_samples * max(whole.parameters.values())
    room(int((size - 1) / held_where.DEVICE_SHARE) + 3 * 8 * whole.n_samples**2)
    first = collected(tmp_path / "grown", llama(), samples[:7], **options)
    assert set(first.store.run.holds) == {"device"}
    grown = collected(tmp_path / "grown", llama(), samples, **options)
    holds = grown.store.run.holds
    assert set(holds) == {"device", "host"} and len(holds) == len(grown.store.waves)
    close(whole, grown)
    wave = holds.index("host")  # as after a kill in this wave
    for name in grown.store.waves[wave]:
        grown.store.grams.forget(name)
    for unit in grown.store.units:
        grown.store.forget_unit(unit, wave)
    close(whole, collected(tmp_path / "grown", llama(), samples, **options))


def test_little_room_on_the_device_takes_waves(tmp_path, room):
    options = {"hold": "device", "representation": "dense"}
    whole = collected(tmp_path / "whole", llama(), sequences(), **options)
    rows = 8 * whole.n_samples * sum(whole.parameters.values())
    room(int(0.6 * rows / held_where.DEVICE_SHARE))
    cut = collected(tmp_path / "cut", llama(), sequences(), **options)
    assert len(whole.store.waves) == 1 and len(cut.store.waves) == 2
    close(whole, cut)


def test_a_device_too_small_by_a_byte_says_what_would_do(tmp_path, room):
    room(1)
    with pytest.raises(CapacityError, match=r"what is free on the device leaves .* Give or free"):
        collected(tmp_path / "run", llama(), sequences(), hold="device")


def test_without_a_device_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="hold='device': the model is not on a CUDA device; --hold host"):
        collected(tmp_path / "run", llama(), sequences(), hold="device")


def full(*_, **__):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_device_that_runs_out_of_memory_midway_stops_and_can_go_on(tmp_path, room, monkeypatch):
    said = r"ran out of memory: CUDA out of memory.* kB of gradients were held .* goes on .*--device-memory-budget"
    with monkeypatch.context() as patch, pytest.raises(CapacityError, match=said):
        patch.setattr(device_grams, "_slabs", full)
        collected(tmp_path / "run", llama(), sequences(), hold="device")
    run = collected(tmp_path / "run", llama(), sequences(), hold="device")
    assert run.info()["complete"]
    close(collected(tmp_path / "disk", llama(), sequences(), hold="disk"), run)


def test_out_of_memory_in_a_pass_stops_and_can_go_on(tmp_path, room, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(CapacityError, match="ran out of memory"):
        patch.setattr(DeviceSink, "batch", full)
        collected(tmp_path / "run", llama(), sequences(), hold="device")
    assert collected(tmp_path / "run", llama(), sequences(), hold="device").info()["complete"]


@pytest.mark.parametrize("deterministic", [False, True])
def test_where_memory_runs_out_slabs_are_made_smaller_once_unless_all_bits_are_to_be_the_same(
    tmp_path, room, monkeypatch, deterministic
):
    sizes = []
    slabs = device_grams._slabs

    def nearly_full(held, name, start, stop, slab_bytes):
        sizes.append(slab_bytes)
        if slab_bytes == device_grams._SLAB_BYTES:
            full()
        return slabs(held, name, start, stop, slab_bytes)

    monkeypatch.setattr(device_grams, "_slabs", nearly_full)
    options = {"hold": "device", "use_deterministic": deterministic}
    if deterministic:
        with pytest.raises(CapacityError, match="ran out of memory"):
            collected(tmp_path / "run", llama(), sequences(), **options)
        return
    run = collected(tmp_path / "run", llama(), sequences(), **options)
    assert sizes.count(device_grams._SLAB_BYTES) == 1 and len(set(sizes)) == 2  # and stay so
    assert any(line["event"] == "smaller slabs" for line in read_log(run.path)[0])
    close(collected(tmp_path / "disk", llama(), sequences(), hold="disk"), run)
