"""Whether layers are streamed with `stream='auto'`: one decision, taken by plans and by runs."""

from __future__ import annotations

from collections.abc import Sequence

from streamfisher.config import SpectralConfig
from streamfisher.planning.accelerators import ACCELERATORS
from streamfisher.planning.machine import Machine
from streamfisher.planning.model_trace import ModelTrace
from streamfisher.planning.rates import Rates
from streamfisher.planning.strategies import StrategyPlanner

#: Waves that fit are taken as long as they take no more than so many times the time of streamed layers, which trace the
#: model first and have a wave for each layer.
WORTH = 1.25
#: A kill should cost no more than so many seconds of work. Where gradients are held in memory it costs the wave in
#: flight, which is a pass over all samples unless layers are streamed; to lose less, these may take a little longer.
LONG, WORTH_LESS_RISK = 600.0, 1.5
#: A host of 16 cores with a local disk, rounded. What is measured differs from one minute to the next: a decision must
#: not.
_HOST = {"solve": 1e11, "write": 1e9, "read": 2e9}
_ON_HOST = Rates(passes=8e11, products=8e11, forming=8e11, **_HOST, source="assumed")
_H100 = ACCELERATORS["h100"]
_ON_DEVICE = Rates(
    passes=_H100.passes,
    products=_H100.products,
    forming=_H100.forming,
    **_HOST,
    transfer=_H100.transfer,
    host_products=_ON_HOST.products,
    host_forming=_ON_HOST.forming,
    source="assumed",
)


def streams_layers(
    trace: ModelTrace,
    lengths: Sequence[int],
    config: SpectralConfig,
    machine: Machine,
    apart: Sequence[int] | None = None,
) -> bool:
    """Return whether layers are streamed: as asked, or with 'auto' where they fit and waves do not, or take longer.

    Or where waves are so long, and in memory alone, that a kill would cost much more.

    Times are those of typical rates, each way with the gradients in the place where it would hold them.

    Args:
        trace: of the model, at the mean length of the samples.
        lengths: tokens of each sample.
        config: of the run.
        machine: what there is to work with.
        apart: samples that share no batch.
    """
    if config.stream != "auto":
        return config.stream == "layers"
    planner = StrategyPlanner(trace, lengths, config, machine, _ON_DEVICE if machine.devices else _ON_HOST, apart=apart)
    layers = planner.streamed()
    if not layers.fits:
        return False
    waves = planner.stored("waves", config.representation, budgets=True)
    if not waves.fits or waves.until_grams > WORTH * layers.until_grams:
        return True
    risky = waves.at_risk > LONG and layers.at_risk < waves.at_risk / 2
    return risky and layers.until_grams < WORTH_LESS_RISK * waves.until_grams
