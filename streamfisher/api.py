"""The face of the package for runs: collect one, open one, add to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from streamfisher.analysis.run import StoredRun
from streamfisher.collection.collect import collect_gradients
from streamfisher.config import SpectralConfig
from streamfisher.models.weights import Resident
from streamfisher.runtime.paths import expanded


class Run(StoredRun):
    """An open run: what `collect` and `open_run` return."""

    def add(
        self,
        model: nn.Module,
        samples: Any,
        *,
        loss: Callable[..., Any] | None = None,
        n_samples: int | None = None,
        progress: bool = False,
    ) -> Run:
        """Compute the gradients of further samples into this run; return it, opened again.

        Args:
            model: the model the run was made with.
            samples: all samples, those of the run first; what is new is what comes after them.
            loss: the same as when the run was made.
            n_samples: how many to use, from the first; `None` means all.
            progress: show a bar.

        Raises:
            RunMismatchError: model or first samples are not those of the run, or its rows are stored centered.
        """
        return collect(model, samples, self.path, config=self.config, loss=loss, n_samples=n_samples, progress=progress)


def collect(
    model: nn.Module,
    samples: Any,
    path: str | Path,
    *,
    config: SpectralConfig | None = None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] | None = None,
    n_samples: int | None = None,
    description: str | Mapping[str, Any] | None = None,
    progress: bool = False,
    weights: Resident | None = None,
) -> Run:
    """Write the gradient of every sample with respect to every selected parameter; resume where a run was stopped.

    The model is used in `eval()` (dropout off, BatchNorm with its running statistics) and handed back as it came.

    Args:
        model: on the device where it is to run.
        samples: a map-style dataset of dicts of tensors without batch axis, or one dict of batched tensors; also an
            iterator of such dicts, of which no more than `n_samples` are read, or a DataLoader that does not shuffle.
        path: the run's folder; it is made, resumed if it is a run of the same model, samples and settings, or grown if
            its samples are the first of these.
        config: `None` means the defaults.
        loss: `(model, batch) -> (B,)` per-sample losses; `None` means chosen from the model's output and labels.
        n_samples: how many samples to use, from the first; `None` means all.
        description: what the samples are, in words or as options, for the manifest.
        progress: show bars.
        weights: what `load_skeleton` returned beside the model, where weights are read layer by layer.

    Returns:
        The open run, complete.

    Raises:
        DataError: fewer than 2 samples, or one that cannot be used.
        ModelError: nothing to differentiate.
        LossError: no loss fits.
        CaptureError: gradients that disagree with plain autograd on every path.
        NonFiniteError: a loss or gradient is not finite and `on_nonfinite='raise'`.
        RunMismatchError: the folder holds a run of another model, other samples or other settings, or model and loss do
            not give the losses and norms of its first batch.
        RunError: the folder is not a run, or another process writes it.
        RankError: another rank failed, died, or was given other work.
        StoppedError: SIGTERM or SIGUSR1 came; the units in flight are finished and marked.
        CapacityError: there is no room on the disk, or no memory for one chunk of rows.
    """
    path = expanded(path)
    collect_gradients(
        model,
        samples,
        path,
        config=config,
        loss=loss,
        n_samples=n_samples,
        description=description,
        progress=progress,
        weights=weights,
    )
    return Run(path)


def open_run(path: str | Path) -> Run:
    """Open a stored run for reading.

    Raises:
        RunError: the folder does not exist or is not a run.
        CorruptRunError: its manifest is damaged or of another format version.
    """
    return Run(path)
