"""The version, where everything can read it."""

import functools
import platform
from importlib import metadata

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the packages that decide numbers."""
    return dict(_installed())


@functools.cache
def _installed() -> dict[str, str]:
    found = {"streamfisher": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "zarr", "numcodecs", "dask", "accelerate", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
