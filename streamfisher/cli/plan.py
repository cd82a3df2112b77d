"""The command `plan`: what a run would take, from a config alone."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamfisher.byte_sizes import parse_bytes
from streamfisher.cli.arguments import ANALYSIS, ELSEWHERE, add_collection_options, add_options
from streamfisher.cli.data import samples_of
from streamfisher.cli.options import RunOptions, read_run_options
from streamfisher.cli.output import AddCommand, print_json
from streamfisher.config import SpectralConfig
from streamfisher.errors import CapacityError, ConfigError, DataError, StreamfisherError
from streamfisher.planning.accelerators import ACCELERATORS, accelerator
from streamfisher.planning.codec_choice import choose_codec
from streamfisher.planning.machine import Machine, this_machine
from streamfisher.planning.model_trace import ModelTrace
from streamfisher.planning.rates import UNKNOWN, Rates, measure, product_rates
from streamfisher.runtime.memory import of_one_rank

if TYPE_CHECKING:
    from streamfisher.planning.run_plan import RunPlan


#: Runs of fewer operations take less time than measuring how much time they would take.
_WORTH_MEASURING = 2e12


def add_plan_command(add: AddCommand) -> None:
    """Add `plan`, which takes the options of `run` and those that describe a machine."""
    plan = add("plan", _plan)
    add_collection_options(plan)
    add_options(plan, *ANALYSIS, *ELSEWHERE)
    machine = plan.add_argument_group("machine (default: this one, measured in a few seconds)")
    machine.add_argument(
        "--accelerator",
        default=None,
        metavar="|".join(ACCELERATORS),
        help="one of these, by rates that were measured; what else is given here wins",
    )
    machine.add_argument("--flops", type=float, default=None, help="operations/s of passes and products, as 400e12")
    machine.add_argument("--solve-flops", type=float, default=None, help="operations/s of the float64 eigensolve")
    machine.add_argument("--disk", default=None, metavar="RATE", help="of writing and reading, for example 3GB/s")
    machine.add_argument("--devices", type=int, default=0, help="how many accelerators (default: none)")
    machine.add_argument("--device-memory", default=None, metavar="SIZE", help="of each, for example 80GB")


def _plan(arguments: argparse.Namespace) -> int:
    out = vars(arguments).pop("out", None)  # a plan writes nothing; it says which disk is meant
    options = read_run_options(arguments)
    if not options.model:
        raise ConfigError("MODEL is missing; see `streamfisher plan --help`.")
    _describe_accelerator(arguments)
    if arguments.devices and arguments.device_memory is None:
        raise ConfigError(f"--devices {arguments.devices}: say how much memory each has, with --device-memory 80GB.")
    plan = plan_of(options, arguments, _existing(Path(out) if out else Path.cwd()))
    if arguments.json:
        print_json(plan.to_dict())
    else:
        print(plan.table())
    return 0 if plan.chosen.fits else CapacityError.exit_code


def _describe_accelerator(arguments: argparse.Namespace) -> None:
    """Let a named accelerator stand for how many there are, and how much each holds, where that is not given."""
    if arguments.accelerator is not None:
        known = accelerator(arguments.accelerator)
        arguments.devices = arguments.devices or 1
        arguments.device_memory = arguments.device_memory or str(known.memory)


def plan_of(options: RunOptions, machine_options: argparse.Namespace, folder: Path, source: Any = None) -> RunPlan:
    """Return the plan of the run that options describe.

    Args:
        options: of the run.
        machine_options: rates and devices, as `plan` takes them; what is missing is measured here.
        folder: one that exists, on the disk of the run.
        source: the samples, where they are loaded already because the run begins; a short run is then planned without
            measuring how fast this machine is, which would take as long.

    Raises:
        ModelError: the model cannot be built or traced without its weights.
        DataError: neither data nor the number and length of samples are given.
    """
    from streamfisher.models.skeleton import skeleton_with_tokenizer
    from streamfisher.planning.plan import plan_run

    arguments, config = machine_options, options.config
    model, returned = skeleton_with_tokenizer(
        options.model, dtype=config.dtype_model, trust_remote_code=options.trust_remote_code
    )
    begins = source is not None
    if not begins and options.data:
        source = samples_of(options, model if options.model_brings_tokenizer else None, returned)
    lengths, batch = _samples(options, source)
    lengths = _of_every_class(lengths, model, batch, config)
    trace = _trace(model, batch, lengths, config)
    config, machine = _machine(arguments, config, folder)
    structures = len(options.structures) * len(options.centers)
    plan = partial(plan_run, trace, lengths, config, machine=machine, structures=structures)
    if begins:
        short = plan(rates=UNKNOWN)
        if sum(stage.flops for stage in short.chosen.stages) < _WORTH_MEASURING:
            return short
    return plan(rates=_rates(arguments, config, trace, lengths, folder))


def _machine(arguments: argparse.Namespace, config: SpectralConfig, folder: Path) -> tuple[SpectralConfig, Machine]:
    """Return what there is to work with: one rank's part of this machine, or another machine as it is described.

    The config is returned with the budgets of that machine.
    """
    device_memory = parse_bytes(arguments.device_memory, "--device-memory") if arguments.device_memory else None
    here = partial(this_machine, path=folder, devices=arguments.devices, device_memory=device_memory)
    if not any((arguments.flops, arguments.solve_flops, arguments.disk, arguments.devices)):
        config = of_one_rank(config)
        return config, here(config)
    machine = here(config)
    if config.disk_budget is not None:  # whatever is free here
        machine = dataclasses.replace(machine, disk=parse_bytes(config.disk_budget))
    return config, machine


def announce_plan(options: RunOptions, source: Any, *, verbose: bool = False) -> None:
    """Print the plan of a run that is about to start in a few lines, or whole, or why there is none."""
    here = argparse.Namespace(accelerator=None, flops=None, solve_flops=None, disk=None, devices=0, device_memory=None)
    try:
        plan = plan_of(options, here, _existing(Path(options.out)), source)
        text = plan.table() if verbose or not plan.chosen.fits else plan.summary()
    except StreamfisherError as error:
        text = f"No plan can be made: {error}"
    print(f"{text}\n", file=sys.stderr)


def _samples(options: RunOptions, source: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Return the length of each sample, and one sample as a batch: of the data, or as the options describe them."""
    from streamfisher.data.batches import collate, sequence_length
    from streamfisher.data.samples import Samples

    config = options.config
    if source is not None:
        samples = Samples(source, options.samples, config.max_length)
        lengths = [sequence_length(samples[index]) or 1 for index in range(len(samples))]
        batch = collate([samples[0]])
    else:
        if options.samples is None or config.max_length is None:
            raise DataError("without DATA, say how many samples of how many tokens: --samples 1024 --max-length 512.")
        lengths = [config.max_length] * options.samples
        batch = {"input_ids": torch.zeros(1, config.max_length, dtype=torch.long)}
    if config.sample_unit == "token":  # each is cut after its target, so the lengths run from 2 to the whole
        drawn = config.tokens_per_sequence
        lengths = [
            2 + place * (length - 1) // min(drawn or length - 1, length - 1)
            for length in lengths
            for place in range(min(drawn or length - 1, length - 1))
        ]
    if len(lengths) < 2:
        raise DataError(f"{len(lengths)} sample was given; a spectrum needs at least 2.")
    return lengths, batch


def _of_every_class(
    lengths: list[int], model: torch.nn.Module, batch: dict[str, torch.Tensor], config: SpectralConfig
) -> list[int]:
    """Return the lengths of the samples: one for each class of each of these, with labels='expected'."""
    from streamfisher.models.calling import try_forward

    if config.labels != "expected":
        return lengths
    k = config.classes_per_sample
    if k is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        logits, _ = try_forward(model, {name: value.to(device) for name, value in batch.items()})
        if logits is None:
            raise DataError("the model returns no logits, so its classes cannot be counted: --classes-per-sample.")
        k = logits.shape[-1]
    return [length for length in lengths for _ in range(k)]


def _trace(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], lengths: list[int], config: SpectralConfig
) -> ModelTrace:
    """Trace one sample of the mean length."""
    from streamfisher.models.skeleton import predicts_next_token
    from streamfisher.planning.tracing import captured_names, trace_model

    mean = sum(lengths) / len(lengths)
    names = captured_names(model, config.include, config.exclude)
    trace = trace_model(model, batch, causal=predicts_next_token(model, config.loss), parameters=dict.fromkeys(names))
    return trace.scaled(mean) if round(mean) != round(trace.tokens) else trace


def _rates(
    arguments: argparse.Namespace, config: SpectralConfig, trace: ModelTrace, lengths: list[int], folder: Path
) -> Rates:
    """Return the rates that are given, and measure the rest here."""
    disk = None
    if arguments.disk is not None:
        disk = float(parse_bytes(str(arguments.disk).lower().removesuffix("/s"), "--disk"))
    flops, solve = _positive("--flops", arguments.flops), _positive("--solve-flops", arguments.solve_flops)
    named = accelerator(arguments.accelerator) if arguments.accelerator is not None and flops is None else None
    device = {name: flops if named is None else getattr(named, name) for name in ("passes", "products", "forming")}
    source = "given" if named is None else named.source
    passes, products, forming = device.values()
    host = {} if named is None else {"transfer": named.transfer, **product_rates(len(lengths), config.dtype_gram)}
    if passes is not None and products is not None and forming is not None and solve is not None and disk is not None:
        return Rates(passes, products, forming, solve=solve, write=disk, read=disk, source=source, **host)
    layer = trace.layer
    if layer is not None:
        batch = max(1, config.batch_tokens // max(round(trace.tokens), 1))
        layer = dataclasses.replace(layer, batch=min(batch, config.chunk_size, len(lengths)))
    on_device = named is not None or config.device == "cuda"
    codec = choose_codec(config.codec, folder, math.inf, dtype=torch.float32, on_device=on_device).codec
    measured = measure(len(lengths), dtype_gram=config.dtype_gram, codec=codec, layer=layer, folder=folder)
    here = {"chunk_seconds": 0.0, "array_seconds": 0.0} if disk is not None else {}
    known = measured.given(**device, solve=solve, write=disk, read=disk, **here)
    if named is None:
        return known
    return dataclasses.replace(known, **host, source=f"{known.source} ({named.source})")


def _positive(option: str, value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(f"{option} {value:g} must be a number of operations per second, for example 400e12.")
    return value


def _existing(path: Path) -> Path:
    """Return the nearest folder that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path
