"""FSDP2 on two ranks gives the rows, Grams and spectrum of the plain model, byte for byte, with unequal shares."""

import json
import re

import pytest
import torch
from benchmarks.sharded_loading import peaks_of
from command_line import cli
from forked_commands import forked
from rank_processes import bytes_of, finished, launch, markers
from torch import nn

from streamfisher import load_model
from streamfisher.collection import guarded_steps, idle_batches, share_of
from streamfisher.data import batches_of, guarded_batches, make_units
from streamfisher.errors import ConfigError, ModelError
from streamfisher.models.sharding import _blocks


def command(out, *options):
    model = ["streamfisher.demo:load_demo_model", "streamfisher.demo:demo_dataset", "--max-length", "24", "--quiet"]
    cut = ["--samples", "18", "--chunk-size", "4", "--batch-tokens", "50", "--deterministic", "--workers", "1"]
    return ["-m", "streamfisher", "run", *model, *cut, "--out", str(out), *options]


class Cut:
    """The batches of some sequences, without the sequences."""

    def __init__(self, batch_tokens):
        self.batch_tokens = batch_tokens

    def of(self, unit):
        return batches_of(unit, [10 + number for number in range(19)], self.batch_tokens)


def test_the_steps_of_all_ranks_are_the_same_in_number():
    units = make_units(19, 4)
    for count in (1, 2, 3, 7):
        shares = [share_of(units, rank, count) for rank in range(count)]
        assert sorted(unit.index for share in shares for unit in share) == [0, 1, 2, 3, 4]
        idle = [idle_batches(units, Cut(40), rank, count) for rank in range(count)]
        assert min(idle) == 0 and all(number >= 0 for number in idle)
    assert idle_batches(units, Cut(10**6), 1, 2) == 1  # two units against three


def test_layers_are_sharded_by_themselves():
    inner = nn.ModuleList([nn.Linear(2, 2)])
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": inner}), nn.Linear(2, 2)])})
    assert _blocks(model) == list(model["layers"])


def test_one_rank_is_refused(tmp_path, capsys):
    if torch.distributed.is_initialized():
        pytest.skip("a process group is there")
    assert cli(*command(tmp_path / "run.zarr", "--fsdp")[2:]) == 2
    assert "--fsdp spreads the weights over ranks and needs at least 2" in capsys.readouterr().err


def test_all_ranks_know_who_forms_which_guarded_batch_in_which_step():
    units = make_units(19, 4)
    for count in (1, 2, 3, 7):
        guarded = guarded_batches((batch for unit in units for batch in Cut(40).of(unit)), 2, seed=0)
        steps = guarded_steps(units, Cut(40), guarded, count)
        assert sorted(batch for step in steps.values() for _, batch in step) == sorted(guarded)
        for rank in range(count):  # walk through the rank's steps
            formed = [batch for unit in share_of(units, rank, count) for batch in Cut(40).of(unit)]
            for number, batch in enumerate(formed):
                assert ((rank, batch) in steps.get(number, [])) == (batch in guarded)
    assert guarded_steps(units, Cut(40), [], 2) == {}


@pytest.fixture
def guard_always(tmp_path):
    (tmp_path / "config.yaml").write_text("guard_every: 1\n")
    return ["--config", str(tmp_path / "config.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "options"),
    [
        (launch, []),
        (forked, ["--store-centered"]),
        (forked, ["--keep-gradients", "none", "--hold", "host"]),
        (forked, ["--keep-gradients", "none", "--hold", "host", "--representation", "dense"]),
    ],
    ids=["by torchrun", "forked, centered", "factors held by their ranks", "rows held by their ranks"],
)
def test_two_ranks_with_sharded_weights_give_the_bytes_of_one(start, options, guard_always, tmp_path):
    plain, sharded = tmp_path / "plain.zarr", tmp_path / "sharded.zarr"
    finished(start(1, command(plain, *guard_always, *options)))
    finished(start(2, command(sharded, "--fsdp", *guard_always, *options)))
    assert bytes_of(plain) == bytes_of(sharded)


@pytest.mark.slow
def test_the_guard_finds_a_wrong_row_of_any_rank_and_stops_all(guard_always, tmp_path):
    out = tmp_path / "run.zarr"
    where = ["rank_models:rows_of_rank_1_spoilt", "rank_models:thirty_vectors", "--out", str(out), "--chunk-size", "2"]
    process = forked(2, ["-m", "streamfisher", "collect", *where, "--fsdp", "--quiet", *guard_always])
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    found = re.findall(
        r"error: the gradient rows of second.weight do not sum to its .* on samples from (\d+) on", errors
    )
    assert found == ["2", "2"], errors[-2000:]
    assert markers(out) <= 1  # rank 0's first unit


@pytest.mark.slow
def test_more_ranks_than_units_leave_some_idle_and_change_nothing(guard_always, tmp_path):
    found = []
    for name, count, options in (("one", 1, []), ("claimed", 3, []), ("sharded", 3, ["--fsdp"])):
        what = ["rank_models:slow", "rank_models:thirty_vectors", "--out", str(tmp_path / name), "--samples", "4"]
        what += ["--chunk-size", "2", "--deterministic", "--workers", "1", "--quiet", *guard_always, *options]
        finished(forked(count, ["-m", "streamfisher", "run", *what], SECONDS="0"))
        found.append(bytes_of(tmp_path / name))
    assert found[0] == found[1]
    one, sharded = (json.loads(files.pop("spectrum.json")) for files in (found[0], found[2]))
    assert found[0] == found[2]
    for spectrum in (one, sharded):  # averages over three ranks round, and the probe's references are such
        spectrum["metadata"].pop("coverage_squared_norm")
    assert one == sharded


# Checkpoints


def llama(folder, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=257, **sizes, **options))
    model.save_pretrained(folder, max_shard_size="10KB")
    return model


@pytest.mark.slow
def test_a_checkpoint_that_each_rank_reads_in_part_gives_the_bytes_of_the_plain_run(guard_always, tmp_path):
    llama(tmp_path / "hf", tie_word_embeddings=True)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    bytes_found = []
    for count, options in ((1, []), (2, ["--fsdp"])):
        out = tmp_path / f"{count}.zarr"
        what = [str(tmp_path / "hf"), "tiny_models:sequences", "--out", str(out), "--chunk-size", "2", "--quiet"]
        what += ["--deterministic", "--workers", "1", *guard_always, *options]
        finished(forked(count, ["-m", "streamfisher", "run", *what]))
        bytes_found.append(bytes_of(out))
    assert bytes_found[0] == bytes_found[1]
    assert not any("lm_head" in name for name in bytes_found[1]), "tied to the embedding"


@pytest.mark.slow
def test_a_rank_holds_its_part_of_a_checkpoint_only():
    whole, part = (
        peaks_of(2, way, dtype="bfloat16", layers=4) for way in ("whole, then sharded", "each rank its part")
    )
    for rank in range(2):
        assert part.anonymous[rank] < 0.7 * whole.anonymous[rank]
        assert part.resident[rank] < 0.8 * whole.resident[rank]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda weights: weights.pop("model.norm.weight"),
            r"lacks model.norm.weight, and what it lacks would be drawn",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.zeros(7)}),
            r"model.norm.weight has the shape \(7,\) in the checkpoint and \(16,\) in the model. The weights belong",
        ),
    ],
    ids=["lacking", "of another shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_is_drawn_at_random(spoil, message, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = {name: value.clone() for name, value in llama(tmp_path).state_dict().items()}
    for file in tmp_path.glob("model*"):
        file.unlink()
    spoil(weights)
    safetensors.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        load_model(str(tmp_path))


def test_tensors_that_have_no_place_are_named_and_a_damaged_file_is_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = llama(tmp_path)
    weights = {name: value.clone() for name, value in model.state_dict().items()} | {"more": torch.zeros(3)}
    for old in tmp_path.glob("model*"):
        old.unlink()
    file = tmp_path / "model.safetensors"
    safetensors.save_file(weights, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"more of the checkpoint have no place in a LlamaForCausalLM"):
        loaded = load_model(str(tmp_path))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match="its weights are damaged"):
        load_model(str(tmp_path))


def test_sharding_and_a_device_map_exclude_each_other():
    with pytest.raises(ConfigError, match="--fsdp spreads the weights over ranks and --device-map over devices"):
        load_model("streamfisher.demo:load_demo_model", sharded=True, device_map="auto")
