"""A run that is written past the page cache has the files of any other."""

import pytest
import torch
from torch import nn

import streamfisher as sf


@pytest.mark.parametrize("representation", ["dense", "factors"])
def test_direct_io_changes_no_byte(tmp_path, representation, monkeypatch):
    monkeypatch.setattr("streamfisher.store.chunks.LEAST_DIRECT", 4096)
    data = {"x": torch.randn(8, 1024, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(8)}
    found = {}
    for direct in ("always", "never"):
        torch.manual_seed(0)
        settings = {"chunk_size": 4, "keep_gradients": ("*",), "hold": "disk", "representation": representation}
        run = sf.collect(
            nn.Linear(1024, 128), data, tmp_path / direct, config=sf.SpectralConfig(direct_io=direct, **settings)
        )
        assert sf.verify(run) == []
        files = [path for place in ("gradients", "packed", "factors") for path in (run.path / place).rglob("*")]
        found[direct] = {str(path.relative_to(run.path)): path.read_bytes() for path in files if path.is_file()}
    assert any("/c/" in name for name in found["always"])
    assert found["always"] == found["never"]


def test_the_first_run_is_resumed_by_one_that_writes_otherwise(tmp_path):
    data = {"x": torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), "labels": torch.arange(8) % 3}
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    sf.collect(model, data, tmp_path / "run", config=sf.SpectralConfig(direct_io="never"))
    run = sf.collect(model, data, tmp_path / "run", config=sf.SpectralConfig(direct_io="always"))
    assert run.spectrum("none").global_.trace > 0
