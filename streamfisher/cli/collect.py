"""`streamfisher run`, `collect` and `demo`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import Any

from streamfisher.cli.data import samples_of, say_tokenizer
from streamfisher.cli.options import RunOptions, read_model_options, read_replay_options, read_run_options
from streamfisher.cli.output import analyse, print_info
from streamfisher.cli.plan import announce_plan
from streamfisher.runtime.dask_pool import dask_client
from streamfisher.runtime.paths import expanded
from streamfisher.runtime.printable import printable
from streamfisher.runtime.remote_filesystem import is_url
from streamfisher.runtime.run_log import RunLog


def demo_command(arguments: argparse.Namespace) -> int:
    """Run the whole job on the model and the text that ship with the package."""
    from streamfisher import SpectralConfig, collect
    from streamfisher.demo import demo_samples, load_demo_model

    config = SpectralConfig(use_deterministic=True)
    print(
        f"The demo model, {arguments.samples} sequences of 128 bytes of Python's standard library, to {arguments.out}"
    )
    run = collect(
        load_demo_model(),
        demo_samples(arguments.samples),
        arguments.out,
        config=config,
        description="sequences of 128 bytes of the standard-library sources of the running interpreter",
        progress=not arguments.quiet,
    )
    options = RunOptions(structures=("layer", "module", "none"), centers=(False, True))
    return analyse(run, options, arguments, write=True)


def run_command(arguments: argparse.Namespace) -> int:
    """Collect, build Grams, solve, print and draw."""
    return _run(read_run_options(arguments), arguments)


def replay_command(arguments: argparse.Namespace) -> int:
    """Make a run once more."""
    from streamfisher import open_run

    options = read_replay_options(arguments, open_run(arguments.run).manifest)
    model, data = printable(options.model), printable(options.data)
    print(f"streamfisher run {model} {data} --out {arguments.out}, as {arguments.run} was made", file=sys.stderr)
    return _run(options, arguments)


def _run(options: RunOptions, arguments: argparse.Namespace) -> int:
    # From the start: an address that does not answer is found before days of gradients, and waves are reduced between.
    with (
        dask_client(options.dask_scheduler if os.environ.get("RANK", "0") == "0" else None),
        _written(options) as options,
    ):
        run = _collected(options, arguments)
        if run is None:
            return 0
        with RunLog(run.path, "analysis"):
            return analyse(run, options, arguments, write=True)


def collect_command(arguments: argparse.Namespace) -> int:
    """Collect only."""
    with _written(read_run_options(arguments)) as options:
        run = _collected(options, arguments)
        if run is not None:
            print_info(run, arguments)
    return 0


@contextlib.contextmanager
def _written(options: RunOptions) -> Iterator[RunOptions]:
    """Yield the options with the folder that a run is written in, where they name a URL, and say that it was sent."""
    from streamfisher.store.staged import ranks_of, written

    budget, locked = options.staging_budget, not options.no_lock
    with (
        ranks_of(options.out, options.config) as ranks,
        written(options.out, staging=options.staging, budget=budget, locked=locked, ranks=ranks) as folder,
    ):
        yield dataclasses.replace(options, out=str(folder)) if is_url(options.out) else options
    if is_url(options.out) and (ranks is None or ranks.is_main):
        print(f"The run is at {options.out}", file=sys.stderr)


def _collected(options: RunOptions, arguments: argparse.Namespace) -> Any:
    """Load model and data and collect; return the run on the main process and `None` on the others."""
    from streamfisher import collect
    from streamfisher.collection.producers import runs_in_waves
    from streamfisher.models.loading import pick_device
    from streamfisher.models.skeleton import load_skeleton, skeleton_is_needed
    from streamfisher.runtime.ranks import start_ranks
    from streamfisher.store.layout import check_free

    config = options.config
    out = expanded(options.out)
    new = not (out / "manifest.json").is_file()
    if new:
        check_free(out)  # before a large model is loaded for nothing
    state = start_ranks(cpu=config.device == "cpu", timeout=config.rank_timeout)
    device = state.device if config.device == "auto" else pick_device(config.device)
    model = returned = weights = None
    if options.model_brings_tokenizer:
        model, returned = _loaded(options, config, device)
    source = samples_of(options, model, returned)
    if state.is_main_process:
        say_tokenizer(source)
    if new and state.is_main_process and not arguments.quiet:
        announce_plan(options, source, verbose=arguments.verbose)
    loaded_whole = options.fsdp or options.device_map is not None or (not new and runs_in_waves(options.out, config))
    if model is None and not loaded_whole and skeleton_is_needed(options.model, config):
        model, weights = load_skeleton(
            options.model, dtype=config.dtype_model, device=device, trust_remote_code=options.trust_remote_code
        )
    elif model is None:
        model, _ = _loaded(options, config, device)
    run = collect(
        model,
        source,
        options.out,
        config=config,
        n_samples=options.samples,
        description=options.description(),
        progress=not arguments.quiet,
        weights=weights,
    )
    main_process = state.is_main_process
    if state.num_processes > 1:
        state.destroy_process_group()
    return run if main_process else None


def _loaded(options: RunOptions, config: Any, device: Any) -> tuple[Any, Any]:
    """Load the whole model; return it, and the tokenizer that came with it or `None`."""
    from streamfisher.models.device_map import read_device_map
    from streamfisher.models.loading import load_with_tokenizer

    return load_with_tokenizer(
        options.model,
        dtype=config.dtype_model,
        device=device,
        trust_remote_code=options.trust_remote_code,
        device_map=None if options.device_map is None else read_device_map(options.device_map),
        offload_folder=options.offload_folder or f"{options.out}.offload",
        sharded=options.fsdp,
    )


def load_what_it_was_made_with(
    run: Any, arguments: argparse.Namespace, usage: str, queries: Any = None
) -> tuple[Any, ...]:
    """Load the model and the data of a run, where gradients are formed again.

    They are never taken from the manifest: a run from elsewhere must not choose what is loaded.

    Args:
        run: open.
        arguments: parsed, with MODEL and DATA; with `queries` also `query_data`.
        usage: how the command is to be given, for the message.
        queries: another run of the model, whose data is returned as a third.

    Raises:
        ConfigError: model or data are missing, or cannot be loaded.
    """
    from streamfisher.models.loading import pick_device
    from streamfisher.runtime.ranks import start_ranks

    options = read_model_options(arguments, run.config, usage)
    config = options.config
    device = (
        start_ranks(cpu=False, timeout=config.rank_timeout).device
        if config.device == "auto"
        else pick_device(config.device)
    )
    model, returned = _loaded(options, config, device)

    def data_of(one: Any, chosen: RunOptions) -> Any:
        facts = one.manifest.data
        n_samples = facts.get("n_sequences", facts.get("n_inputs", one.n_samples))
        return samples_of(chosen, model if chosen.model_brings_tokenizer else None, returned, n_samples)

    if queries is None:
        return model, data_of(run, options)
    if arguments.query_data is None:
        return model, data_of(run, options), None
    theirs = dataclasses.replace(read_model_options(arguments, queries.config, usage), data=arguments.query_data)
    return model, data_of(run, options), data_of(queries, theirs)
