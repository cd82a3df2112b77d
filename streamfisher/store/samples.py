"""What was seen of each sample: loss, targets, validity, norms, and scalars that came with the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from streamfisher.data.batches import Unit
from streamfisher.errors import CorruptRunError, unreadable
from streamfisher.runtime.durable import read_json
from streamfisher.store.arrays import CHUNK, write_array
from streamfisher.store.folder import RunFolder
from streamfisher.store.forms import FIELDS, require_form
from streamfisher.store.integrity import check_layout, digest_of_values, require_inside
from streamfisher.store.markers import Markers, stage_of
from streamfisher.store.names import node_name
from streamfisher.store.opening import open_array


class SampleStore:
    """Values per sample: (N,) arrays, each unit of which is bound to its markers."""

    def __init__(self, run: RunFolder, markers: Markers) -> None:
        self.run, self.markers = run, markers

    def write_fields(self, fields: Mapping[str, np.ndarray]) -> None:
        """Write what the data says of every sample, (N,) float64 each, for selecting samples later; then the marker."""
        checksums = {name: digest_of_values(name, values) for name, values in fields.items()}
        for name, values in fields.items():
            facts = {"field": name, "crc32c": checksums[name]}
            write_array(self.run.path, f"fields/{node_name(name)}", values, ("sample",), facts)
        if fields:
            self.run.mark("fields", {"crc32c": checksums})

    def missing_fields(self) -> list[str]:
        """Return the fields that the marker has and the run has not; older runs have no such marker.

        Raises:
            CorruptRunError: the marker is damaged.
        """
        marker = self.run.path / "done" / "fields.json"
        content = read_json(marker) if marker.is_file() else {"crc32c": {}}
        require_form(content, FIELDS, marker)
        names = content["crc32c"]
        return [name for name in names if not (self.run.path / "fields" / node_name(name) / "zarr.json").is_file()]

    def fields(self) -> dict[str, np.ndarray]:
        """Return `{name: (N,) float64}`: per-sample facts to select by: `loss`, `n_targets`, the data's own scalars.

        A scalar of the data that is called as one of the run's own facts comes as `data_<name>`.

        Raises:
            CorruptRunError: something of them is missing, or not what was written.
        """
        for name in self.missing_fields():
            raise CorruptRunError(f"{self.run}: the field {name} is missing; the next `run` writes it again.")
        found = {name: self.per_sample(name).astype(np.float64) for name in ("loss", "n_targets")}
        for path in sorted((self.run.path / "fields").glob("*/zarr.json")):
            name, values = self.read_field(path.parent)
            found[f"data_{name}" if name in ("loss", "n_targets") else name] = values
        return found

    def read_field(self, path: Path) -> tuple[str, np.ndarray]:
        """Return name and values of the field in a folder.

        Raises:
            CorruptRunError: it is not what was written.
        """
        require_inside(self.run.path, path)
        try:
            array = open_array(path)
            name, size = str(array.attrs["field"]), int(array.shape[0])
            check_layout(array, path, (min(size, self.run.n_samples),), (min(size, CHUNK),), "float64", longer=True)
            values = np.asarray(array[: self.run.n_samples])
            whole = "crc32c" not in array.attrs or digest_of_values(name, values) == array.attrs["crc32c"]
            right = whole and node_name(name) == path.name
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise unreadable(error, f"{path} cannot be read: {error}. The next `run` writes it again.") from error
        if not right:
            raise CorruptRunError(f"{path} is not what was written; the next `run` writes it again.")
        return name, values

    def read_unit(self, what: str, unit: Unit) -> np.ndarray:
        """Return `loss`, `n_targets`, `valid` or `squared_norm` of the samples of a unit."""
        return self.run.values(f"samples/{what}", slice(unit.start, unit.stop))

    def per_sample(self, what: str) -> np.ndarray:
        """Return `loss`, `n_targets`, `valid` or `squared_norm` of all samples.

        Raises:
            CorruptRunError: a chunk fails its checksum.
        """
        try:
            values = self.run.values(f"samples/{what}", slice(0, self.run.n_samples))
        except (ValueError, RuntimeError, OSError) as error:
            raise unreadable(
                error,
                f"{self.run}: samples/{what} cannot be read: {error}. `streamfisher verify` finds which samples are "
                "affected; after `verify --repair` the next `run` computes them again.",
            ) from error
        done = self._done_in_waves()
        for unit in self.run.units:
            waves = [wave for wave, indices in enumerate(done) if unit.index in indices]
            if waves:
                self.check(what, unit, values[unit.start : unit.stop], waves)
        return values

    def check(self, what: str, unit: Unit, values: np.ndarray, waves: Sequence[int]) -> None:
        """Refuse per-sample values of a unit that are not what its markers in some waves say.

        Raises:
            CorruptRunError: they are not, or a marker is damaged.
        """
        markers = {
            wave: self.markers.of_unit(unit, wave)
            for wave in range(len(self.run.waves))
            if self.markers.is_done(unit, wave)
        }
        if what == "valid":
            skipped = {int(sample) for marker in markers.values() for sample in marker["skipped"]}
            right = np.array_equal(values, [sample not in skipped for sample in range(unit.start, unit.stop)])
        elif what == "squared_norm":
            known = {wave: marker["samples"][what] for wave, marker in markers.items() if "samples" in marker}
            right = all(self.digests(wave, {what: values})[what] == digest for wave, digest in known.items())
        else:  # each wave has written all of them, and the last one counts
            known = {wave: marker["samples"][what] for wave, marker in markers.items() if "samples" in marker}
            right = not known or digest_of_values(what, values) in known.values()
        if not right:
            raise CorruptRunError(
                f"{self.run}: samples/{what} of samples {unit.start} to {unit.stop - 1} are not what was written. "
                "`streamfisher verify` finds what is affected; after `verify --repair` the next `run` computes it anew."
            )

    def _done_in_waves(self) -> list[set[int]]:
        return [self.markers.done_units(stage_of(wave)) for wave in range(len(self.run.waves))]

    def digests(self, wave: int, values: Mapping[str, np.ndarray]) -> dict[str, int]:
        """Return digests of per-sample values of a unit; of the norms, only those of the wave's parameters."""
        found = dict(values)
        if "squared_norm" in found:
            columns = {name: column for column, name in enumerate(self.run.parameters)}
            found["squared_norm"] = found["squared_norm"][:, [columns[name] for name in self.run.waves[wave]]]
        return {what: digest_of_values(what, part) for what, part in found.items()}

    def skipped(self) -> dict[int, str]:
        """Return `{sample number: reason}` of the samples that do not count."""
        found: dict[int, str] = {}
        for wave in range(len(self.run.waves)):
            for index in sorted(self.markers.done_units(stage_of(wave))):
                marker = self.markers.of_unit(self.run.units[index], wave)
                found = {int(sample): reason for sample, reason in marker["skipped"].items()} | found
        return found

    def of_other_waves(
        self, unit: Unit, wave: int, valid: np.ndarray, norms: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Put what other waves have found beside this one's: norms of their parameters, and samples they skipped."""
        where = slice(unit.start, unit.stop)
        done = [w for w in range(len(self.run.waves)) if w != wave and self.markers.is_done(unit, w)]
        try:
            known = self.run.values("samples/squared_norm", where)
        except (ValueError, RuntimeError, OSError):  # damaged, and now written anew
            known = norms
        columns = {name: column for column, name in enumerate(self.run.parameters)}
        for other in done:
            places = [columns[name] for name in self.run.waves[other]]
            norms[:, places] = known[:, places]
            for sample in self.markers.of_unit(unit, other)["skipped"]:
                valid[int(sample) - unit.start] = 0
        return valid, norms
