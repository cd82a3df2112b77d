"""A run that is given more samples: what it holds stays, and only what is new is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from streamfisher.data.batches import Unit, make_units
from streamfisher.errors import RunMismatchError
from streamfisher.runtime.durable import write_json, write_marker
from streamfisher.runtime.own_files import remove_tree
from streamfisher.store.config_file import write_config
from streamfisher.store.layout import MANIFEST_COPY, create_row_arrays
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
    if not found and stored.layout["centered"]:
        found = [
            f"number of samples: {n} in the run, {now.data['n_samples']} now. Its rows are stored centered, and with "
            "more samples the mean is another one, so a run with store_centered=True cannot grow"
        ]
    return found


def grows_anew(stored: Manifest, n_samples: int) -> bool:
    """Return whether a run that gets so many samples must take the gradients of all of them.

    Those of its own were deleted after their Grams were built, and products of new samples with old ones need both.
    """
    kept = len(stored.waves) == 1 and "*" in stored.layout.get("keep", ["*"])
    return n_samples > stored.data["n_samples"] and not kept


def units_left(store: RunStore, n_samples: int) -> int:
    """Return how many units of rows are to be computed once the run has `n_samples`."""
    units = make_units(n_samples, store.chunk_rows)
    kept = {unit.index for unit in store.units if units[unit.index] == unit}
    return len(units) - len(store.markers.finished_units() & kept)


def grow_run(store: RunStore, manifest: Manifest, layout: Mapping[str, Any] | None = None) -> RunStore:
    """Make room for more samples and return the run, opened anew; only while holding the lock.

    The arrays become longer, a last unit that was not full loses its marker (its rows are computed again, in the
    batches that it now has), and at last the manifest names the new number of samples. Killed before that, the run is
    what it was, but for at most that one unit; rows beyond the manifest's number of samples are never read.

    Where the gradients of all samples are to be taken again, all units lose their markers, and the run its layout;
    killed before the manifest says so, it has its Grams and takes its pass once more when it goes on.

    Args:
        store: the run, not stored centered.
        manifest: of the work that is asked for; its description of the data becomes the run's.
        layout: instead of the run's, where the gradients of all samples are taken again.

    Raises:
        RunMismatchError: the rows are stored centered.
    """
    if store.centered:
        raise RunMismatchError(f"{store.path} holds centered rows and cannot grow: the mean would change.")
    n = manifest.data["n_samples"]
    store.named.clear()  # its arrays are of fewer samples
    dense = [name for name in store.parameters if store.rows.representation(name) == "dense"]
    if store.run.hold != "disk":
        dense = []  # they are not written
    for path in dict.fromkeys(store.run.places[name].array for name in dense if layout is None):
        _lengthen(store, path, n)
    for what in ("loss", "n_targets", "valid", "squared_norm"):
        _lengthen(store, f"samples/{what}", n)
    if store.n_samples % store.chunk_rows and layout is None:
        store.forget_unit(store.units[-1])
    changed = dataclasses.replace(store.manifest, data=manifest.data)
    if layout is not None:
        changed = dataclasses.replace(changed, layout={**changed.layout, **layout})
        _forget_gradients(store, changed)
    grown = changed.to_dict()
    write_marker(store.path / "manifest.json", grown, fsync=store.fsync)
    write_json(store.path / MANIFEST_COPY, grown)
    write_config(store.path, Manifest.from_dict(grown))
    return RunStore(store.path)


def _forget_gradients(store: RunStore, changed: Manifest) -> None:
    """Remove all that says of gradients that they were taken, and the Grams that the changed run does not have."""
    for unit in store.units:
        store.forget_unit(unit)
    for wave in range(len(store.waves)):
        store.kept.want(wave)
    for key, members in store.gram_members.items():
        if changed.gram_members.get(key) != members:
            store.grams.forget(key)
            for kind in ("gram", "gram_mean", "moment"):
                remove_tree(store.path, store.path / kind / node_name(key))
    if store.run.hold == "disk":  # other parameters may share arrays, or be held otherwise
        for kind in ("gradients", "packed", "factors"):
            remove_tree(store.path, store.path / kind)
        create_row_arrays(store.path, changed)


def _lengthen(store: RunStore, path: str, n_samples: int) -> None:
    array = store.run.array(path)
    if array.shape[0] != n_samples:
        array.resize((n_samples, *array.shape[1:]))
