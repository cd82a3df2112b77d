"""Models, data and environments as users bring them: they work, or one sentence says what to do."""

import os
import signal
import subprocess
import sys
from collections import UserDict

import numpy as np
import pytest
import torch
from tiny_models import TinyRegression, vectors
from torch import nn
from torch.nn.utils import weight_norm

import streamfisher as sf
from streamfisher.errors import DataError, LossError, ModelError
from streamfisher.store import RunStore

SAMPLES = [
    {"x": torch.randn(5, generator=torch.Generator().manual_seed(i)), "labels": torch.tensor(i % 3)} for i in range(8)
]


def collected(path, model, samples=SAMPLES, **options):
    loss = options.pop("loss", None)
    return sf.collect(model, samples, path, loss=loss, config=sf.SpectralConfig(**{"chunk_size": 4} | options))


class Empty(nn.Linear):
    def __init__(self):
        super().__init__(5, 3)
        self.placeholder = nn.Parameter(torch.empty(0))


class Named(nn.Module):
    def __init__(self, *names):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ParameterDict({name: torch.randn(5, 3) for name in names})

    def forward(self, x):
        return sum(x @ part for part in self.parts.values())


def test_a_parameter_without_elements_is_excluded_by_name(tmp_path):
    run = collected(tmp_path / "run", Empty())
    assert run.manifest.excluded == {"placeholder": "has no elements (shape (0,))"}
    assert run.spectrum("none").global_.trace > 0


def test_names_longer_than_those_of_files_are_kept_apart_and_read_back(tmp_path):
    long, other = "w" * 300, "w" * 299 + "v"
    run = collected(tmp_path / "run", Named(long, other, "ü" * 100))
    spectrum = run.spectrum("parameter")
    assert set(spectrum.blocks) == {f"parts.{long}", f"parts.{other}", f"parts.{'ü' * 100}"}
    short = collected(tmp_path / "short", Named("a", "b", "c")).spectrum("parameter")
    for one, two in zip(spectrum.blocks.values(), short.blocks.values(), strict=True):
        assert np.array_equal(one.eigenvalues, two.eigenvalues)
    assert sf.verify(run) == []


def test_weight_norm_is_cast_with_its_model(tmp_path):
    torch.manual_seed(0)
    model = weight_norm(nn.Linear(5, 3))
    model(torch.randn(2, 5))
    run = collected(tmp_path / "run", model, dtype_model="float64")
    assert {item["dtype"] for item in run.manifest.parameters} == {"float64"}
    own = [{"x": sample["x"].double(), "labels": sample["labels"]} for sample in SAMPLES]
    expected = collected(tmp_path / "own", weight_norm_in_double(), own)
    np.testing.assert_allclose(
        run.spectrum("none").global_.eigenvalues, expected.spectrum("none").global_.eigenvalues, rtol=1e-9
    )


def weight_norm_in_double():
    torch.manual_seed(0)
    return weight_norm(nn.Linear(5, 3)).double()


def test_a_model_that_cannot_be_copied_says_how_to_cast_it(tmp_path):
    model = nn.Linear(5, 3)
    model.generator = (number for number in range(3))
    with pytest.raises(ModelError, match=r"cannot be copied to be cast.*Cast it yourself"):
        collected(tmp_path / "run", model, dtype_model="float64")


def test_dtype_model_holds_in_memory_too():
    batch = {"x": torch.stack([s["x"] for s in SAMPLES]), "labels": torch.arange(8) % 3}
    for mode in ("full", "streaming"):
        config = sf.SpectralConfig(storage_mode=mode, dtype_model="float64")
        found = sf.FisherSpectral(config).compute_fisher_spectrum(nn.Linear(5, 3), batch)
        assert found["metadata"]["dtype_model"] == "float64"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(5, 3))), "TorchScript.*scripted or traced from"),
        (lambda: nn.LazyLinear(3), "has no shape yet.*Call the model once"),
        (lambda: nn.DataParallel(nn.Linear(5, 3)), r"DataParallel.*model\.module"),
    ],
)
def test_models_that_no_hook_sees_into_are_refused_with_the_remedy(make, message, tmp_path):
    with pytest.raises(ModelError, match=message):
        collected(tmp_path / "run", make())


def test_labels_of_any_integer_dtype_are_classes(tmp_path):
    narrow = [{**sample, "labels": sample["labels"].to(torch.int32)} for sample in SAMPLES]
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    assert np.array_equal(collected(tmp_path / "a", model, narrow).losses, collected(tmp_path / "b", model).losses)


def test_batches_in_nanogpt_s_words_are_told_the_names(tmp_path):
    data = {"idx": torch.zeros(4, 3, dtype=torch.long), "targets": torch.zeros(4, 3, dtype=torch.long)}
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
    with pytest.raises(LossError, match="Call the targets 'labels' and token ids 'input_ids'"):
        collected(tmp_path / "run", model, data)


def test_one_logit_with_integer_labels_is_refused_with_the_remedy(tmp_path):
    data = {"x": vectors(8)["x"], "labels": torch.arange(8) % 2}
    with pytest.raises(LossError, match="binary_cross_entropy_with_logits"):
        collected(tmp_path / "run", nn.Linear(3, 1), data)


def test_a_batch_norm_of_batch_statistics_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    with pytest.raises(
        (LossError, ModelError), match=r"1 is a batch norm without running statistics|Expected more than 1"
    ):
        collected(tmp_path / "run", model)


class _Halved(torch.autograd.Function):
    """Its backward pass depends on the batch, and its forward pass does not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad / len(grad)


class Halved(nn.Linear):
    def forward(self, x):
        return _Halved.apply(super().forward(x))


def test_equal_losses_with_other_gradients_are_not_called_coupled(tmp_path):
    with pytest.raises(LossError, match=r"and its loss of .* does not: the backward pass depends on the batch"):
        collected(tmp_path / "run", Halved(5, 3))


def test_a_field_of_the_data_does_not_stand_for_the_run_s_own(tmp_path):
    data = [{**sample, "loss": torch.tensor(7.0), "n_targets": torch.tensor(3)} for sample in SAMPLES]
    fields = collected(tmp_path / "run", nn.Linear(5, 3), data).store.samples.fields()
    assert fields["data_loss"].tolist() == [7.0] * 8 and fields["data_n_targets"].tolist() == [3.0] * 8
    assert 7.0 not in fields["loss"] and fields["n_targets"].tolist() == [1.0] * 8


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sf.collect(TinyRegression(), vectors(), "~/run")
    assert (tmp_path / "run" / "manifest.json").is_file() and sf.open_run("~/run").n_samples == 8
    assert RunStore("~/run").path == tmp_path / "run"


def test_a_local_rank_that_was_left_behind_makes_nobody_a_rank(tmp_path, monkeypatch):
    from accelerate.state import PartialState

    monkeypatch.setenv("LOCAL_RANK", "0")
    PartialState._reset_state()
    try:
        assert sf.collect(TinyRegression(), vectors(), tmp_path / "run").info()["complete"]
        assert os.environ["LOCAL_RANK"] == "0"
    finally:
        PartialState._reset_state()


def test_a_data_loader_is_no_batch_of_the_one_call_face():
    with pytest.raises(DataError, match=r"batch is a DataLoader.*streamfisher\.collect"):
        sf.FisherSpectral().compute_fisher_spectrum(nn.Linear(5, 3), torch.utils.data.DataLoader(SAMPLES))


def test_what_no_tensor_can_be_made_of_is_refused(tmp_path):
    with pytest.raises(DataError, match="list of dicts"):
        collected(tmp_path / "run", nn.Linear(5, 3), UserDict(input_ids=[[1, 2, 3], [4, 5]]))


def test_a_forked_process_solves_and_reduces(tmp_path):
    run = collected(tmp_path / "run", nn.Linear(5, 3))
    expected = run.spectrum("none").global_.eigenvalues
    for name in run.parameters:
        run.store.grams.forget(name)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # of one that waits for ever
        code = 1
        try:
            found = sf.open_run(run.path).spectrum("none").global_.eigenvalues
            code = 0 if np.array_equal(found, expected) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
def test_a_process_forked_after_threads_were_used_collects_with_one(tmp_path):
    """In processes of their own, as OpenMP keeps its threads: a child that waits for them is ended by its alarm."""
    program = """
import os, signal, sys, torch, streamfisher as sf
torch.set_num_threads(2)
model, data = torch.nn.Linear(700, 300), {"x": torch.randn(300, 700), "labels": torch.arange(300)}
sf.collect(model, data, sys.argv[1] + "/parent")
if os.fork() == 0:
    signal.alarm(120)
    run = sf.collect(model, data, sys.argv[1] + "/child")
    os._exit(0 if run.spectrum("none").global_.trace > 0 else 1)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) != 0)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "torch works with one thread here" in ended.stderr
