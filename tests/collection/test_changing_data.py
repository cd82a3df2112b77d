"""Data that is another each time it is read cannot give one spectrum."""

import pytest
import torch
from torch import nn

import streamfisher as sf
from streamfisher.errors import DataError


class Data(torch.utils.data.Dataset):
    """Eight samples, of which `changed(index, reads)` says whether this reading is another one."""

    def __init__(self, changed):
        self.x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
        self.changed, self.reads = changed, [0] * 8

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.reads[index] += 1
        noise = torch.randn(5) if self.changed(index, self.reads[index]) else torch.zeros(5)
        return {"x": self.x[index] + noise, "labels": torch.tensor(index % 3)}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 3))


@pytest.mark.parametrize("config", [{}, {"disk_budget": 480_000, "keep_gradients": "none"}])
def test_augmentation_at_random_is_refused_at_the_start(model, config, tmp_path):
    with pytest.raises(DataError, match="sample 0 is another one each time it is read"):
        sf.collect(model, Data(lambda *_: True), tmp_path / "run.zarr", config=sf.SpectralConfig(**config))
    assert not (tmp_path / "run.zarr").exists()


def test_one_sample_that_changes_is_named(model, tmp_path):
    with pytest.raises(DataError, match="sample 5 is another one"):
        sf.collect(model, Data(lambda index, _: index == 5), tmp_path / "run.zarr")


def test_data_that_changes_between_passes_is_refused_in_the_pass(model, tmp_path):
    steady = Data(lambda *_: False)
    sf.collect(model, steady, tmp_path / "steady.zarr")
    last = steady.reads[7]
    with pytest.raises(DataError, match="sample 7 is another one"):
        sf.collect(model, Data(lambda index, reads: index == 7 and reads == last), tmp_path / "run.zarr")
