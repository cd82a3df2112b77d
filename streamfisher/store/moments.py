"""Second moments of parameters with fewer elements than there are samples, kept beside their Grams."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streamfisher.errors import CorruptRunError, unreadable
from streamfisher.runtime.durable import read_json
from streamfisher.solving.centering import without_rounding
from streamfisher.store import codecs
from streamfisher.store.arrays import read_array, write_array
from streamfisher.store.folder import RunFolder
from streamfisher.store.forms import MOMENT, require_form
from streamfisher.store.integrity import require_inside
from streamfisher.store.means import MeanStore
from streamfisher.store.names import node_name
from streamfisher.store.opening import read_facts


class MomentStore:
    """Second moments, each with its marker."""

    def __init__(self, run: RunFolder, means: MeanStore) -> None:
        self.run, self.means = run, means

    def write(self, name: str, moment: Moment) -> int:
        """Write the second moment and, as a last row, the sum of a parameter's rows: (P + 1, P); then the marker.

        Returns:
            Its CRC-32C, for the marker of the Gram that it is kept beside.
        """
        values = np.vstack([moment.second, moment.total])
        marker = self._marker_path(name)
        marker.unlink(missing_ok=True)
        write_array(
            self.run.path,
            f"moment/{node_name(name)}",
            values,
            (f"row of {name}", f"element of {name}"),
            {"parameter": name},
        )
        checksum = codecs.checksum(values)
        facts = {"parameter": name, "n_samples": self.run.n_samples, "count": moment.count, "crc32c": checksum}
        self.run.mark_at(marker, facts)
        return checksum

    def has(self, name: str) -> bool:
        """Return whether a moment is marked as finished."""
        return self._marker_path(name).is_file()

    def read(self, name: str, expected: int | None = None) -> Moment | None:
        """Return the second moment of a parameter's valid rows; `None` where there is none for all samples.

        Args:
            name: of the parameter.
            expected: its CRC-32C as its Gram's marker has it; `None` where that says nothing of a moment.

        Raises:
            CorruptRunError: it does not match the checksum it was written with, or is expected and missing.
        """
        path, array = self._marker_path(name), self.run.path / "moment" / node_name(name)
        marker = read_json(path) if path.is_file() else {}
        if marker != {}:
            require_form(marker, MOMENT, path)
        if marker.get("parameter", name) != name:
            raise CorruptRunError(
                f"{path} is not the marker of the moment of {name}; `streamfisher gram --rebuild` remakes it."
            )
        if marker.get("n_samples") != self.run.n_samples:
            if expected is not None:
                raise CorruptRunError(
                    f"{self.run}: the moment of {name}, which belongs to its Gram, is missing; "
                    "`streamfisher gram --rebuild` remakes it."
                )
            return None
        require_inside(self.run.path, array)
        try:
            columns, count, checksum = self.run.parameters[name], marker["count"], marker["crc32c"]
            facts = read_facts(array)
            own = facts.shape == (columns + 1, columns) and facts.attributes.get("parameter", name) == name
            values = read_array(array, facts) if own else np.zeros(0)
        except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
            raise unreadable(
                error,
                f"{self.run}: the moment of {name} cannot be read: {error}. `streamfisher gram --rebuild` remakes it.",
            ) from error
        if codecs.checksum(values) != checksum or expected not in (None, checksum):
            raise CorruptRunError(
                f"{self.run}: the moment of {name} is not what was written; `streamfisher gram --rebuild` remakes it."
            )
        return Moment(values[:-1], values[-1], count, self.means.mean(name, 0, columns))

    def _marker_path(self, name: str) -> Path:
        return self.run.path / "done" / f"moment-{node_name(name)}.json"


@dataclass(frozen=True)
class Moment:
    """The second moment of one parameter's rows c_i as they are held, over the valid samples."""

    second: np.ndarray  # (P, P) float64, sum_i c_i c_i^T, exactly symmetric
    total: np.ndarray  # (P,) float64, sum_i c_i
    count: int  # n, valid samples
    mean: np.ndarray | None = None  # (P,) float64, what was subtracted from the gradients: g_i = c_i + mean

    def matrix(self, *, center: bool) -> np.ndarray:
        """Return `sum_i g_i g_i^T`, or with g_i less their mean for `center`: (P, P) float64."""
        if center:  # of c_i as of g_i: the mean cancels
            return without_rounding(self.second - np.outer(self.total, self.total) / self.count, self.second)
        if self.mean is None:
            return self.second
        cross = np.outer(self.total, self.mean)
        return self.second + cross + cross.T + self.count * np.outer(self.mean, self.mean)
