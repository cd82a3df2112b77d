"""Options from a YAML or TOML file."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import yaml

from streamfisher.errors import ConfigError

#: More than any file of options or patterns has.
_MOST_VALUES = 1_000_000


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read a flat mapping of options from a `.toml`, `.yaml`, `.yml` or `.json` file.

    Raises:
        ConfigError: the file is missing, cannot be parsed, or does not hold a mapping.
    """
    return {str(key).replace("-", "_"): value for key, value in read_mapping(path, "--config").items()}


def read_mapping(path: str | Path, option: str) -> dict[Any, Any]:
    """Read a mapping from a `.toml`, `.yaml`, `.yml` or `.json` file that `option` of the command line names.

    Raises:
        ConfigError: the file is missing, cannot be parsed, or does not hold a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{option} {path}: there is no such file.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml"):
            values = yaml.safe_load(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            raise ConfigError(f"{option} {path}: unknown kind {path.suffix!r}; use .toml, .yaml or .json.")
        n_values = _count(values, {})
    except ConfigError:
        raise
    except (ValueError, yaml.YAMLError, RecursionError) as error:  # parse errors, numbers and dates that are none
        raise ConfigError(f"{option} {path} cannot be parsed: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{option} {path} must hold a mapping, not {type(values).__name__}.")
    if n_values > _MOST_VALUES:
        raise ConfigError(f"{option} {path} holds more than {_MOST_VALUES:,} values, which its aliases multiply.")
    return values


def _count(value: Any, known: dict[int, float]) -> float:
    """Return how many values there are, aliases written out; each is looked at once."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # of what holds itself
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]
