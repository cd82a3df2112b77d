"""A run is resumed or grown by what behaves as it did, whatever its names: losses and norms are its fingerprint."""

import functools

import pytest
import torch
from tiny_models import sequences, vectors
from torch import nn
from torch.nn.functional import cross_entropy, gelu

import streamfisher as sf
from streamfisher.errors import RunMismatchError
from streamfisher.store import RunStore

COLUMNS = {
    "plain": {},
    "waves": {"disk_budget": 150_000, "representation": "dense", "hold": "disk"},
    "held in memory": {"keep_gradients": "none", "hold": "host"},
    "centered": {"store_centered": True},
    "projected": {"project": 3},
    "dense": {"representation": "dense"},
    "deterministic": {"use_deterministic": True},
    "drawn labels": {"labels": "model"},
    "tokens": {"sample_unit": "token"},
}


class Net(nn.Module):
    """A causal model whose code and constants differ between calls, but neither its class nor its weights."""

    is_causal = True

    def __init__(self, act=torch.tanh, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.head = nn.Embedding(256, 6), nn.Linear(6, 8), nn.Linear(8, 256)
        self.act, self.scale = act, scale

    def forward(self, input_ids):
        return self.head(self.act(self.first(self.embedding(input_ids) * self.scale)))


def config(**options):
    return sf.SpectralConfig(**{"chunk_size": 4, "batch_tokens": 20, "n_workers": 1} | options)


def made(path, model, n=12, loss=None, dtype=torch.float32, **options):
    return sf.collect(model.to(dtype), sequences(12), path, n_samples=n, loss=loss, config=config(**options))


def unfinished(path, what="rows"):
    """Leave of a run only the first unit, as a kill would."""
    store = RunStore(path)
    for unit in store.units[1:]:
        store.forget_unit(unit)
    for name in store.gram_members:
        store.grams.forget(name)


@pytest.mark.parametrize("name", COLUMNS)
def test_another_activation_is_refused_and_the_same_one_is_not(tmp_path, name):
    run = made(tmp_path / "run", Net(), **COLUMNS[name])
    if name == "waves":
        assert len(run.store.waves) > 1
    unfinished(run.path)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file() and path.name != "lock"}
    with pytest.raises(RunMismatchError, match=r"sample \d+ has the loss .* in the run; now they are"):
        made(tmp_path / "run", Net(torch.relu), **COLUMNS[name])
    after = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file() and path.name != "lock"}
    assert before == after, "nothing was changed"
    assert made(tmp_path / "run", Net(), **COLUMNS[name]).info()["complete"]


@pytest.mark.parametrize(
    "other", [Net(gelu), Net(scale=1.001), Net(functools.partial(nn.functional.dropout, p=0.2, training=True))]
)
def test_small_and_random_differences_are_found_in_float32(tmp_path, other):
    made(tmp_path / "run", Net(functools.partial(gelu, approximate="tanh")), 8)
    with pytest.raises(Exception, match=r"cannot be resumed|is random"):
        made(tmp_path / "run", other)


def per_sample(factor):
    def loss(model, batch):
        logits = model(batch["input_ids"])[:, :-1]
        return factor * cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").sum(1)

    return loss


def detached(model, batch):
    """The loss of `per_sample(1.0)`, with half of its gradient."""
    value = per_sample(1.0)(model, batch)
    return 0.5 * value + 0.5 * value.detach()


detached.__qualname__ = per_sample(1.0).__qualname__


@pytest.mark.parametrize("loss", [per_sample(100.0), detached], ids=["other loss", "other gradient"])
def test_another_loss_of_the_same_name_is_refused_before_the_run_grows(tmp_path, loss):
    run = made(tmp_path / "run", Net(), 6, per_sample(1.0))
    with pytest.raises(RunMismatchError, match="loss compute something else"):
        made(tmp_path / "run", Net(), 12, loss)
    with pytest.raises(RunMismatchError, match="loss compute something else"):
        sf.open_run(run.path).add(Net(), sequences(12), loss=loss)
    left = sf.open_run(run.path)
    assert left.n_samples == 6 and left.info()["complete"]
    assert made(tmp_path / "run", Net(), 12, per_sample(1.0)).n_samples == 12


def test_a_loss_that_differs_for_some_samples_only_is_refused(tmp_path):
    def weighted(weight):
        def loss(model, batch):
            weights = torch.tensor([1.0, 1.0, weight])
            return cross_entropy(model(batch["x"]), batch["labels"], weight=weights, reduction="none")

        return loss

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3))
    data = {"x": vectors(12)["x"], "labels": torch.arange(12) % 3}
    sf.collect(model, data, tmp_path / "run", config=config(), n_samples=8, loss=weighted(1.0))
    with pytest.raises(RunMismatchError, match="sample 2 has the loss"):
        sf.collect(model, data, tmp_path / "run", config=config(), loss=weighted(2.0))


def test_an_unfinished_mean_of_another_activation_is_refused(tmp_path):
    run = made(tmp_path / "run", Net(), store_centered=True)
    for marker in (run.path / "done").glob("*.json"):
        if marker.name != "mean-000000.json" and marker.name != "fields.json":
            marker.unlink()
    with pytest.raises(RunMismatchError, match="samples 0 to 3 add up to another sum"):
        made(tmp_path / "run", Net(torch.relu), store_centered=True)
    assert made(tmp_path / "run", Net(), store_centered=True).info()["complete"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_another_number_of_threads_is_no_difference(tmp_path, dtype):
    threads = torch.get_num_threads()
    try:
        for number, n in ((1, 6), (2, 9), (4, 12)):
            torch.set_num_threads(number)
            run = made(tmp_path / "run", Net(), n, dtype=dtype)
    finally:
        torch.set_num_threads(threads)
    assert run.info()["complete"] and run.n_samples == 12


def test_a_converged_model_whose_losses_are_rounding_is_resumed(tmp_path):
    torch.manual_seed(0)
    x, labels = torch.eye(3).repeat(4, 1), torch.arange(12) % 3
    model, again = nn.Linear(3, 3), nn.Linear(3, 3)
    for one, factor in ((model, 1.0), (again, 1 + 1e-7)):
        one.weight.data, one.bias.data = 16 * factor * torch.eye(3), torch.zeros(3)
    run = sf.collect(model, {"x": x, "labels": labels}, tmp_path / "run", config=config(), n_samples=8)
    assert 0 < run.losses.max() < 1e-6
    again.weight.data = model.weight.data
    sf.collect(again, {"x": x, "labels": labels}, tmp_path / "run", config=config())


def test_a_run_of_another_device_is_compared_less_strictly_and_the_message_says_so(tmp_path, monkeypatch):
    run = made(tmp_path / "run", Net(), 6)
    assert run.manifest.layout["arithmetic"] == "cpu"
    monkeypatch.setattr("streamfisher.collection.behaviour.arithmetic_of", lambda device: "cuda")
    made(tmp_path / "run", Net(scale=1.001), 9)
    with pytest.raises(
        RunMismatchError, match=r"up to 1e-02 pass as rounding \(the run was made on cpu, and .* cuda\)"
    ):
        made(tmp_path / "run", Net(torch.relu))


def test_values_that_are_damaged_are_left_to_verify(tmp_path):
    run = made(tmp_path / "run", Net(), 8)
    (run.path / "samples" / "loss" / "c" / "0").write_bytes(b"damaged")
    assert made(tmp_path / "run", Net(), 12).n_samples == 12


def test_a_mean_that_is_to_be_added_up_again_stops_nobody(tmp_path):
    from tiny_runs import make_run

    path = make_run(tmp_path / "run.zarr", store_centered=True).path
    before = (path / "mean/first.weight/c/0").read_bytes()
    for name in ("mean", "mean-000001"):
        (path / "done" / f"{name}.json").unlink()  # as `verify --repair` does
        make_run(path, store_centered=True)
        assert (path / "mean/first.weight/c/0").read_bytes() == before
