"""Names of parameters as names of files."""

from __future__ import annotations

from urllib.parse import quote


def node_name(parameter: str) -> str:
    """Return a parameter's name as one path component that cannot leave the folder or clash with Zarr's own names."""
    name = quote(parameter, safe="")
    if name.startswith("__") or set(name) <= {"."} or name == "zarr.json":
        name = "%" + f"{ord(name[0]):02X}" + name[1:]
    return name
