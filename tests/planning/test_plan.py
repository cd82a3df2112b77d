"""Plans: shapes from a config alone, bytes as a run writes them, and refusals that say what would do."""

from __future__ import annotations

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from command_line import cli
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import streamfisher as sf
from streamfisher.byte_sizes import parse_bytes
from streamfisher.demo import demo_samples, load_demo_model
from streamfisher.errors import ModelError
from streamfisher.gradients import Factor, FactorPair, GradientEngine, GradientShape
from streamfisher.gradients.factors import squared_norms
from streamfisher.models import build_skeleton, resolve_loss
from streamfisher.planning import Machine, ModelTrace, Rates, RunPlan, measure, plan_run, trace_model
from streamfisher.planning.choice import streams_layers
from streamfisher.planning.costs import forming_flops, norm_flops, pass_flops, plain_flops, product_cost
from streamfisher.planning.rates import UNKNOWN

SHAPES = Path(__file__).parents[2] / "examples" / "plan"
WAVES = sf.SpectralConfig(hold="disk")
FAST = Rates(passes=1e12, products=1e12, forming=1e12, solve=1e10, write=1e9, read=1e9)


def tiny_llama(layers: int = 2, *, hidden: int = 256) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids(tokens: int, n_samples: int = 1, vocabulary: int = 256) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return {"input_ids": torch.randint(0, vocabulary, (n_samples, tokens), generator=generator)}


@cache
def trace_of(model: str) -> ModelTrace:
    """One of the example configs at 512 tokens."""
    return trace_model(build_skeleton(str(SHAPES / model)), ids(512), causal=True)


def planned(model: str, **changes) -> RunPlan:
    """A plan of one of the example configs at 1,024 samples of 512 tokens."""
    options = {"memory": 2 * 10**12, "disk": 30 * 10**12, "devices": 8, "device_memory": 80 * 10**9} | changes
    n_samples = options.pop("n_samples", 1024)
    config = options.pop("config", sf.SpectralConfig(stream="auto", hold="disk"))
    return plan_run(trace_of(model), [512] * n_samples, config, machine=Machine(**options), rates=FAST)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_example_configs_have_the_published_number_of_parameters_and_take_no_memory(model, published):
    skeleton = build_skeleton(str(SHAPES / model))
    assert sum(tensor.numel() for tensor in skeleton.parameters()) == published
    assert all(tensor.is_meta and tensor.dtype == torch.bfloat16 for tensor in skeleton.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2 with a tied head", "demo"])
def test_traced_shapes_are_those_that_a_batch_of_gradients_shows(kind):
    if kind == "llama":
        model = tiny_llama()
    elif kind == "demo":
        model = load_demo_model()
    else:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, n_positions=32)).eval()
    batch = ids(16, 3)
    traced = trace_model(model, ids(16), causal=True).shapes
    with GradientEngine(model, resolve_loss(model, batch, None)) as engine:
        engine.probe(batch)
        measured = engine.shapes(batch)[0]
    assert [shape.name for shape in traced] == [shape.name for shape in measured]
    for ours, theirs in zip(traced, measured, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        sides = [[(side.width, side.itemsize) for pair in shape.pairs for side in pair] for shape in (ours, theirs)]
        assert sorted(sides[0]) == sorted(sides[1]), ours.name
        assert sorted(ours.positions) == sorted(theirs.positions), ours.name
    keys = [
        len({side.key for shape in shapes for pair in shape.pairs for side in pair}) for shapes in (traced, measured)
    ]
    assert keys[0] == pytest.approx(keys[1], abs=1)


def test_a_config_alone_is_traced_as_the_model_itself_is():
    model = tiny_llama()
    with torch.device("meta"):
        skeleton = LlamaForCausalLM._from_config(model.config, dtype=torch.float32).eval()
    real, meta = (trace_model(m, ids(16), causal=True) for m in (model, skeleton))
    assert real.shapes == meta.shapes
    assert real.blocks == meta.blocks
    assert real.activation_bytes == meta.activation_bytes


def test_forward_operations_are_those_of_the_matrix_products_and_of_attention():
    model, tokens = tiny_llama(), 32
    trace = trace_model(model, ids(tokens), causal=True)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    attention = 2 * 4 * tokens**2 * model.config.hidden_size  # two layers, Q K^T and its product with V
    assert trace.forward_flops == 2 * tokens * matrices + attention
    assert [block.name for block in trace.blocks] == ["embedding", "layer_0", "layer_1", "other", "output"]
    assert trace.blocks[1].boundary_bytes == tokens * model.config.hidden_size * 4


def test_every_expert_of_a_fused_layer_counts_as_a_parameter_and_only_the_routed_ones_as_operations():
    trace = trace_model(build_skeleton(str(SHAPES / "mixtral-8x7b")), ids(64), causal=True)
    assert trace.n_params == 46_702_792_704
    routed = 64 * 2 * 2 * 3 * 4096 * 14336  # two experts of three matrices for each token
    layer = next(block for block in trace.blocks if block.name == "layer_0")
    assert routed < layer.forward_flops < 1.2 * routed
    assert not next(shape for shape in trace.shapes if "experts" in shape.name).pairs


def test_layers_of_encoder_and_decoder_with_the_same_number_are_told_apart():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    with torch.device("meta"):
        model = T5ForConditionalGeneration._from_config(config).eval()
    names = [block.name for block in trace_model(model, ids(8, vocabulary=64)).blocks]
    assert [name for name in names if "layer" in name] == [
        "encoder_layer_0", "encoder_layer_1", "decoder_layer_0", "decoder_layer_1"
    ]  # fmt: skip


def test_a_wave_of_the_upper_layers_costs_no_backward_through_the_lower_ones():
    blocks = trace_model(tiny_llama(layers=8), ids(32), causal=True).blocks
    forward = sum(block.forward_flops for block in blocks)
    assert pass_flops(blocks, ["model.embed_tokens.weight"]) == pytest.approx(2 * forward)
    top = pass_flops(blocks, ["lm_head.weight"])
    assert top == pytest.approx(forward + blocks[-1].forward_flops)
    middle = pass_flops(blocks, ["model.layers.4.mlp.up_proj.weight"])
    assert top < middle < 2 * forward
    assert plain_flops(blocks) == pytest.approx(3 * forward)


def a_shape(positions: float, *, m: int = 1000, n: int = 2000, by_id: bool = False) -> GradientShape:
    left = Factor("L", 1 if by_id else m, 4)
    return GradientShape("w", (m, n), torch.float32, ((left, Factor("R", n, 4)),), (positions,))


def test_products_take_the_cheapest_kernel():
    assert product_cost(a_shape(1), "factors", 512).kernel == "pairwise"
    long = product_cost(a_shape(512), "factors", 512)
    assert (long.kernel, long.forming, long.product) == ("slabs", 2 * 512 * 512 * 2e6, 512**2 * 2e6)
    assert product_cost(a_shape(512), "dense", 512).forming == 0
    assert product_cost(a_shape(512, by_id=True), "factors", 512).kernel == "tokens"
    assert forming_flops([a_shape(10)], {"w": "dense"}, "dense") == 2 * 10 * 2e6
    assert forming_flops([a_shape(10)], {"w": "factors"}, "dense") == 0
    assert forming_flops([a_shape(10)], {"w": "factors"}, "factors") == 2 * 10 * 2e6


@pytest.mark.parametrize("positions", [4, 200])
def test_operations_of_norms_are_those_that_are_done(positions):
    pair = FactorPair(torch.randn(3, positions, 40), torch.randn(3, positions, 50))
    shape = a_shape(positions, m=40, n=50)

    def in_place(_, a, b, *rest, out_shape=None, **options):  # torch counts baddbmm, but not when it is in place
        return 2 * a[0] * a[1] * a[2] * b[2]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place}) as counter:
        squared_norms([pair])
    assert counter.get_total_flops() == 3 * norm_flops([shape], {"w": "factors"})
    assert norm_flops([shape], {"w": "dense"}) == 0


def test_a_7b_model_on_one_node_fits_in_one_wave_of_factors_and_not_as_rows():
    plan = planned("llama-2-7b", disk=3 * 10**12)
    dense, once, waves, streamed = plan.strategies
    assert dense.gradients == pytest.approx(4 * 1024 * 6_738_415_616)
    assert once.gradients == pytest.approx(1024 * 511 * 4.2e6, rel=0.03)  # 4.2 MB for each token
    assert not dense.fits
    assert waves.fits and waves.waves == 1 and plan.chosen is waves
    assert streamed.disk < 0.1 * once.disk


def test_less_disk_takes_more_waves_and_more_passes_and_never_more_than_the_budget():
    seen = []
    for disk in (3000, 1000, 300, 100):
        way = planned("llama-2-7b", disk=disk * 10**9, config=WAVES).chosen
        assert way.fits and way.disk <= disk * 10**9
        seen.append((way.waves, way.passes))
    assert seen == sorted(seen) and len(set(seen)) == 4
    assert 0.33 * seen[-1][0] < seen[-1][1] < 0.67 * seen[-1][0]


def test_a_model_larger_than_the_device_streams_its_layers():
    plan = planned("llama-3-70b", devices=1)
    assert (
        "do not fit 1 device" in plan.strategies[2].problems[0] and "--stream layers" in plan.strategies[2].problems[0]
    )
    assert plan.chosen.name == "stream layers" and plan.chosen.fits
    sizes = {block.name: block.weight_bytes for block in plan.trace.blocks}
    around = sum(size for name, size in sizes.items() if not name.startswith("layer_"))
    assert plan.chosen.weights == around + 2 * sizes["layer_0"]
    hidden = 1024 * 512 * 8192 * 2
    assert plan.chosen.boundaries == pytest.approx(82 * hidden, rel=0.02)  # after the embedding, 80 layers, a gradient


@pytest.mark.parametrize(
    ("disk", "waves", "streamed"), [(3000, 1, False), (1500, 2, False), (1000, 3, True), (500, 5, True)]
)
def test_auto_streams_layers_where_waves_take_clearly_longer(disk, waves, streamed):
    config = sf.SpectralConfig(stream="auto", hold="disk")
    plan = planned("llama-2-7b", disk=disk * 10**9, devices=0, device_memory=None, config=config)
    ordinary, layers = plan.strategies[2:]
    assert ordinary.fits and layers.fits and ordinary.waves == waves
    assert plan.chosen is (layers if streamed else ordinary)


@pytest.mark.parametrize(("hold", "name", "place"), [("auto", "stream layers", "device"), ("disk", "waves", "disk")])
def test_auto_counts_where_each_way_holds_its_gradients(hold, name, place):
    one_device = {"devices": 1, "device_memory": 80 * 10**9, "memory": 100 * 10**9, "disk": 3 * 10**12}
    config = sf.SpectralConfig(stream="auto", hold=hold, keep_gradients=())
    plan = planned("llama-2-7b", n_samples=512, config=config, **one_device)
    waves, layers = plan.strategies[2:]
    assert waves.fits and waves.hold == "disk" and waves.passes < layers.passes
    assert (plan.chosen.name, plan.chosen.hold) == (name, place)


def test_the_way_does_not_depend_on_rates_that_differ_from_one_minute_to_the_next():
    args = ([512] * 1024, sf.SpectralConfig(stream="auto", hold="disk"))
    machine = Machine(memory=2 * 10**12, disk=500 * 10**9)
    names = [
        plan_run(trace_of("llama-2-7b"), *args, machine=machine, rates=rates).chosen.name
        for rates in (FAST, UNKNOWN, FAST.given(passes=1e15, write=1e6))
    ]
    assert names == ["stream layers"] * 3 and streams_layers(trace_of("llama-2-7b"), *args, machine)


def test_what_is_held_beside_a_device_is_moved_and_reduced_by_the_host():
    rates = dataclasses.replace(FAST, transfer=1e9, host_products=1e11, host_forming=1e11)
    seconds = {}
    for hold in ("device", "host"):
        options = {"memory": 2 * 10**12, "disk": 30 * 10**12, "devices": 1, "device_memory": 10**12}
        config = sf.SpectralConfig(stream="layers", hold=hold, keep_gradients=())
        plan = plan_run(trace_of("llama-2-7b"), [512] * 512, config, machine=Machine(**options), rates=rates)
        seconds[hold] = {stage.name: stage.seconds for stage in plan.chosen.stages}
        factors = sum(block.stored for block in plan.blocks)
    assert seconds["host"]["collect"] - seconds["device"]["collect"] == pytest.approx(factors / 1e9, rel=0.01)
    assert seconds["host"]["reduce"] == pytest.approx(10 * seconds["device"]["reduce"], rel=0.01)


def test_a_smaller_device_takes_layers_in_parts_and_leaves_to_the_host_what_alone_is_too_large():
    rates = dataclasses.replace(FAST, transfer=1e9, host_products=1e11, host_forming=1e11)
    ways = {}
    for device_memory in (80, 60, 40, 20):
        options = {"memory": 2 * 10**12, "disk": 30 * 10**12, "devices": 1, "device_memory": device_memory * 10**9}
        config = sf.SpectralConfig(stream="layers", keep_gradients=())
        plan = plan_run(trace_of("llama-2-7b"), [512] * 512, config, machine=Machine(**options), rates=rates)
        ways[device_memory] = plan.chosen
        text = plan.summary()
        assert (
            ("of them in host memory" in text)
            == ("on the device and in memory" in plan.table())
            == (device_memory == 40)
        )
    assert [way.hold for way in ways.values()] == ["device", "device", "device", "host"]
    head = 512 * 512 * (32_000 + 4_096) * 2  # bytes of its factors in bfloat16
    assert [way.away for way in ways.values()] == [0, 0, pytest.approx(head, rel=0.01), 0]
    assert ways[80].waves < ways[60].waves and ways[80].passes == pytest.approx(1.0)
    assert 1 < ways[60].passes < ways[40].passes < 3
    seconds = [way.seconds for way in ways.values()]
    assert seconds == sorted(seconds) and seconds[3] > 1.5 * seconds[2]


def test_the_plan_says_what_a_kill_costs_and_auto_keeps_it_low():
    machine = {"memory": 2 * 10**12, "disk": 30 * 10**12, "devices": 1, "device_memory": 10**13}
    ways, said = {}, {}
    for stream, hold, n in (
        *(("none", hold, 512) for hold in ("disk", "device")),
        ("layers", "device", 512),
        *(("auto", "device", n) for n in (512, 2048)),
    ):
        config = sf.SpectralConfig(stream=stream, hold=hold, keep_gradients=())
        plan = planned("llama-2-7b", n_samples=n, config=config, **machine)
        ways[stream, hold, n], said[stream, hold, n] = plan.chosen, plan.table() + plan.summary()
    disk, whole, layers, short, long = ways.values()
    assert disk.at_risk == 0 and "what was written is there" in said["none", "disk", 512]
    assert whole.waves == 1 and whole.at_risk == whole.until_grams > 600
    assert re.search(r"A kill costs the pass, about [\d.]+ (min|h)\.", said["none", "device", 512])
    assert re.search(r"about [\d.]+ (min|h), of which a kill costs about [\d.]+ (min|h)\n", said["none", "device", 512])
    forward = layers.stages[0].seconds / 3
    assert layers.at_risk == pytest.approx(forward + layers.until_grams / layers.waves, rel=0.05)
    assert "the wave in flight and the forward pass, about" in said["layers", "device", 512]
    assert (short.name, long.name) == ("waves", "stream layers") and long.at_risk < long.until_grams / 5


def test_boundaries_of_what_a_device_holds_stay_in_host_memory_where_they_fit():
    ways = {}
    for memory in (200, 50):
        options = {"memory": memory * 10**9, "disk": 10**12, "devices": 1, "device_memory": 80 * 10**9}
        config = sf.SpectralConfig(stream="layers", hold="device", keep_gradients=())
        ways[memory] = planned("llama-2-7b", n_samples=512, config=config, **options).chosen
    near, far = ways[200], ways[50]
    assert near.fits and near.hold == "device" and near.boundaries == far.boundaries
    assert near.stages[0].written == 0 and near.disk < 1e9
    assert far.stages[0].written == pytest.approx(far.boundaries - 0.6 * 50e9, rel=1e-6)
    assert near.seconds < far.seconds


def test_boundaries_that_do_not_fit_are_recomputed_at_a_price():
    wide = planned("llama-3-70b", devices=1).chosen
    tight = planned(
        "llama-3-70b", devices=1, memory=10**11, disk=3 * 10**11, config=sf.SpectralConfig(chunk_size=8, stream="auto")
    )
    assert tight.chosen.name == "stream layers" and tight.chosen.every > 1
    assert wide.passes == pytest.approx(1.0)
    assert 1.0 < tight.chosen.passes < 4 / 3
    assert tight.chosen.boundaries < wide.boundaries


@pytest.mark.parametrize("changes", [{"disk": 10**9}, {"memory": 2 * 10**7}])
def test_what_does_not_fit_says_what_would(changes):
    plan = planned("llama-2-7b", **changes, config=WAVES)
    assert plan.problems() and not plan.chosen.fits
    sentence = plan.table().splitlines()[-1]
    found = re.fullmatch(r"The least .*: --disk-budget (\S+) --memory-budget (\S+)\.", sentence)
    least = {"disk": parse_bytes(found[1]), "memory": parse_bytes(found[2])}
    assert planned("llama-2-7b", **least, config=WAVES).chosen.fits
    for what, size in least.items():
        assert not planned("llama-2-7b", **least | {what: int(0.9 * size)}, config=WAVES).chosen.fits


def logical_bytes(run: Path, *groups: str) -> int:
    """The uncompressed bytes of all arrays in some folders of a run."""
    total = 0
    for group in groups:
        for meta in (run / group).rglob("zarr.json"):
            facts = json.loads(meta.read_text())
            if facts["node_type"] == "array":
                size = 1
                for length in facts["shape"]:
                    size *= length
                kind = str(facts["data_type"])
                total += size * (1 if kind == "bool" else int(re.search(r"\d+$", kind)[0]) // 8)
    return total


@pytest.mark.parametrize("representation", ["auto", "dense", "factors"])
@pytest.mark.parametrize("kind", ["llama", "demo"])
def test_bytes_are_within_two_percent_of_what_a_run_writes(tmp_path, kind, representation):
    n, tokens = (24, 24) if kind == "llama" else (8, 128)
    model = tiny_llama() if kind == "llama" else load_demo_model()
    samples = ids(tokens, n) if kind == "llama" else demo_samples(n)
    config = sf.SpectralConfig(chunk_size=4, batch_tokens=256, representation=representation)
    trace = trace_model(model, ids(tokens), causal=True)
    plan = plan_run(trace, [tokens] * n, config, machine=Machine(), rates=FAST)
    run = sf.collect(model, samples, tmp_path / "run.zarr", config=config)
    run.spectrum("layer")
    assert plan.chosen.representation == run.store.manifest.layout["representation"]
    written = logical_bytes(run.path, "gradients", "packed", "factors")
    assert plan.chosen.gradients == pytest.approx(written, rel=0.02)
    assert plan.gram_bytes == logical_bytes(run.path, "gram")
    everything = logical_bytes(run.path, "gradients", "packed", "factors", "gram", "samples")
    assert plan.chosen.disk == pytest.approx(everything, rel=0.02)


def test_a_plan_cuts_the_waves_that_the_run_cuts(tmp_path):
    n, tokens = 16, 24
    model, samples = tiny_llama(), ids(tokens, n)
    whole = plan_run(
        trace_model(model, ids(tokens), causal=True), [tokens] * n, sf.SpectralConfig(), machine=Machine(), rates=FAST
    )
    budget = int(whole.gram_bytes + 0.4 * whole.chosen.gradients)
    config = sf.SpectralConfig(chunk_size=8, disk_budget=budget, hold="disk")
    plan = plan_run(
        trace_model(model, ids(tokens), causal=True), [tokens] * n, config, machine=Machine(disk=budget), rates=FAST
    )
    run = sf.collect(model, samples, tmp_path / "run.zarr", config=config)
    assert plan.chosen.waves == len(run.store.manifest.layout["waves"]) > 1


def test_rates_are_measured_and_any_of_them_may_be_given():
    trace = trace_model(tiny_llama(), ids(16), causal=True)
    rates = measure(64, layer=trace.layer)
    assert "model.layers.0" in rates.source
    assert all(value is None or value > 0 for name, value in vars(rates).items() if name != "source")
    given = rates.given(passes=1e15, write=None)
    assert (given.passes, given.write) == (1e15, rates.write)
    assert given.source.endswith("given: passes")


GIVEN = ("--flops", "400e12", "--solve-flops", "1e11", "--disk", "10GB/s")


def test_the_command_prints_a_table_or_json(capsys):
    line = ("plan", str(SHAPES / "llama-2-7b"), "--samples", "1024", "--max-length", "512", *GIVEN)
    room = ("--memory-budget", "2TB", "--disk-budget", "30TB")
    assert cli(*line, *room) == 0
    table = capsys.readouterr().out
    assert "6,738,415,616 parameters in 291 tensors" in table
    assert "layer_0 ... layer_31, each of 32" in table and "It fits." in table
    assert cli(*line, *room, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["chosen"] == "waves" and plan["bytes_grams"] == 8 * 1024**2 * 291
    assert [way["name"] for way in plan["ways"]] == ["dense, one pass", "one pass", "waves", "stream layers"]
    assert cli(*line, "--memory-budget", "2TB", "--disk-budget", "1GB") == 5
    assert "It does not fit:" in capsys.readouterr().out


def test_an_accelerator_that_was_measured_is_planned_without_it(capsys):
    line = ["plan", str(SHAPES / "llama-2-7b"), "--samples", "512", "--max-length", "512", "--stream", "layers"]
    line += ["--keep-gradients", "none", "--memory-budget", "110GB", "--disk-budget", "1TB"]
    line += ["--solve-flops", "1e11", "--disk", "3GB/s", "--json"]
    seconds = {}
    for options in (["--accelerator", "h100"], ["--accelerator", "H200"], ["--accelerator", "h100", "--flops", "1e12"]):
        assert cli(*line, *options) == 0
        plan = json.loads(capsys.readouterr().out)
        taken = next(way for way in plan["ways"] if way["name"] == plan["chosen"])
        assert taken["hold"] == "device" and taken["name"].startswith("stream layers")
        seconds[tuple(options)] = taken["seconds"]
    first, second, given = seconds.values()
    assert 60 < first < 600 and second <= first and given > 10 * first  # about 90 s were measured, part by part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--samples", "64", "--max-length", "64", "--accelerator", "a9"],
            "its rates were not measured; h100 and h200",
        ),
        (["--samples", "64"], "without DATA, say how many samples of how many tokens"),
        (["--max-length", "64"], "without DATA, say how many samples of how many tokens"),
        (["--samples", "64", "--max-length", "64", "--devices", "2"], "say how much memory each has"),
        (["--samples", "64", "--max-length", "64", "--disk", "fast"], "--disk='fast' is not a size"),
        (["--samples", "64", "--max-length", "64", "--flops", "-1"], "--flops -1 must be a number of operations"),
        (["--samples", "64", "--max-length", "64", "--include", "nothing.*"], "'nothing.*' matches no parameter"),
    ],
)
def test_bad_input_to_plan_is_refused_with_a_sentence(arguments, message, capsys):
    assert cli("plan", SHAPES / "llama-2-7b", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_model_that_looks_at_values_is_refused_with_the_reason():
    class Picky(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) if float(x.sum()) > 0 else x

    with pytest.raises(ModelError, match="Picky cannot be planned from its shapes alone"):
        trace_model(Picky(), {"x": torch.ones(1, 4)})


def test_a_run_says_its_plan_before_it_begins_and_not_again_when_it_is_resumed(tmp_path, capsys):
    line = ("run", "tiny_models:causal", "tiny_models:sequences", "--out", tmp_path / "run.zarr")
    assert cli(*line, "--verbose") == 0
    said = capsys.readouterr().err
    assert "Taken: a single wave, with all gradients on disk at once" in said and "It fits." in said
    assert "not measured, because the run is short" in said
    assert cli(*line) == 0
    assert "over the data" not in capsys.readouterr().err
    assert cli(*line[:-1], tmp_path / "quiet.zarr", "--quiet") == 0
    assert "over the data" not in capsys.readouterr().err
