"""The face of the package for runs: collect one, open one, add to one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from streamfisher.analysis.run import StoredRun
from streamfisher.collection.collect import collect_gradients
from streamfisher.collection.cross_pass import CrossPass
from streamfisher.collection.eigenvector_pass import eigenvectors_by_pass
from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError
from streamfisher.models.weights import Resident
from streamfisher.results.influence import Influence
from streamfisher.runtime.paths import expanded
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.store import Role
from streamfisher.store.eigenvectors import Eigenvectors
from streamfisher.store.staged import ranks_of, written


class Run(StoredRun):
    """An open run: what `collect` and `open_run` return."""

    def add(
        self,
        model: nn.Module,
        samples: Any,
        *,
        loss: Callable[..., Any] | None = None,
        n_samples: int | None = None,
        role: Role = "train",
        progress: bool = False,
    ) -> Run:
        """Compute the gradients of further samples into this run; return it, opened again.

        Args:
            model: the model the run was made with.
            samples: all samples, those of the run first; what is new is what comes after them.
            loss: the same as when the run was made.
            n_samples: how many to use, from the first; `None` means all.
            role: 'query': what is new has weight zero in every spectrum, and `influence` holds the others against it.
            progress: show a bar.

        Raises:
            ConfigError: there is no such role.
            RunMismatchError: model or first samples are not those of the run, or its rows are stored centered.
        """
        if role not in get_args(Role):
            raise ConfigError(f"role={role!r} is unknown; choose train or query.")
        options: dict[str, Any] = {"loss": loss, "n_samples": n_samples, "progress": progress, "role": role}
        collect_gradients(model, samples, self.path, config=self.config, **options)
        return Run(self.path)

    def influence(
        self,
        queries: Any,
        dampings: float | Sequence[float],
        block: str | None = None,
        center: bool | None = None,
        *,
        model: nn.Module | None = None,
        data: Any = None,
        query_data: Any = None,
        loss: Callable[..., Any] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> Influence:
        """Return inner products, cosines and damped influence of queries with the samples of this run: exact.

        Args:
            queries: another run of the same model, or its folder; samples of this run; `None`: those added as queries.
            dampings: lambda, one or more.
            block: take this block only.
            center: by the covariance instead of the Fisher.
            model: the one that both runs were made with, where gradients were not kept: they are formed again.
            data: all samples of this run, with `model`, where its gradients were not kept.
            query_data: all samples of the queries' run, with `model`, where its gradients were not kept.
            loss: the same as when the runs were made, with `model`.
            progress: show bars.
            options: of `InfluenceAnalyses.influence`, which says what these are and what is raised.
        """
        if model is None and (data is not None or query_data is not None):
            raise ConfigError("influence by a pass takes model= beside data= and query_data=.")
        if model is not None:
            budget = SpectralConfig.of(options.get("config") or self.config).memory_budget
            options["crossing"] = CrossPass(self, model, data, query_data, loss, budget, progress)
        return super().influence(queries, dampings, block, center, progress=progress, **options)

    def eigenvectors(
        self,
        block: str,
        top: int = 20,
        center: bool | None = None,
        *,
        model: nn.Module | None = None,
        data: Any = None,
        loss: Callable[..., Any] | None = None,
        block_structure: str | Mapping[str, str] | None = None,
        overwrite: bool = False,
        progress: bool = False,
        **options: Any,
    ) -> Eigenvectors:
        """Return the leading eigenvectors of a block in parameter space, computed where they are not stored yet.

        Args:
            block: its key, for example `layer_3`.
            top: how many.
            center: of the covariance instead of the Fisher.
            model: the one the run was made with, where its gradients were not kept: they are formed again.
            data: all samples of the run, with `model`.
            loss: the same as when the run was made, with `model`.
            block_structure: see `block_grams`.
            overwrite: replace those that are stored with another `top` or other samples.
            progress: show a bar.
            options: of `block_grams`: samples, weights, normalization; and `config`.

        Raises:
            ConfigError: there is no such block, it has fewer than `top` eigenvalues above its noise floor, or model
                and data are not given together.
            RunError: the gradients were deleted and no model is given, or other eigenvectors are there.
            RunMismatchError: model, data or loss are not those of the run.
        """
        if (model is None) != (data is None):
            raise ConfigError("eigenvectors by a pass take both model= and data=, those that the run was made with.")
        if model is None or data is None:
            return super().eigenvectors(
                block,
                top,
                center,
                block_structure=block_structure,
                overwrite=overwrite,
                progress=progress,
                **options,
            )
        found = self.grams_of_eigenvectors(block_structure, center, **options)
        return eigenvectors_by_pass(
            self, found, block, top, model, data, loss=loss, overwrite=overwrite, progress=progress
        )


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
    staging: str | Path | None = None,
) -> Run:
    """Write the gradient of every sample with respect to every selected parameter; resume where a run was stopped.

    The model is used in `eval()` (dropout off, BatchNorm with its running statistics) and handed back as it came.

    Args:
        model: on the device where it is to run.
        samples: a map-style dataset of dicts of tensors without batch axis, or one dict of batched tensors; also an
            iterator of such dicts, of which no more than `n_samples` are read, or a DataLoader that does not shuffle.
        path: the run's folder; it is made, resumed if it is a run of the same model, samples and settings, or grown if
            its samples are the first of these. Below a URL, as `s3://bucket/run.zarr`, its Grams are built too.
        config: `None` means the defaults.
        loss: `(model, batch) -> (B,)` per-sample losses; `None` means chosen from the model's output and labels.
        n_samples: how many samples to use, from the first; `None` means all.
        description: what the samples are, in words or as options, for the manifest.
        progress: show bars.
        weights: what `load_skeleton` returned beside the model, where weights are read layer by layer.
        staging: local folder for a run below a URL while it is written, deleted in the end; `None` means
            `<name of the run>.staging` in the working folder.

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
        RemoteError: the store of a URL does not answer, or refuses access; what is finished is in the staging folder.
        CapacityError: there is no room on the disk, or no memory for one chunk of rows.
    """
    path = expanded(path)
    with ranks_of(path, SpectralConfig.of(config)) as ranks:
        with written(path, staging=staging, ranks=ranks) as folder:
            collect_gradients(
                model,
                samples,
                folder,
                config=config,
                loss=loss,
                n_samples=n_samples,
                description=description,
                progress=progress,
                weights=weights,
            )
            if isinstance(path, RemotePath) and (ranks is None or ranks.is_main):  # what they are made of is here
                Run(folder).build_grams(progress=progress)
        if ranks is not None:
            ranks.wait("until the run is sent")
    return Run(str(path) if isinstance(path, RemotePath) else path)


def open_run(path: str | Path) -> Run:
    """Open a stored run for reading.

    Args:
        path: its folder; or the URL of one on a store that fsspec knows, as `s3://bucket/run.zarr` (extra `remote`).

    Raises:
        RemoteError: the store of a URL does not answer, refuses access, or has no such place.
        MissingExtraError: what a URL takes is not installed.
        RunError: the folder does not exist or is not a run.
        CorruptRunError: its manifest is damaged or of another format version.
    """
    return Run(path)
