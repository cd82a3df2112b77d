"""A run every n steps of a real Trainer, and training goes on as if nothing had happened."""

import builtins
import importlib
import sys

import numpy as np
import pytest
import torch
from tiny_models import TinyCausal

from streamfisher import SpectralConfig, compare, open_run
from streamfisher.callbacks import CollectCallback
from streamfisher.errors import ConfigError, MissingExtraError

CONFIG = SpectralConfig(chunk_size=4, n_workers=1)


def samples(count=8):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 256, (6,), generator=generator)} for _ in range(count)]


class WithLoss(TinyCausal):
    """What a Trainer wants: a dict with a loss."""

    def forward(self, input_ids, labels=None):
        logits = super().forward(input_ids)
        if labels is None:
            return {"logits": logits}
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def train(tmp_path, callbacks, reporters=(), **options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = WithLoss(seed=0)
    data = [{**sample, "labels": sample["input_ids"]} for sample in samples()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        report_to=[],
        save_strategy="no",
        **({"logging_strategy": "no"} | options),
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[*reporters, *callbacks])
    trainer.train()
    return model, trainer


def token_loss(model, batch):
    logits = model(batch["input_ids"])["logits"]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
    )
    return losses.sum(dim=1)


def test_a_run_every_n_steps_and_training_is_not_touched(tmp_path):
    callback = CollectCallback(samples(), tmp_path / "runs", every=2, config=CONFIG, loss=token_loss)
    model, trainer = train(tmp_path, [callback])
    assert [path.name for path in callback.runs] == ["step-00000000.zarr", "step-00000002.zarr", "step-00000004.zarr"]
    without, _ = train(tmp_path, [])
    for name, value in model.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name
    traces = compare(callback.runs, "none", top=0).trajectory("trace")
    assert traces[0] == open_run(callback.runs[0]).spectrum("none").global_.trace
    assert len(np.unique(traces)) == 3
    logged = [entry for entry in trainer.state.log_history if "fisher_trace" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4]


def test_metrics_of_each_block_reach_whatever_reports_the_log(tmp_path):
    transformers = pytest.importorskip("transformers")
    seen = []

    class Reporter(transformers.TrainerCallback):
        """What TensorBoard's and W&B's callbacks do: it takes what `on_log` is given."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, dict(logs)))

    callback = CollectCallback(samples(), tmp_path / "runs", every=2, config=CONFIG, loss=token_loss)
    train(tmp_path, [callback], [Reporter()], logging_strategy="steps", logging_steps=1)
    fisher = {step: logs for step, logs in seen if "fisher_trace" in logs}
    assert list(fisher) == [0, 2, 4]
    assert [step for step, logs in seen if "loss" in logs] == [1, 2, 3, 4]  # its own entries are not lost
    spectrum = open_run(callback.runs[1]).spectrum("layer")
    for key, block in spectrum.blocks.items():
        for name in ("trace", "largest_eigenvalue", "effective_rank"):
            assert fisher[2][f"fisher/{key}/{name}"] == block.metrics[name]
    assert all(type(value) is float for logs in fisher.values() for key, value in logs.items() if "fisher" in key)
    whole = open_run(callback.runs[1]).spectrum("none").global_
    assert fisher[2]["fisher_effective_rank"] == pytest.approx(whole.metrics["effective_rank"], rel=1e-12)


def test_steps_must_be_positive():
    with pytest.raises(ConfigError, match="every=0"):
        CollectCallback(samples(), "runs", every=0)


def test_without_transformers_the_message_says_what_to_install(monkeypatch):
    import streamfisher.callbacks as module

    original = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "streamfisher.callbacks")
    fresh = importlib.import_module("streamfisher.callbacks")
    with pytest.raises(MissingExtraError, match=r"streamfisher\[hf\]"):
        fresh.CollectCallback(samples(), "runs", every=1)
    monkeypatch.undo()
    sys.modules["streamfisher.callbacks"] = module
