"""Rows with their mean subtracted before they are stored."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from streamfisher.gradients.norms import squared_norms_of
from streamfisher.store import UnitRecord


def _subtract(record: UnitRecord, mean: dict[str, np.ndarray | None]) -> UnitRecord:
    """Return the record with the mean gradient subtracted from its valid rows, in float64 before rounding."""
    valid = torch.ones(len(record.unit), dtype=torch.bool)
    valid[[sample - record.unit.start for sample in record.skipped]] = False
    rows = {}
    for name, values in record.rows.items():
        center = torch.from_numpy(np.asarray(mean[name])).to(values.device)
        rows[name] = (values - center * valid.to(values.device)[:, None]).to(values.dtype)
    return dataclasses.replace(record, rows=rows, squared_norms=squared_norms_of(rows))
