"""What a plan and a run both decide, they decide by the same functions."""

import json

import numpy as np
import pytest
import torch
from command_line import cli
from factored_models import llama, sequences
from torch import nn

import streamfisher as sf
from streamfisher.collection.producers import machine_of
from streamfisher.errors import CapacityError, ConfigError, ModelError, StreamError, StreamfisherError, first_line
from streamfisher.gradients import select_parameters
from streamfisher.planning import Machine, plan_run, this_machine, trace_model
from streamfisher.planning.costs import product_cost
from streamfisher.planning.rates import UNKNOWN
from streamfisher.planning.strategies import StrategyPlanner
from streamfisher.planning.tracing import captured_names
from streamfisher.reduction.kernels import choose_kernel, use_of
from streamfisher.reduction.tiles import needs_tiles
from streamfisher.runtime import disk_limit, of_one_rank, working_memory
from streamfisher.solving.tiled_solve import solves_dense


def test_a_tied_weight_is_excluded_by_any_of_its_names_in_plan_and_run(tmp_path):
    model = llama(tied=True)
    exclude = ["lm_head.weight"]
    assert captured_names(model, (), exclude) == list(select_parameters(model, (), exclude).tensors)
    config = sf.SpectralConfig(exclude=exclude, stream="auto", chunk_size=4)
    run = sf.collect(model, sequences(), tmp_path / "run", config=config)
    assert "model.embed_tokens.weight" not in run.parameters


def test_a_plan_needs_no_values_of_what_it_selects():
    with torch.device("meta"):
        model = llama()
    assert captured_names(model)[0] == "model.embed_tokens.weight"
    with pytest.raises(ModelError, match="meta device"):
        select_parameters(model)


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_limits_of_a_plan_are_those_of_the_run(tmp_path, monkeypatch, ranks):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    stated = sf.SpectralConfig(memory_budget="1GB", disk_budget="1PB")
    machine = this_machine(of_one_rank(stated), tmp_path)
    assert machine.memory == working_memory(of_one_rank(stated).memory_budget) == 10**9 // ranks
    # Other processes write to the disk meanwhile; a budget beyond what is free is capped, with the margin.
    assert machine.disk == pytest.approx(disk_limit(stated, tmp_path), abs=1 << 30) and machine.disk < 10**15


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_budget_is_shared_among_the_ranks_of_a_host_once(tmp_path, monkeypatch, capsys, ranks):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    config = of_one_rank(sf.SpectralConfig(memory_budget="1GB"))  # as a run has it when it chooses
    assert machine_of(llama(), config, tmp_path).memory == 10**9 // ranks
    line = (
        "plan",
        "tiny_models:causal",
        "tiny_models:sequences",
        "--memory-budget",
        "1GB",
        "--out",
        tmp_path,
        "--json",
    )
    assert cli(*line) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["memory"] == 10**9 // ranks
    assert cli(*line, "--flops", "1e12", "--disk-budget", "1PB") == 0  # another machine, as it is described
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert (machine["memory"], machine["disk"]) == (10**9, 10**15)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_a_plan_takes_the_kernels_of_the_reduction(tmp_path, n):
    model = llama()
    samples = sequences(n)
    config = sf.SpectralConfig(representation="factors", chunk_size=8)
    run = sf.collect(model, samples, tmp_path / "run", config=config)
    batch = {"input_ids": samples[0]["input_ids"][None]}
    mean = np.mean([len(sample["input_ids"]) for sample in samples])
    trace = trace_model(model, batch, causal=True).scaled(mean)
    for shape in trace.shapes:
        if run.store.rows.representation(shape.name) == "factors":
            segments, matrix = run.store.rows.segments(shape.name), run.store.rows.shape(shape.name)
            taken = choose_kernel(use_of(segments, matrix, n), single=False)
            planned = product_cost(shape, "factors", n, single=False).kernel
            slabs, pairwise = (2 * n * mean + n**2) * shape.numel, (n * mean) ** 2 * sum(matrix)
            if not 0.8 < slabs / pairwise < 1.25:  # where lengths decide, the mean may be on the other side
                assert planned == taken, shape.name


def test_a_plan_cuts_batches_as_the_run_does(tmp_path):
    samples = sequences(16)
    lengths = [len(sample["input_ids"]) for sample in samples]
    config = sf.SpectralConfig(memory_budget="200MB", batch_tokens=64, chunk_size=8)
    run = sf.collect(llama(), samples, tmp_path / "run", config=config)
    trace = trace_model(llama(), {"input_ids": samples[0]["input_ids"][None]}, causal=True)
    planner = StrategyPlanner(trace, lengths, config, this_machine(config, tmp_path), UNKNOWN)
    assert planner.batch_tokens == run.store.batch_tokens == 64


class Unfinished(nn.Module):
    """A model whose forward says nothing of why it fails."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, input_ids):
        raise NotImplementedError


@pytest.mark.parametrize("stream", ["none", "layers", "auto"])
def test_a_failure_without_words_is_named_by_its_class(tmp_path, stream):
    config = sf.SpectralConfig(stream=stream)
    with pytest.raises(StreamfisherError, match="NotImplementedError"):
        sf.collect(Unfinished(), {"input_ids": torch.ones(4, 4)}, tmp_path / "run", config=config)
    with pytest.raises(ModelError, match="NotImplementedError"):
        trace_model(Unfinished(), {"input_ids": torch.ones(1, 4)})


def test_the_first_line_of_an_empty_message_is_the_class():
    assert first_line(NotImplementedError()) == "NotImplementedError"
    assert first_line(StreamError("one\ntwo")) == "one"


def test_grams_are_counted_against_grams(tmp_path, capsys):
    run = sf.collect(llama(), sequences(), tmp_path / "run.zarr", config=sf.SpectralConfig(gram_per="layer"))
    run.build_grams()
    n = len(run.store.gram_members)
    assert n < len(run.parameters)
    assert cli("gram", tmp_path / "run.zarr") == 0
    assert f"0 Gram matrices built, {n} were there already." in capsys.readouterr().out
    assert cli("info", tmp_path / "run.zarr") == 0
    assert f"{n} of {n}" in capsys.readouterr().out


def planned(config, machine, n=24, tokens=16):
    """A plan of the small Llama and the samples it is of, all of one length."""
    samples = {"input_ids": torch.randint(0, 50, (n, tokens), generator=torch.Generator().manual_seed(0))}
    trace = trace_model(llama(), {"input_ids": samples["input_ids"][:1]}, causal=True)
    return plan_run(trace, [tokens] * n, config, machine=machine, rates=UNKNOWN), samples


@pytest.mark.parametrize("stream", ["none", "layers"])
@pytest.mark.parametrize("options", [{}, {"hold": "disk"}, {"memory_budget": "2MB"}, {"keep_gradients": ("*norm*",)}])
def test_a_plan_cuts_and_holds_what_the_run_does(tmp_path, stream, options):
    rows = 4 * 24 * sum(parameter.numel() for parameter in llama().parameters())
    options = {"chunk_size": 4, "representation": "dense", "device": "cpu", "n_workers": 1} | options
    config = sf.SpectralConfig(stream=stream, disk_budget=int(200e3 + 0.4 * rows), **options)
    plan, samples = planned(config, this_machine(config, tmp_path))
    run = sf.collect(llama(), samples, tmp_path / "run", config=config)
    layout = run.store.manifest.layout
    assert plan.chosen.fits
    assert (plan.chosen.name == "stream layers") == layout["streamed"] == (stream == "layers")
    assert plan.chosen.waves == len(layout["waves"])
    assert plan.chosen.hold == layout["hold"]


@pytest.mark.parametrize("representation", ["dense", "factors"])
def test_the_least_memory_that_a_plan_names_is_enough_for_the_run(tmp_path, representation):
    config = sf.SpectralConfig(chunk_size=4, representation=representation, device="cpu", n_workers=1, hold="disk")
    plan, samples = planned(config, Machine(memory=1000))
    assert not plan.chosen.fits
    config = config.replace(memory_budget=int(plan.least["memory"]), disk_budget=int(1.01 * plan.least["disk"]))
    assert planned(config, this_machine(config, tmp_path))[0].chosen.fits
    run = sf.collect(llama(), samples, tmp_path / "run", config=config)
    assert len(run.spectrum("none").global_.eigenvalues) == 24


@pytest.mark.parametrize("options", [{"project": 64}, {"store_centered": True}, {"labels": "model"}])
def test_a_plan_refuses_to_stream_what_the_run_refuses(tmp_path, options):
    config = sf.SpectralConfig(stream="layers", chunk_size=4, **options)
    plan, samples = planned(config, Machine())
    with pytest.raises(ConfigError) as refusal:
        sf.collect(llama(), samples, tmp_path / "run", config=config)
    assert plan.problems() == [str(refusal.value)]
    assert planned(config.replace(stream="auto"), Machine())[0].chosen.name == "waves"


def test_a_gram_that_a_run_takes_by_tiles_fits_a_plan_unless_a_dense_solve_is_asked_for():
    n, memory = 8000, 10**9  # 32 N^2 are 2 GB, and 24 N^2 more than the memory
    config = sf.SpectralConfig(memory_budget=memory, n_workers=1)
    plan, _ = planned(config, Machine(memory=memory), n=n)
    assert needs_tiles(n, memory, 4096)
    assert plan.chosen.fits and all(stage.memory <= memory for stage in plan.chosen.stages)
    assert "only the largest eigenvalues" in plan.table() and plan.to_dict()["notes"]
    refused, _ = planned(config.replace(solver="dense"), Machine(memory=memory), n=n)
    with pytest.raises(CapacityError) as refusal:
        solves_dense(n, n, config.replace(solver="dense"), memory)
    assert refused.problems() == [str(refusal.value)] and not refused.notes
    assert not planned(sf.SpectralConfig(), Machine())[0].notes


def test_projected_rows_cost_what_is_multiplied():
    plain, _ = planned(sf.SpectralConfig(representation="dense"), Machine())
    narrow, _ = planned(sf.SpectralConfig(representation="dense", project=16), Machine())
    columns = sum(min(shape.numel, 16) for shape in plain.trace.shapes)
    assert (
        plain.chosen.stages[1].flops == 2 * 24**2 * plain.trace.n_params
    )  # few columns: in float64, which counts twice
    assert narrow.chosen.stages[1].flops == 2 * 24**2 * columns
