"""`codec="auto"`: packed where that makes the run faster or the disk is nearly full; what was chosen is recorded."""

import math

import pytest
import tiny_models
import torch

import streamfisher as sf
from streamfisher.planning import codec_choice
from streamfisher.planning.codec_choice import LEAST_MEASURED, PackingRates, choose_codec, measure_packing
from streamfisher.store.config_file import CONFIG_FILE

GB = 1e9


def chosen(size=math.inf, **options):
    options = {"dtype": torch.float32, "on_device": False, **options}
    return choose_codec("auto", options.pop("folder"), size, **options)


@pytest.mark.parametrize(
    ("rates", "on_device", "wins"),
    [
        (PackingRates(disk=1.4 * GB, packing=0.9 * GB, ratio=0.90, cores=2), False, False),  # fast disk, few cores
        (PackingRates(disk=0.1 * GB, packing=0.9 * GB, ratio=0.79, cores=2), False, True),  # a disk that turns
        (PackingRates(disk=0.1 * GB, packing=0.9 * GB, ratio=1.00, cores=2), False, False),  # nothing to save
        (PackingRates(disk=2.0 * GB, packing=1.1 * GB, ratio=0.79, cores=16), True, True),  # cores that would idle
        (PackingRates(disk=20.0 * GB, packing=1.1 * GB, ratio=0.79, cores=16), True, False),  # a disk faster than they
    ],
)
def test_packing_wins_where_the_time_that_it_saves_is_more_than_it_takes(rates, on_device, wins):
    assert rates.packing_wins(on_device=on_device) is wins


def test_this_machine_is_measured_where_there_is_much_to_write(tmp_path, monkeypatch):
    found = measure_packing(tmp_path / "not" / "there", torch.float32)
    assert 0.8 < found.ratio < 1 and found.disk > 1e6 and found.packing > 1e6 and found.cores >= 1
    assert measure_packing(tmp_path, torch.bfloat16).ratio < 0.85  # the exponents of numbers of like size
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(codec_choice, "measure_packing", lambda *_: PackingRates(GB, GB, 0.5, 64))
    choice = chosen(folder=tmp_path)
    assert choice.codec == "blosc-lz4" and "the disk takes 1 GB/s" in choice.why and "50 %" in choice.why


def test_little_is_stored_as_it_is_and_a_disk_that_fills_up_asks_for_packing(tmp_path):
    assert chosen(LEAST_MEASURED - 1, folder=tmp_path).codec == "raw"
    choice = chosen(10 * GB, folder=tmp_path, free=19 * GB)
    assert choice.codec == "blosc-lz4" and "half" in choice.why
    assert chosen(1, folder=tmp_path, rounded=True).codec == "blosc-lz4"


def test_what_was_asked_for_is_taken(tmp_path):
    assert choose_codec("zstd", tmp_path, 1, dtype=torch.float32, on_device=False).codec == "zstd"


def test_the_choice_is_recorded_and_what_was_asked_for_too(tmp_path):
    config = sf.SpectralConfig(keep_gradients=("*",))
    assert config.codec == "auto"
    run = sf.collect(tiny_models.causal(), tiny_models.sequences(), tmp_path / "run.zarr", config=config)
    assert run.store.manifest.layout["codec"] == "raw"
    assert run.store.manifest.config["codec"] == "auto"
    assert "codec: auto" in (run.path / CONFIG_FILE).read_text()
    assert sf.verify(run) == []
