"""A Hugging Face `Trainer` callback that collects a run every n steps: the Fisher along training.

trainer = Trainer(..., callbacks=[CollectCallback(probe_samples, "runs", every=500)])
trainer.train()
compare(sorted(Path("runs").glob("step-*.zarr")), "layer").trajectory("effective_rank", "layer_3")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamfisher.collector import Collector, run_metrics
from streamfisher.config import SpectralConfig
from streamfisher.errors import require

if TYPE_CHECKING:
    from transformers import TrainerCallback as _Base
else:
    try:
        from transformers import TrainerCallback as _Base
    except ImportError:
        _Base = object


class CollectCallback(_Base):
    """Collect per-sample gradients of the same samples at steps 0, n, 2n, ... of training.

    Gradients are taken in eval mode; the model's mode, gradients and `requires_grad` are restored. A step whose run is
    finished is not collected again, so resumed training goes on; a step collected from other weights is refused.

    Args:
        samples: as for `collect`; the same at every step, so that what changes is the model.
        folder: runs go to `folder/step-00000500.zarr`.
        every: n, in optimiser steps.
        n_samples: how many of the samples; `None` means all.
        config: of the runs.
        loss: as for `collect`.
        grams: build the Grams at once and log, as the Trainer logs its loss, so that TensorBoard and W&B see it:
            `fisher_trace`, `fisher_largest_eigenvalue` and `fisher_effective_rank` of the whole model, and
            `fisher/BLOCK/trace` and so on of each block. What is undefined is left out.
        block_structure: of those blocks, as for `Run.spectrum`.
        at_start: collect before the first step too.

    Raises:
        MissingExtraError: transformers is not installed.
        ConfigError: `every` is under 1.
    """

    def __init__(
        self,
        samples: Any,
        folder: str | Path,
        every: int,
        *,
        n_samples: int | None = None,
        config: SpectralConfig | None = None,
        loss: Callable[..., Any] | None = None,
        grams: bool = True,
        block_structure: str = "layer",
        at_start: bool = True,
    ):
        require("transformers", "hf", "collect runs from a Trainer")
        self.collector = Collector(
            folder, samples, every=every, n_samples=n_samples, config=config, loss=loss, grams=grams
        )
        self.grams, self.at_start, self.block_structure = grams, at_start, block_structure

    @property
    def runs(self) -> list[Path]:
        """Return the runs of this training, in order."""
        return self.collector.runs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collect before the first step, unless training is resumed."""
        if self.at_start and state.global_step == 0:
            self._step(state, control, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collect after every n-th step."""
        self._step(state, control, kwargs["model"])

    def _step(self, state: Any, control: Any, model: Any) -> None:
        run = self.collector.step(model, state.global_step)
        if run is not None and self.grams and state.is_world_process_zero:
            _log(run_metrics(run, self.block_structure), state, control)


def _log(metrics: dict[str, float], state: Any, control: Any) -> None:
    """Log as the Trainer does, so that TensorBoard, W&B and whatever else reports see it; else into its history."""
    trainer = _trainer_of(state)
    if trainer is None:
        state.log_history.append({"step": state.global_step, **metrics})
        return
    due = control.should_log
    trainer.log(metrics)
    control.should_log = due  # logging takes it back, and the Trainer's own entry of this step is still to come


def _trainer_of(state: Any) -> Any:
    """Return the Trainer whose state it is, among the callers: callbacks are not given it."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if getattr(caller, "state", None) is state and callable(getattr(caller, "log", None)):
            return caller
        frame = frame.f_back
    return None
