"""A run that is given more samples: what it holds stays, and only what is new is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from streamfisher.data.batches import Unit, make_units
from streamfisher.errors import RunMismatchError
from streamfisher.runtime.durable import write_json, write_marker
from streamfisher.store.config_file import write_config
from streamfisher.store.layout import MANIFEST_COPY
from streamfisher.store.manifest import Manifest, differences
from streamfisher.store.names import node_name
from streamfisher.store.run_store import RunStore


def resume_differences(stored: Manifest, now: Manifest, digest: Callable[[Unit], str]) -> list[str]:
    """Return in words what keeps `now` from resuming the run `stored`, or from adding samples to it.

    Samples may be added where the run's own are the first ones of the data: the digests of its full units must be those
    of the data now, and the digest of its last, shorter unit is taken again over just its samples.

    Args:
        stored: of the run.
        now: of the work that is asked for.
        digest: SHA-256 of the contents of samples, as `Samples.digest`.
    """
    n = stored.data["n_samples"]
    if now.data["n_samples"] <= n:
        return differences(stored, now)
    rows = stored.layout["chunk_rows"]
    full = n // rows
    digests = now.data["chunk_digests"][:full]
    if n % rows and now.layout["chunk_rows"] == rows:
        digests = [*digests, digest(Unit(full, full * rows, n))]
    first = dataclasses.replace(now, data={**now.data, "n_samples": n, "chunk_digests": digests})
    found = differences(stored, first)
    if not found and (len(stored.waves) > 1 or "*" not in stored.layout.get("keep", ["*"])):
        found = [
            f"number of samples: {n} in the run, {now.data['n_samples']} now. Gradients of the run were deleted after "
            "their Grams were built, and products of new samples with old ones need both, so only a run with "
            "--keep-gradients all can grow"
        ]
    if not found and stored.layout["centered"]:
        found = [
            f"number of samples: {n} in the run, {now.data['n_samples']} now. Its rows are stored centered, and with "
            "more samples the mean is another one, so a run with store_centered=True cannot grow"
        ]
    return found


def units_left(store: RunStore, n_samples: int) -> int:
    """Return how many units of rows are to be computed once the run has `n_samples`."""
    units = make_units(n_samples, store.chunk_rows)
    kept = {unit.index for unit in store.units if units[unit.index] == unit}
    return len(units) - len(store.markers.finished_units() & kept)


def grow_run(store: RunStore, manifest: Manifest) -> RunStore:
    """Make room for more samples and return the run, opened anew; only while holding the lock.

    The arrays become longer, a last unit that was not full loses its marker (its rows are computed again, in the
    batches that it now has), and at last the manifest names the new number of samples. Killed before that, the run is
    what it was, but for at most that one unit; rows beyond the manifest's number of samples are never read.

    Args:
        store: the run, not stored centered.
        manifest: of the work that is asked for; its description of the data becomes the run's.

    Raises:
        RunMismatchError: the rows are stored centered.
    """
    if store.centered:
        raise RunMismatchError(f"{store.path} holds centered rows and cannot grow: the mean would change.")
    n = manifest.data["n_samples"]
    store.named.clear()  # its arrays are of fewer samples
    for name in store.parameters:
        if store.rows.representation(name) == "dense":
            _lengthen(store, f"gradients/{node_name(name)}", n)
    for what in ("loss", "n_targets", "valid", "squared_norm"):
        _lengthen(store, f"samples/{what}", n)
    if store.n_samples % store.chunk_rows:
        store.forget_unit(store.units[-1])
    grown = dataclasses.replace(store.manifest, data=manifest.data).to_dict()
    write_marker(store.path / "manifest.json", grown, fsync=store.fsync)
    write_json(store.path / MANIFEST_COPY, grown)
    write_config(store.path, Manifest.from_dict(grown))
    return RunStore(store.path)


def _lengthen(store: RunStore, path: str, n_samples: int) -> None:
    array = store.run.array(path)
    if array.shape[0] != n_samples:
        array.resize((n_samples, *array.shape[1:]))
