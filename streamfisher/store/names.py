"""Names of parameters as names of files."""

from __future__ import annotations

import functools
import hashlib
from urllib.parse import quote

#: Characters of a name that leave room for what markers and partial files put around it; filesystems take 255.
_LONGEST = 223


@functools.lru_cache(maxsize=1 << 14)
def node_name(parameter: str) -> str:
    """Return a parameter's name as one path component that cannot leave the folder or clash with Zarr's own names."""
    name = quote(parameter, safe="")
    if name.startswith("__") or set(name) <= {"."} or name == "zarr.json":
        name = "%" + f"{ord(name[0]):02X}" + name[1:]
    if len(name) > _LONGEST:  # its arrays and markers hold the whole one
        name = f"{name[:180]}~{hashlib.sha256(parameter.encode()).hexdigest()[:32]}"
    return name
