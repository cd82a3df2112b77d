"""A run's folder: made, or checked to be this very run and taken up where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from streamfisher.byte_sizes import format_bytes
from streamfisher.collection.prepare import PreparedRun, lay_out, prepare
from streamfisher.collection.survey import RunData
from streamfisher.config import SpectralConfig, parse_dtype
from streamfisher.data.batches import make_units
from streamfisher.errors import CapacityError, CorruptRunError, RunMismatchError
from streamfisher.gradients import RULES, ProbeReport
from streamfisher.gradients.groups import GENERIC
from streamfisher.gradients.producer import GradientProducer
from streamfisher.models.sharding import is_sharded
from streamfisher.planning.codec_choice import choose_codec
from streamfisher.planning.run_layout import RunLayout
from streamfisher.runtime.disk import check_disk, disk_limit
from streamfisher.runtime.ranks import Ranks
from streamfisher.store import Manifest, RunLock, RunStore, grow_run, grows_anew, resume_differences, units_left
from streamfisher.store.config_file import CONFIG_FILE, write_config
from streamfisher.store.kept import is_kept
from streamfisher.store.manifest import columns_of
from streamfisher.store.packs import make_packs


def create_or_resume(
    path: Path,
    manifest: Manifest,
    model: nn.Module,
    producer: GradientProducer,
    data: RunData,
    config: SpectralConfig,
    ranks: Ranks,
    locks: contextlib.ExitStack,
    progress: bool,
    prepared: PreparedRun | None,
    streamed: bool,
) -> dict[str, Any] | None:
    """Make the run's folder, or check that what is there is named as this very run; lock it for all ranks.

    Returns:
        The new layout of a run that gets more samples and kept no gradients: those of all samples are taken again.
    """
    resuming = (path / "manifest.json").is_file()
    if is_sharded(model):
        ranks.share("whether the run exists", resuming)
    if resuming:
        locks.enter_context(RunLock(path, ranks.processes, on_lost=ranks.fail))
        store = RunStore(path)
        differences = resume_differences(store.manifest, manifest, data.samples.digest)
        if differences:
            raise RunMismatchError(
                f"{path} cannot be resumed, because it was made otherwise:\n  - "
                + "\n  - ".join(differences)
                + f"\n{_remedy(path, store.n_samples, manifest.data['n_samples'], differences)}"
            )
        if (path / CONFIG_FILE).is_file():  # of a run that was killed while it grew
            write_config(path, store.manifest)
        if grows_anew(store.manifest, len(data.samples)):
            return _laid_out_anew(store, model, producer, data, config, progress)
        if len(store.waves) == 1:
            units = make_units(len(data.samples), config.chunk_size)
            left = units_left(store, len(data.samples)) / max(len(units), 1)
            grams = 8 * len(data.samples) ** 2 * len(store.gram_members)
            check_disk(path, int(store.rows.bytes_of(len(data.samples)) * left) + grams)
        return None
    new = prepared or prepare(path, model, producer, data, config, streamed=streamed)
    if progress:
        tqdm.write(new.report.summary())
    if progress and (len(new.plan.waves) > 1 or new.plan.hold != "disk"):
        tqdm.write(_announced(new.plan))
    path.mkdir(parents=True, exist_ok=True)
    locks.enter_context(RunLock(path, ranks.processes, on_lost=ranks.fail))
    layout = manifest.layout | new.layout()
    layout["packs"] = _packs(manifest, layout)
    size = new.plan.disk if new.plan.hold == "disk" else 0
    choice = choose_codec(
        config.codec,
        path.parent,
        size,
        dtype=parse_dtype(layout["dtype_store"]),
        on_device=producer.device.type != "cpu",
        free=disk_limit(config, path),
        rounded=config.bitround is not None,
    )
    layout["codec"] = choice.codec
    if progress and size and config.codec == "auto":
        how = "as they are" if choice.codec == "raw" else f"packed by {choice.codec}"
        tqdm.write(f"Gradients are stored {how}: {choice.why}")
    RunStore.create(path, dataclasses.replace(manifest, probe=new.report.to_dict(), layout=layout))
    return None


def _laid_out_anew(
    store: RunStore, model: nn.Module, producer: GradientProducer, data: RunData, config: SpectralConfig, progress: bool
) -> dict[str, Any]:
    """Return how a run that kept no gradients is laid out with more samples; they are held where they were.

    Raises:
        RunMismatchError: the weights are spread over the ranks.
        CapacityError: so many samples do not fit the budgets.
    """
    n, now = store.n_samples, len(data.samples)
    if is_sharded(model):
        raise RunMismatchError(
            f"{store.path} has {n} samples and kept no gradients, so with {now} those of all samples are taken again, "
            "which --fsdp does in another folder only."
        )
    if progress:
        tqdm.write(
            f"The gradients of the {n} samples of {store.path} were not kept, and products of new samples with old "
            f"ones need both: the pass over all {now} is taken again."
        )
    as_it_was = config.replace(hold=store.run.hold, keep_gradients=tuple(store.keep))
    try:
        _, plan = lay_out(store.path, model, producer, data, as_it_was)
    except CapacityError:  # of a parameter that is now too large for the device, or was before
        if store.run.hold != "device":
            raise
        _, plan = lay_out(store.path, model, producer, data, as_it_was.replace(hold="auto"))
        if plan.hold == "disk":
            raise
    grown = dataclasses.replace(store.manifest, data={**store.manifest.data, "n_samples": now})
    layout = plan.layout()
    return layout | {"packs": _packs(grown, grown.layout | layout)}


def _packs(manifest: Manifest, layout: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the small parameters that share arrays, where rows are written."""
    if layout["hold"] != "disk":
        return {}
    dense = [item for item in manifest.parameters if layout["representation"][item["name"]] == "dense"]
    return make_packs(
        {item["name"]: columns_of(item) for item in dense},
        layout["waves"],
        {item["name"]: is_kept(item["name"], layout["keep"]) for item in dense},
        n_samples=manifest.data["n_samples"],
        chunk_rows=layout["chunk_rows"],
        itemsize=parse_dtype(layout["dtype_store"]).itemsize,
    )


def _remedy(path: Path, stored: int, asked: int, differences: list[str]) -> str:
    """Return what to do instead of resuming a run."""
    if asked < stored and len(differences) == 1:
        return (
            f"The run has these samples and more. The spectrum of the first {asked}: "
            f"streamfisher spectrum {path} --samples 0:{asked}"
        )
    return "Use the same model, data and settings, or another folder."


def grown_to(
    n_samples: int,
    store: RunStore,
    manifest: Manifest,
    ranks: Ranks,
    progress: bool,
    layout: Mapping[str, Any] | None = None,
) -> RunStore:
    """Return the run with room for so many samples, and with another layout; all ranks wait until rank 0 is through."""
    if n_samples <= store.n_samples:
        return store
    if ranks.is_main:
        if progress:
            tqdm.write(f"{store.path} grows from {store.n_samples} to {n_samples} samples")
        grow_run(store, manifest, layout)
    ranks.wait("for the run to grow")
    grown = RunStore(store.path, looked_over=True)
    grown.fsync = store.fsync
    return grown


def stored_routes(store: RunStore) -> ProbeReport:
    """Return how the gradients of a run are formed, as its probe found.

    Raises:
        CorruptRunError: the manifest does not say it of every parameter, or names a rule that there is not.
    """
    if not store.manifest.probe:
        raise CorruptRunError(f"{store.path}: manifest.json does not say how gradients are formed.")
    report = ProbeReport.from_dict(store.manifest.probe)
    rules = GENERIC.keys() | {rule.name for rule in RULES}
    served = {name for group in report.groups for name in group["names"].values()} | set(report.per_sample)
    served |= {name for name, one in report.parameters.items() if one.zero or one.rule == "unreached"}
    unknown = {group["rule"] for group in report.groups} - rules
    if unknown or set(report.parameters) - served:
        what = f"knows no rule {min(unknown)!r}" if unknown else "does not say how each gradient is formed"
        raise CorruptRunError(f"{store.path}: manifest.json {what}.")
    return report


def _announced(plan: RunLayout) -> str:
    sizes: dict[str, list[str]] = {}
    for wave, place in zip(plan.waves, plan.places, strict=True):
        sizes.setdefault(place, []).append(format_bytes(wave.disk))
    names = {"device": "On the device", "host": "In memory", "disk": "On disk, uncompressed"}
    parts = ". ".join(f"{names[place]}: {', '.join(found)}" for place, found in sizes.items())
    if len(sizes) > 1:
        parts += " (one parameter of these alone is too large for the device)"
    if len(plan.waves) == 1:
        place = "on the device" if plan.hold == "device" else "in memory"
        return f"Gradients stay {place} until they are reduced: {format_bytes(plan.waves[0].disk)}"
    return (
        f"{len(plan.waves)} waves: each is a pass over the data that captures some of the parameters, is reduced "
        f"to its Grams, and deleted before the next. {parts}"
    )
