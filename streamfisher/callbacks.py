"""A Hugging Face `Trainer` callback that collects a run every n steps: the Fisher along training.

trainer = Trainer(..., callbacks=[CollectCallback(probe_samples, "runs", every=500)])
trainer.train()
compare(sorted(Path("runs").glob("step-*.zarr")), "layer").trajectory("effective_rank", "layer_3")
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError, require
from streamfisher.runtime.paths import expanded

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
        grams: build the Grams at once and say how large the leading eigenvalue is, in the Trainer's log.
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
        at_start: bool = True,
    ):
        require("transformers", "hf", "collect runs from a Trainer")
        if every < 1:
            raise ConfigError(f"every={every} must be a whole number of at least 1 step.")
        self.samples, self.folder, self.every = samples, expanded(folder), every
        self.n_samples, self.config, self.loss = n_samples, config, loss
        self.grams, self.at_start = grams, at_start
        self.runs: list[Path] = []  # of this training, in order

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collect before the first step, unless training is resumed."""
        if self.at_start and state.global_step == 0:
            self._collect(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collect after every n-th step."""
        if state.global_step % self.every == 0:
            self._collect(state, kwargs["model"])

    def _collect(self, state: Any, model: Any) -> None:
        from streamfisher.api import collect

        path = self.folder / f"step-{state.global_step:08d}.zarr"
        run = collect(model, self.samples, path, config=self.config, n_samples=self.n_samples, loss=self.loss)
        self.runs.append(path)
        if self.grams and state.is_world_process_zero:
            whole = run.spectrum("none").global_
            state.log_history.append(
                {
                    "step": state.global_step,
                    "fisher_trace": whole.trace,
                    "fisher_largest_eigenvalue": whole.metrics["largest_eigenvalue"],
                }
            )
