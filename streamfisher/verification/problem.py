"""What verifying finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was written."""

    what: str  # 'rows', 'factors', 'marker', 'loss', 'n_targets', 'valid', 'squared_norm', 'gram', 'mean', ...
    parameter: str | None
    first_sample: int | None
    last_sample: int | None
    detail: str

    def __str__(self) -> str:
        where = f" of {self.parameter}" if self.parameter else ""
        samples = "" if self.first_sample is None else f", samples {self.first_sample} to {self.last_sample}"
        return f"{self.what}{where}{samples}: {self.detail}"
