"""A run every n steps of a real Lightning Trainer."""

import csv
from pathlib import Path

import pytest
import torch
from tiny_models import TinyCausal
from torch import nn

from streamfisher import LightningCallback, SpectralConfig, open_run
from streamfisher.errors import ConfigError, MissingExtraError

CONFIG = SpectralConfig(chunk_size=4, n_workers=1)


def probe(count=8):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 256, (6,), generator=generator)} for _ in range(count)]


def train(callbacks, loggers=False, **options):
    """Return the weights after four steps of two accumulated batches each."""
    lightning = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed (extra `lightning`)")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = TinyCausal(seed=0)

        def training_step(self, batch, number):
            ids = batch["input_ids"]
            logits = self.network(ids)
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    module = Module()
    trainer = lightning.Trainer(
        max_steps=4,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=loggers,
        log_every_n_steps=1,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(probe(), batch_size=2, shuffle=True))
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*litmodels.*", "ignore:.*isinstance.*")
def test_a_run_every_n_steps_logged_and_training_is_not_touched(tmp_path):
    loggers = pytest.importorskip("lightning.pytorch.loggers", reason="Lightning is not installed (extra `lightning`)")
    logger = loggers.CSVLogger(tmp_path / "logs")
    callback = LightningCallback(tmp_path / "runs", probe(), every=2, module="network", config=CONFIG)
    collected, alone = train([callback], logger), train([])
    assert all(torch.equal(a, b) for a, b in zip(collected, alone, strict=True))
    assert [path.name for path in callback.runs] == ["step-00000000.zarr", "step-00000002.zarr", "step-00000004.zarr"]
    with Path(logger.experiment.metrics_file_path).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["fisher_trace"]]
    logged = {int(row["step"]): {name: float(value) for name, value in row.items() if value} for row in rows}
    assert sorted(logged) == [0, 2, 4]
    spectrum = open_run(callback.runs[1]).spectrum("layer")
    assert logged[2]["fisher_trace"] == spectrum.whole.trace
    assert logged[2]["fisher/embedding/largest_eigenvalue"] == spectrum["embedding"].largest_eigenvalue


def test_steps_must_be_positive():
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed (extra `lightning`)")
    with pytest.raises(ConfigError, match="every=0"):
        LightningCallback("runs", probe(), every=0)


def test_without_lightning_the_message_says_what_to_install(monkeypatch):
    import streamfisher.lightning_callback as module

    monkeypatch.setattr(module, "_Base", object)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"streamfisher\[lightning\]"):
        LightningCallback("runs", probe(), every=1)
