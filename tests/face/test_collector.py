"""A run every n steps of any loop, and training goes on as if nothing had happened."""

import random
from pathlib import Path

import collector_loop
import numpy as np
import pytest
import torch
from rank_processes import finished, launch
from tiny_models import TinyCausal
from torch import nn

from streamfisher import Collector, SpectralConfig, compare, open_run
from streamfisher.errors import ConfigError, RunMismatchError

CONFIG = SpectralConfig(chunk_size=4, n_workers=1)


def probe(count=8):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 256, (6,), generator=generator)} for _ in range(count)]


class WithDropout(TinyCausal):
    def forward(self, input_ids):
        return nn.functional.dropout(super().forward(input_ids), 0.3, self.training)


def train(collector=None, steps=4, wrapped=False):
    """Return what every step sees: weights, draws of all generators, accumulated gradients."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = WithDropout(seed=0)
    given = nn.parallel.DistributedDataParallel(model) if wrapped else model
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.stack([sample["input_ids"] for sample in probe()])
    seen = []
    for _ in range(steps):
        optimiser.zero_grad()
        logits = given(data)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), data[:, 1:].flatten()).backward()
        optimiser.step()
        if collector is not None:
            collector.step(given)
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        draws = torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))])
        seen.append([*gradients, *weights, draws, torch.tensor(model.training)])
    return seen


class Drawing(list):
    """Samples of a data set that draws: augmentation, say."""

    def __getitem__(self, index):
        random.random()
        np.random.rand()
        torch.rand(())
        return super().__getitem__(index)


def test_a_run_every_n_steps_and_training_is_not_touched(tmp_path):
    collector = Collector(tmp_path, Drawing(probe()), every=2, config=CONFIG)
    collected, alone = train(collector), train()
    for here, there in zip(collected, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
    assert [path.name for path in collector.runs] == ["step-00000002.zarr", "step-00000004.zarr"]
    assert len(set(compare(collector.runs, "none", top=0).trajectory("trace"))) == 2


def test_dropout_is_off_while_gradients_are_taken(tmp_path):
    model = WithDropout(seed=0)
    runs = [Collector(tmp_path / name, probe(), every=1, config=CONFIG).step(model) for name in "ab"]
    assert runs[0].spectrum("none").global_.trace == runs[1].spectrum("none").global_.trace
    assert model.training


def test_steps_are_counted_or_given_and_one_step_has_one_run(tmp_path):
    model = TinyCausal(seed=0)
    collector = Collector(tmp_path, probe(), every=2, config=CONFIG)
    given = [collector.step(model, step) for step in (0, 1, 2, 2, 3)]
    assert [run is not None for run in given] == [True, False, True, False, False]
    assert collector.step(model).path.name == "step-00000004.zarr"


def test_training_that_is_resumed_goes_on_and_other_weights_are_refused(tmp_path):
    model = TinyCausal(seed=0)
    Collector(tmp_path, probe(), every=2, config=CONFIG).step(model, 2)
    again = Collector(tmp_path, probe(), every=2, config=CONFIG)
    assert again.step(model, 2).path == tmp_path / "step-00000002.zarr"
    with pytest.raises(RunMismatchError, match="other values"):
        Collector(tmp_path, probe(), every=2, config=CONFIG).step(TinyCausal(seed=5), 2)


def test_metrics_of_the_whole_and_of_each_block_are_logged(tmp_path):
    logged = {}
    log = lambda metrics, step: logged.update({step: metrics})  # noqa: E731
    run = Collector(tmp_path, probe(), every=3, config=CONFIG, log=log).step(TinyCausal(seed=0), 3)
    spectrum = open_run(run.path).spectrum("layer")
    assert list(logged) == [3]
    assert logged[3]["fisher_trace"] == spectrum.whole.trace
    for key, block in spectrum.blocks.items():
        assert logged[3][f"fisher/{key}/effective_rank"] == block.effective_rank


def test_a_loop_under_autocast_gives_the_gradients_of_the_model_s_own_arithmetic(tmp_path):
    model = TinyCausal(seed=0)
    outside = Collector(tmp_path / "a", probe(), every=1, config=CONFIG).step(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = Collector(tmp_path / "b", probe(), every=1, config=CONFIG).step(model)
        assert torch.is_autocast_enabled("cpu")
    assert outside.spectrum("none").global_.trace == inside.spectrum("none").global_.trace


def test_without_samples_or_with_no_steps_it_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match="no samples"):
        Collector(tmp_path, every=1).step(TinyCausal(seed=0))
    with pytest.raises(ConfigError, match="every=0"):
        Collector(tmp_path, probe(), every=0)
    assert Collector(tmp_path, every=1, config=CONFIG).step(TinyCausal(seed=0), samples=probe()).n_samples == 8


def test_ranks_under_ddp_share_the_work_and_go_on_as_without_it(tmp_path):
    loop = str(Path(collector_loop.__file__))
    printed = {every: sorted(finished(launch(2, [loop, str(tmp_path / every), every])).splitlines()) for every in "29"}
    with_runs, without = ([line.split(" logged ") for line in lines] for lines in printed.values())
    assert [weights for weights, _ in with_runs] == [weights for weights, _ in without]
    assert [steps for _, steps in with_runs] == ["[2, 4]", "[]"]  # the first rank logs
    runs = sorted(path.name for path in (tmp_path / "2").iterdir())
    assert runs == ["step-00000002.zarr", "step-00000004.zarr"] and not (tmp_path / "9").exists()
    assert open_run(tmp_path / "2" / runs[1]).info()["complete"]
