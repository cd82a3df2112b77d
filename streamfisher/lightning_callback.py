"""A Lightning callback that collects a run every n steps: the Fisher along training.

trainer = Trainer(callbacks=[LightningCallback("runs", probe_samples, every=200)])
trainer.fit(module, loader)
compare(sorted(Path("runs").glob("step-*.zarr")), "layer").trajectory("effective_rank", "layer_3")
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamfisher.collector import Collector, run_metrics
from streamfisher.config import SpectralConfig
from streamfisher.errors import require


def _base() -> Any:
    """Return the Callback of the Lightning that is in use, of its two packages; `object` where there is none."""
    names = ("lightning", "pytorch_lightning")
    there = [name for name in names if name in sys.modules]
    there += [name for name in names if name not in there and importlib.util.find_spec(name) is not None]
    if not there:
        return object
    return importlib.import_module("lightning.pytorch" if there[0] == "lightning" else there[0]).Callback


if TYPE_CHECKING:
    _Base = object
else:
    _Base = _base()


class LightningCallback(_Base):
    """Collect per-sample gradients of the same samples at steps 0, n, 2n, ... of training, as `Collector` does.

    Args:
        folder: runs go to `folder/step-00000200.zarr`.
        samples: as for `collect`; the same at every step.
        every: n, in optimiser steps.
        module: the attribute of the LightningModule that holds the network, such as `model` or `model.backbone`;
            `None` means the LightningModule itself, whose `forward` is then called.
        n_samples: how many of the samples; `None` means all.
        config: of the runs.
        loss: as for `collect`.
        block_structure: of the blocks whose metrics are logged.
        at_start: collect before the first step too.
        log: give trace, largest eigenvalue and effective rank of the whole model and of each block to the trainer's
            loggers, under the names that `Collector` has.

    Raises:
        MissingExtraError: Lightning is not installed.
        ConfigError: `every` is under 1.
    """

    def __init__(
        self,
        folder: str | Path,
        samples: Any,
        *,
        every: int,
        module: str | None = None,
        n_samples: int | None = None,
        config: SpectralConfig | None = None,
        loss: Callable[..., Any] | None = None,
        block_structure: str | Mapping[str, str] = "layer",
        at_start: bool = True,
        log: bool = True,
    ):
        if _Base is object:
            require("lightning", "lightning", "collect runs from a Lightning Trainer")
        super().__init__()
        self.collector = Collector(folder, samples, every=every, n_samples=n_samples, config=config, loss=loss)
        self.module, self.block_structure, self.at_start, self.log = module, block_structure, at_start, log

    @property
    def runs(self) -> list[Path]:
        """Return the runs of this training, in order."""
        return self.collector.runs

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Collect before the first step, unless training is resumed."""
        if self.at_start and trainer.global_step == 0:
            self._step(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Collect after every n-th step of the optimiser."""
        if trainer.global_step > 0:
            self._step(trainer, pl_module)

    def _step(self, trainer: Any, pl_module: Any) -> None:
        model = pl_module if self.module is None else operator.attrgetter(self.module)(pl_module)
        run = self.collector.step(model, trainer.global_step)
        if run is not None and self.log and trainer.is_global_zero:
            metrics = run_metrics(run, self.block_structure)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
