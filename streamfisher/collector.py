"""A run every n steps of any training loop: the Fisher along training.

collector = Collector("runs", probe_samples, every=200)
for batch in loader:
    ...  # forward, backward, optimiser
    collector.step(model)
compare(collector.runs, "layer").trajectory("effective_rank", "layer_3")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from streamfisher.api import Run, collect
from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError
from streamfisher.runtime.caller_state import generators_kept, without_autocast
from streamfisher.runtime.paths import expanded

#: Takes the metrics of a run and the number of its step.
Log = Callable[[dict[str, float], int], Any]


class Collector:
    """Collect per-sample gradients of the same samples every n steps of training.

    Training goes on as if nothing had happened: gradients are taken in eval mode, and the model's mode, its parameters'
    `grad` and `requires_grad`, and all random generators (torch, numpy, Python) are handed back as they came. A model
    in `DistributedDataParallel` is taken out of it; all ranks must call `step`, and share the work.

    Args:
        folder: runs go to `folder/step-00000200.zarr`. A step whose run is finished is not collected again, so that
            training that is resumed goes on; one that was collected from other weights is refused.
        samples: as for `collect`; the same at every step, so that what changes is the model.
        every: n, in optimiser steps.
        n_samples: how many of the samples; `None` means all.
        config: of the runs.
        loss: as for `collect`.
        log: called on the first rank with `{name: value}` and the step, as in
            `log=lambda metrics, step: wandb.log(metrics, step=step)`: `fisher_trace`, `fisher_largest_eigenvalue` and
            `fisher_effective_rank` of the whole model, and `fisher/BLOCK/trace` and so on of each block. What is
            undefined is left out.
        block_structure: of those blocks, as for `Run.spectrum`.
        grams: build the Grams at once, as `log` needs; else whoever looks at a run does.

    Raises:
        ConfigError: `every` is under 1.
    """

    def __init__(
        self,
        folder: str | Path,
        samples: Any = None,
        *,
        every: int,
        n_samples: int | None = None,
        config: SpectralConfig | None = None,
        loss: Callable[..., Any] | None = None,
        log: Log | None = None,
        block_structure: str | Mapping[str, str] = "layer",
        grams: bool = True,
    ):
        if every < 1:
            raise ConfigError(f"every={every} must be a whole number of at least 1 step.")
        self.folder, self.samples, self.every = expanded(folder), samples, every
        self.n_samples, self.config, self.loss = n_samples, config, loss
        self.log, self.block_structure, self.grams = log, block_structure, grams
        self.runs: list[Path] = []  # of this training, in order
        self.last_step = 0  # the number of the latest step

    def step(self, model: nn.Module, step: int | None = None, *, samples: Any = None) -> Run | None:
        """Say that a step of training is done; collect a run where it is one of every n.

        Args:
            model: as it is after the step, with or without `DistributedDataParallel` around it.
            step: its number; `None` counts the calls from 1. `step=0` before the loop collects what training begins
                with.
            samples: instead of those that the collector was made with.

        Returns:
            The run, where one was collected.

        Raises:
            ConfigError: no samples were given, here or to the collector.
            StreamfisherError: as `collect`.
        """
        step = self.last_step + 1 if step is None else step
        seen, self.last_step = step == self.last_step and bool(self.runs), step
        if step % self.every or seen:  # several batches of one step, where gradients are accumulated
            return None
        return self.collect(model, step, samples=samples)

    def collect(self, model: nn.Module, step: int, *, samples: Any = None) -> Run:
        """Collect the run of a step, whichever it is; arguments and errors as `step`."""
        samples = self.samples if samples is None else samples
        if samples is None:
            raise ConfigError(
                "the collector has no samples to take gradients of: Collector(folder, samples, every=200), or "
                "step(model, samples=samples). They should be the same at every step."
            )
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        path = self.folder / f"step-{step:08d}.zarr"
        with generators_kept(), without_autocast():
            run = collect(model, samples, path, config=self.config, n_samples=self.n_samples, loss=self.loss)
            self.runs.append(path)
            if self.grams and _is_first_rank():
                run.build_grams()
                if self.log is not None:
                    self.log(run_metrics(run, self.block_structure), step)
        return run


def run_metrics(run: Run, block_structure: str | Mapping[str, str] = "layer") -> dict[str, float]:
    """Return trace, largest eigenvalue and effective rank of the whole model and of each block, as a log takes them."""
    spectrum = run.spectrum(block_structure)
    whole = spectrum.whole or run.spectrum("none").global_
    found = {f"fisher_{name}": value for name, value in _of_block(whole).items()}
    for key, block in spectrum.blocks.items():
        found |= {f"fisher/{key}/{name}": value for name, value in _of_block(block).items()}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _of_block(block: Any) -> dict[str, Any]:
    return {"trace": block.trace} | {name: block.metrics[name] for name in ("largest_eigenvalue", "effective_rank")}


def _is_first_rank() -> bool:
    from torch import distributed

    return not distributed.is_initialized() or distributed.get_rank() == 0
