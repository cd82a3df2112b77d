"""A model from a Hugging Face folder or id, or from the user's own callable."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamfisher.errors import ConfigError, ModelError, require
from streamfisher.placement import DeviceMap, check_device_map, place


def load_model(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path = "offload",
) -> nn.Module:
    """Return a model in eval mode on `device`, or spread by `device_map`.

    Args:
        spec: a Hugging Face folder or id, or `package.module:callable` that returns an `nn.Module` when called without
            arguments. The callable is the only code of yours that is run.
        dtype: cast to it; `None` keeps the dtype of the checkpoint.
        device: where to put it.
        trust_remote_code: run code that comes with a Hugging Face checkpoint.
        device_map: a strategy of Accelerate, or module names and devices, instead of `device`.
        offload_folder: for weights that the map puts on disk.

    Raises:
        ConfigError: the device map does not fit the model.
        ModelError: the model cannot be found or loaded, or the callable returns something else.
        MissingExtraError: transformers is needed and not installed.
    """
    if ":" in spec and not Path(spec).exists():
        model = call(spec, "MODEL")
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"MODEL {spec} returned a {type(model).__name__}, not a torch.nn.Module; it must return the model."
            )
    else:
        placed = {"device_map": device_map, "offload_folder": str(offload_folder)} if device_map is not None else {}
        model = _load_pretrained(spec, dtype, trust_remote_code, placed)
        if placed:
            return model.eval()
    if dtype is not None:
        model = model.to(dtype)
    if device_map is not None:
        return place(model, device_map, offload_folder).eval()
    return model.to(device).eval()


def load_tokenizer(spec: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a Hugging Face folder or id.

    Raises:
        ModelError: there is none.
        MissingExtraError: transformers is not installed.
    """
    check_pretrained(spec)
    require("transformers", "hf", f"tokenize text for {spec}")
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(spec, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no tokenizer could be loaded from {spec}: {_first_line(error)}. Use --tokenizer bytes, or give token ids."
        ) from error


def is_callable_spec(spec: str) -> bool:
    """Return whether `spec` has the form `package.module:callable`."""
    module, colon, attribute = spec.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def call(spec: str, what: str) -> Any:
    """Import `package.module:callable` (the current folder counts) and return what the call gives.

    Raises:
        ConfigError: the text has another form, the module or attribute does not exist, or it is not callable.
    """
    if not is_callable_spec(spec):
        raise ConfigError(f"{what} {spec!r} does not exist as a path and is not of the form package.module:callable.")
    module_name, _, attribute = spec.partition(":")
    with _current_folder_on_path():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"{what} {spec}: {error}. The folder you are in is searched, and what is installed."
            ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"{what} {spec}: {module_name} has no callable named {attribute}.")
    if _needs_arguments(function):
        raise ConfigError(f"{what} {spec}: {attribute} must be callable without arguments; write a function that is.")
    return function()


def pick_device(name: str) -> torch.device:
    """Return the device that `name` means, once a tensor could be put there.

    Raises:
        ConfigError: torch does not know it, or it is not there.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"--device {name} cannot be used: {_first_line(error)}. Use --device cpu, or leave it out."
        ) from error
    return device


def check_pretrained(spec: str) -> None:
    """Refuse what can be neither a Hugging Face folder nor an id, before anything is fetched.

    Raises:
        ConfigError: it looks like `module:callable` and is not of that form.
        ModelError: there is no such folder, or it has no `config.json`.
    """
    path = Path(spec)
    if ":" in spec and not path.exists():
        raise ConfigError(f"MODEL {spec!r} does not exist as a path and is not of the form package.module:callable.")
    looks_like_path = spec.startswith((".", "/", "~")) or spec.count("/") > 1
    if not path.exists() and looks_like_path:
        raise ModelError(
            f"MODEL {spec}: there is no such folder. Give a Hugging Face folder or id, or module:callable."
        )
    if path.is_file():
        raise ModelError(f"MODEL {spec} is a file. Give the Hugging Face folder it is in, an id, or module:callable.")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(
            f"MODEL {spec}: the folder has no config.json, so it is not a Hugging Face model. Give the folder that "
            "save_pretrained wrote, an id, or module:callable."
        )


def _needs_arguments(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:  # it has no signature that Python knows
        return False
    return False


def _load_pretrained(
    spec: str, dtype: torch.dtype | None, trust_remote_code: bool, placed: Mapping[str, Any]
) -> nn.Module:
    check_pretrained(spec)
    require("transformers", "hf", f"load the model {spec}")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(spec, trust_remote_code=trust_remote_code)
        kind = auto_class(transformers, config)
        if isinstance(placed.get("device_map"), dict):
            with torch.device("meta"):
                check_device_map(kind._from_config(config), placed["device_map"])
        return kind.from_pretrained(
            spec, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=trust_remote_code, **placed
        )
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"MODEL {spec} cannot be loaded: {_first_line(error)}") from error


def auto_class(transformers: Any, config: Any) -> Any:
    """Return the class the checkpoint was saved from, so that no head is made up or lost."""
    for name in getattr(config, "architectures", None) or []:
        kind = getattr(transformers, name, None)
        if kind is not None:
            return kind
    return transformers.AutoModelForCausalLM


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def _current_folder_on_path():
    folder = str(Path.cwd())
    added = folder not in sys.path
    if added:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if added:
            sys.path.remove(folder)
