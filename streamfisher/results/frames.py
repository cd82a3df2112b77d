"""A spectrum as a pandas DataFrame and as an xarray Dataset, with named dimensions and coordinates."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from streamfisher.errors import ConfigError, require
from streamfisher.results.notebook import Block, Shown, title

FrameKind = Literal["metrics", "eigenvalues"]
Array = np.ndarray[Any, np.dtype[Any]]


def members(spectrum: Shown) -> dict[str, Block]:
    """Return what a spectrum holds by key: its blocks, `global`, the union, and `whole_model` where it was solved."""
    found = dict(spectrum.reached)
    found.setdefault("global", spectrum.global_)
    if len(spectrum.blocks) > 1 and spectrum.whole is not None:
        found.setdefault("whole_model", spectrum.whole)
    return found


def frame(spectrum: Shown, kind: FrameKind) -> Any:
    """Return a DataFrame: of metrics, indexed by block; or of eigenvalues, by block and index from 1.

    Raises:
        ConfigError: the kind is unknown.
        MissingExtraError: pandas is not installed.
    """
    require("pandas", "tables", "make data frames")
    import pandas

    found = members(spectrum)
    if kind == "metrics":
        rows = [{k: v for k, v in block.metrics.items() if not isinstance(v, list)} for block in found.values()]
        return pandas.DataFrame(rows, index=pandas.Index(list(found), name="block")).drop(columns="block_name")
    if kind != "eigenvalues":
        raise ConfigError(f"to_frame({kind!r}) is unknown; choose metrics or eigenvalues.")
    parts = {
        name: pandas.DataFrame(
            {"eigenvalue": block.eigenvalues, "above_floor": block.above_floor},
            index=pandas.RangeIndex(1, len(block.eigenvalues) + 1, name="index"),
        )
        for name, block in found.items()
    }
    return pandas.concat(parts, names=["block"])


def named_arrays(spectrum: Shown, *, union: bool = True) -> dict[str, tuple[tuple[str, ...], Array]]:
    """Return `eigenvalue` and `above_floor` (block, index), every metric (block), and the coordinates, by name.

    Blocks of fewer eigenvalues are filled up with NaN, and `False`.

    Args:
        spectrum: its blocks, and the whole model where it was solved.
        union: the union of several blocks too, which makes `index` as long as it.
    """
    found = members(spectrum)
    if not union and len(spectrum.blocks) > 1:
        found.pop("global")
    longest = max(len(block.eigenvalues) for block in found.values())
    values, above = np.full((len(found), longest), np.nan), np.zeros((len(found), longest), dtype=bool)
    for place, block in enumerate(found.values()):
        values[place, : len(block.eigenvalues)] = block.eigenvalues
        above[place, : len(block.eigenvalues)] = block.above_floor
    names = [k for k, v in spectrum.global_.metrics.items() if v is None or isinstance(v, int | float)]
    numbers = {
        name: (("block",), np.array([_value(block.metrics.get(name)) for block in found.values()])) for name in names
    }
    coordinates = {
        "block": (("block",), np.array(list(found), dtype=np.dtypes.StringDType())),
        "index": (("index",), np.arange(1, longest + 1)),
    }
    both = ("block", "index")
    return {"eigenvalue": (both, values), "above_floor": (both, above), **numbers, **coordinates}


def facts(spectrum: Shown) -> dict[str, Any]:
    """Return what a data set says of itself."""
    return {"title": title(spectrum), "n_samples": spectrum.global_.n_samples}


def dataset(spectrum: Shown) -> Any:
    """Return an xarray Dataset of `named_arrays`.

    Raises:
        MissingExtraError: xarray is not installed.
    """
    require("xarray", "tables", "make data sets")
    import xarray

    found = named_arrays(spectrum)
    coordinates = {name: found.pop(name)[1] for name in ("block", "index")}
    return xarray.Dataset(
        found, coords=coordinates | {"block": [str(name) for name in coordinates["block"]]}, attrs=facts(spectrum)
    )


def _value(value: float | None) -> float:
    return np.nan if value is None else float(value)
