"""What a run takes, before anything runs: shapes without weights, operations, bytes, and the ways to do it."""

from streamfisher.planning.machine import Machine, this_machine
from streamfisher.planning.model_trace import ModelTrace
from streamfisher.planning.plan import plan_run
from streamfisher.planning.rates import Rates, measure
from streamfisher.planning.run_plan import RunPlan, strategy_row
from streamfisher.planning.tracing import trace_model

__all__ = [
    # What a model computes
    "trace_model",
    "ModelTrace",
    # What there is to work with
    "Machine",
    "this_machine",
    "Rates",
    "measure",
    # What a run takes
    "plan_run",
    "RunPlan",
    "strategy_row",
]
