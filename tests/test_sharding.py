"""FSDP2 on two ranks gives the rows, Grams and spectrum of the plain model, byte for byte, with unequal shares."""

import pytest
import torch
from command_line import cli
from rank_processes import bytes_of, finished, launch
from torch import nn

from streamfisher.samples import make_units
from streamfisher.sharding import _blocks, idle_batches, share_of


def command(out, *options):
    model = ["streamfisher.demo:load_demo_model", "streamfisher.demo:demo_dataset", "--max-length", "24", "--quiet"]
    cut = ["--samples", "18", "--chunk-size", "4", "--batch-tokens", "50", "--deterministic", "--workers", "1"]
    return ["-m", "streamfisher", "run", *model, *cut, "--out", str(out), *options]


def test_the_steps_of_all_ranks_are_the_same_in_number():
    units = make_units(19, 4)
    lengths = [10 + number for number in range(19)]
    for count in (1, 2, 3, 7):
        shares = [share_of(units, rank, count) for rank in range(count)]
        assert sorted(unit.index for share in shares for unit in share) == [0, 1, 2, 3, 4]
        idle = [idle_batches(units, lengths, 40, rank, count) for rank in range(count)]
        assert min(idle) == 0 and all(number >= 0 for number in idle)
    assert idle_batches(units, lengths, 10**6, 1, 2) == 1  # two units against three


def test_layers_are_sharded_by_themselves():
    inner = nn.ModuleList([nn.Linear(2, 2)])
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": inner}), nn.Linear(2, 2)])})
    assert _blocks(model) == list(model["layers"])


def test_one_rank_is_refused(tmp_path, capsys):
    if torch.distributed.is_initialized():
        pytest.skip("a process group is there")
    assert cli(*command(tmp_path / "run.zarr", "--fsdp")[2:]) == 2
    assert "--fsdp spreads the weights over ranks and needs at least 2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--store-centered"]])
def test_two_ranks_with_sharded_weights_give_the_bytes_of_one(options, tmp_path):
    plain, sharded = tmp_path / "plain.zarr", tmp_path / "sharded.zarr"
    finished(launch(1, command(plain, *options), 0))
    finished(launch(2, command(sharded, "--fsdp", *options), 29600 + len(options)))
    assert bytes_of(plain) == bytes_of(sharded)
