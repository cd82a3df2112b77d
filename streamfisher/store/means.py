"""The mean pass of a run whose rows are stored centered: sums of each unit, and the mean they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np

from streamfisher.data.batches import Unit
from streamfisher.errors import CorruptRunError, unreadable
from streamfisher.runtime.durable import read_json
from streamfisher.store import codecs
from streamfisher.store.arrays import values_of
from streamfisher.store.folder import RunFolder
from streamfisher.store.forms import MEAN, MEAN_PART, require_form
from streamfisher.store.names import node_name


def _number(checksum: google_crc32c.Checksum) -> int:
    return int.from_bytes(checksum.digest(), "big")


class MeanStore:
    """Sums of each unit's rows, and the mean gradient that they make."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self._checked: set[str] = set()  # parameters whose mean is known to be what was written

    def write_part(self, unit: Unit, sums: Mapping[str, np.ndarray], count: int) -> None:
        """Write the float64 sums of a unit's valid rows, then its marker (the mean pass)."""
        for name, total in sums.items():
            self.run.array(f"mean_parts/{node_name(name)}")[unit.index] = total
        content: dict[str, Any] = {"start": unit.start, "stop": unit.stop, "count": count}
        content["crc32c"] = {name: codecs.checksum(np.asarray(total, dtype=np.float64)) for name, total in sums.items()}
        self.run.mark(f"mean-{unit.index:06d}", content)

    def finish(self) -> None:
        """Add the parts of the mean pass in the order of the units and write the mean gradient."""
        markers = [self.marker(unit) for unit in self.run.units]
        count = sum(marker["count"] for marker in markers)
        checksums = {}
        for name, columns in self.run.parameters.items():
            parts, mean = self.run.array(f"mean_parts/{node_name(name)}"), self.run.array(f"mean/{node_name(name)}")
            sums = [google_crc32c.Checksum() for _ in self.run.units]
            whole = google_crc32c.Checksum()
            for start in range(0, columns, 1 << 20):
                stop = min(start + (1 << 20), columns)
                total = np.zeros(stop - start)
                for unit in self.run.units:
                    part = values_of(parts, (unit.index, slice(start, stop)))
                    sums[unit.index].update(part.tobytes())
                    total += part
                total /= max(count, 1)
                mean[start:stop] = total
                whole.update(total.tobytes())
            for unit, marker in zip(self.run.units, markers, strict=True):
                if marker.get("crc32c", {}).get(name) not in (None, _number(sums[unit.index])):
                    raise CorruptRunError(
                        f"{self.run}: the part of the mean of {name} of samples {unit.start} to {unit.stop - 1} is "
                        "not what was written; `streamfisher verify --repair` lets the next `run` compute it again."
                    )
            checksums[name] = _number(whole)
        self.run.mark("mean", {"count": count, "crc32c": checksums})

    def marker(self, unit: Unit) -> dict[str, Any]:
        """Return the marker of a unit of the mean pass.

        Raises:
            CorruptRunError: it is damaged, or that of another unit.
        """
        path = self.run.path / "done" / f"mean-{unit.index:06d}.json"
        marker = read_json(path, self.run.largest_marker)
        require_form(marker, MEAN_PART, path)
        if (marker["start"], marker["stop"]) != (unit.start, unit.stop):
            raise CorruptRunError(f"{path} is not the marker of samples {unit.start} to {unit.stop - 1}.")
        return marker

    def wrong_parts(self, unit: Unit) -> dict[str, str]:
        """Return `{parameter: what is wrong}` with the sums of a unit of the mean pass."""
        try:
            expected = self.marker(unit).get("crc32c", {})
        except CorruptRunError as error:
            return {"": str(error)}
        wrong = {}
        for name in self.run.parameters:
            try:
                found = codecs.checksum(values_of(self.run.array(f"mean_parts/{node_name(name)}"), unit.index))
                if expected.get(name) not in (None, found):
                    wrong[name] = "not what was written"
            except (ValueError, RuntimeError, OSError) as error:
                wrong[name] = f"cannot be read ({error})"
        return wrong

    def check(self, name: str) -> None:
        """Refuse a mean gradient that is not what was written.

        Raises:
            CorruptRunError: it is not, or cannot be read.
        """
        path = self.run.path / "done" / "mean.json"
        marker = read_json(path)
        require_form(marker, MEAN, path)
        found = google_crc32c.Checksum()
        try:
            expected = marker.get("crc32c", {}).get(name)
            array = self.run.array(f"mean/{node_name(name)}")
            for start in range(0, self.run.parameters[name], 1 << 20):
                found.update(values_of(array, slice(start, start + (1 << 20))).tobytes())
        except (ValueError, RuntimeError, OSError) as error:
            if isinstance(error, CorruptRunError):
                raise
            raise unreadable(error, f"{self.run}: the mean of {name} cannot be read: {error}.") from error
        if expected not in (None, _number(found)):
            raise CorruptRunError(
                f"{self.run}: the mean of {name} is not what was written; `streamfisher verify --repair` lets the next "
                "`run` add it up again."
            )

    def mean(self, name: str, start: int, stop: int) -> np.ndarray | None:
        """Return the mean gradient that was subtracted from the rows, float64; `None` where rows are uncentered."""
        if not self.run.centered:
            return None
        if name not in self._checked:
            self.check(name)
            self._checked.add(name)
        return values_of(self.run.array(f"mean/{node_name(name)}"), slice(start, stop))
