"""What a run will take, before anything runs: the ways in which it can be done side by side, and the one to be taken.

A plan is an estimate: bytes follow from shapes, time from operations and rates.
"""

from __future__ import annotations

from collections.abc import Sequence

from streamfisher.config import SpectralConfig, dtype_name
from streamfisher.planning.choice import streams_layers
from streamfisher.planning.machine import Machine
from streamfisher.planning.model_trace import ModelTrace
from streamfisher.planning.rates import Rates
from streamfisher.planning.run_plan import RunPlan
from streamfisher.planning.strategies import StrategyPlanner


def plan_run(
    trace: ModelTrace,
    lengths: Sequence[int],
    config: SpectralConfig,
    *,
    machine: Machine,
    rates: Rates,
    structures: int = 1,
) -> RunPlan:
    """Plan a run.

    Args:
        trace: of the model, at the mean length of the samples.
        lengths: tokens of each sample.
        config: of the run; with `stream='auto'` the way is chosen, see `streams_layers`.
        machine: what there is to work with.
        rates: of that machine.
        structures: how many block structures are solved.
    """
    planner = StrategyPlanner(trace, lengths, config, machine, rates, structures)
    strategies = [
        planner.stored("dense, one pass", "dense", budgets=False),
        planner.stored("one pass", config.representation, budgets=False),
        planner.stored("waves", config.representation, budgets=True),
        planner.streamed(),
    ]
    chosen = strategies[3] if streams_layers(trace, lengths, config, machine) else strategies[2]
    return RunPlan(
        trace=trace,
        n_samples=len(lengths),
        mean_length=sum(lengths) / len(lengths),
        n_grams=planner.n_grams,
        gram_bytes=planner.gram_bytes,
        machine=machine,
        rates=rates,
        blocks=planner.block_bytes(),
        strategies=tuple(strategies),
        chosen=chosen,
        least=planner.least(),
        settings={
            "representation": config.representation,
            "gram_per": config.gram_per,
            "chunk_size": config.chunk_size,
            "batch_tokens": config.batch_tokens,
            "dtype_store": dtype_name(planner.store_dtype),
            "dtype_gram": dtype_name(config.dtype_gram),
            "codec": config.codec,
        },
        notes=tuple(planner.stages.notes()),
    )
