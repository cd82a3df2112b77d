"""A model larger than one device: its modules over several GPUs, the CPU and the disk, by Accelerate's dispatch."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from streamfisher.errors import ConfigError, first_line

#: How Accelerate spreads modules by itself.
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

DeviceMap = str | dict[str, int | str]


def read_device_map(value: str) -> DeviceMap:
    """Return a strategy, or the content of a .json or .yaml file: `{module name: GPU number, 'cpu' or 'disk'}`.

    Raises:
        ConfigError: it is neither a strategy nor such a file.
    """
    if value in STRATEGIES:
        return value
    path = Path(value)
    if not path.is_file():
        raise ConfigError(f"--device-map {value!r} is neither a file nor one of {', '.join(STRATEGIES)}.")
    try:
        text = path.read_text(encoding="utf-8")
        content: Any = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, OSError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--device-map {value} cannot be read: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"--device-map {value} must hold a mapping from module names to devices.")
    for name, device in content.items():
        if not (_is_plain(name) and _is_plain(device)):
            raise ConfigError(
                f"--device-map {value}: {_shown(name)} is put on {_shown(device)}; give a GPU number, cpu or disk."
            )
    return {str(name): device for name, device in content.items()}


def _is_plain(value: Any) -> bool:
    """Return whether a value is text or a number such as modules and devices have."""
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31)


def _shown(value: Any) -> str:
    """Return a value for a message: aliases of YAML may multiply it, and Python writes no number of 5,000 digits."""
    try:
        return reprlib.repr(value)[:80]
    except ValueError:
        return f"a {type(value).__name__} that is too long to be shown"


def check_device_map(model: nn.Module, devices: Mapping[str, int | str]) -> None:
    """Refuse a map that names what the model does not have, or leaves out what it has.

    Args:
        model: may be on the meta device.
        devices: `''` stands for the whole model.

    Raises:
        ConfigError: the message names the modules.
    """
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    unknown = [name for name in devices if name not in known]
    if unknown:
        some = ", ".join(name for name, _ in model.named_children())
        raise ConfigError(
            f"--device-map names {', '.join(map(repr, unknown[:5]))}, and {type(model).__name__} has no such module. "
            f"Its outermost modules are {some}."
        )
    missing = [name for name, _ in model.named_parameters() if not _covered(name, devices)]
    if missing:
        raise ConfigError(
            f"--device-map says nothing of {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}; "
            "put every module somewhere."
        )


def place(model: nn.Module, devices: DeviceMap, offload_folder: str | Path) -> nn.Module:
    """Dispatch a model that is in memory.

    Args:
        model: with its weights, on the CPU.
        devices: a strategy, or module names and their devices.
        offload_folder: for weights on disk.

    Raises:
        ConfigError: the map does not fit the model, or names a device that is not there.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    kept = getattr(model, "_no_split_modules", None)
    if not isinstance(devices, str):
        places: Mapping[str, int | str] = devices
    else:
        memory = None
        if devices != "sequential":
            low_zero = devices == "balanced_low_0"
            memory = get_balanced_memory(model, no_split_module_classes=kept, low_zero=low_zero)
        places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=kept)
    check_device_map(model, places)
    try:
        return dispatch_model(model, dict(places), offload_dir=str(offload_folder), force_hooks=True)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--device-map cannot be followed: {first_line(error)}") from error


def _covered(name: str, devices: Mapping[str, Any]) -> bool:
    return any(not key or name == key or name.startswith(f"{key}.") for key in devices)
