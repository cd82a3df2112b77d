"""A model from a Hugging Face folder or id, or from the user's own callable."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamfisher.errors import ConfigError, ModelError, StreamfisherError, first_line, no_memory, require
from streamfisher.models.checkpoint import load_sharded, load_weights
from streamfisher.models.device_map import DeviceMap, check_device_map, place
from streamfisher.models.sharding import shard
from streamfisher.runtime.callables import call
from streamfisher.runtime.paths import expanded

#: What else an argument takes.
_OR_CALLABLE = {"MODEL": ", or module:callable", "--tokenizer": ", or 'bytes'"}


def load_model(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path = "offload",
    sharded: bool = False,
) -> nn.Module:
    """Return a model in eval mode on `device`, or spread by `device_map`, or sharded over all ranks.

    Args:
        spec: a Hugging Face folder or id, or `package.module:callable` that returns an `nn.Module`, or `(model,
            tokenizer)`, when called without arguments. The callable is the only code of yours that is run.
        dtype: cast to it; `None` keeps the dtype of the checkpoint.
        device: where to put it.
        trust_remote_code: run code that comes with a Hugging Face checkpoint.
        device_map: a strategy of Accelerate, or module names and devices, instead of `device`.
        offload_folder: for weights that the map puts on disk.
        sharded: by FSDP2. Each rank then reads its part of a checkpoint only; what a callable returns is made whole on
            every rank first.

    Raises:
        ConfigError: the device map does not fit the model; or it is to be sharded over one rank, or by a map as well.
        ModelError: the model cannot be found or loaded, or the callable returns something else.
        MissingExtraError: transformers is needed and not installed.
    """
    return load_with_tokenizer(
        spec,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        offload_folder=offload_folder,
        sharded=sharded,
    )[0]


def load_with_tokenizer(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path = "offload",
    sharded: bool = False,
) -> tuple[nn.Module, Any]:
    """Return a model as `load_model` does, and the tokenizer that its callable returned beside it, or `None`."""
    device, spec = torch.device(device), _expanded(spec)
    if sharded and device_map is not None:
        raise ConfigError("--fsdp spreads the weights over ranks and --device-map over devices; use one of them.")
    if ":" in spec and not Path(spec).exists():
        model, tokenizer = model_and_tokenizer(call(spec, "MODEL"), spec)
    else:
        where: dict[str, Any] = {"device_map": {"": str(device)}}
        if device_map is not None:
            where = {"device_map": device_map, "offload_folder": str(offload_folder)}
        return _load_pretrained(spec, dtype, trust_remote_code, where, device if sharded else None).eval(), None
    if dtype is not None:
        model = model.to(dtype)
    if device_map is not None:
        model = place(model, device_map, offload_folder)
    elif sharded:
        model = shard(model, device)
    else:
        model = model.to(device)
    return model.eval(), tokenizer


def model_and_tokenizer(returned: Any, spec: str) -> tuple[nn.Module, Any]:
    """Return what a callable gave: a model, and `None` or the tokenizer that came with it.

    Raises:
        ModelError: it gave something else.
    """
    model, tokenizer = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if isinstance(model, nn.Module):
        return model, tokenizer
    raise ModelError(
        f"MODEL {spec} returned a {type(returned).__name__}, not a torch.nn.Module; it must return the model, or "
        "(model, tokenizer)."
    )


def _expanded(spec: str) -> str:
    return str(expanded(spec)) if spec.startswith("~") else spec


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
            f"--device {name} cannot be used: {first_line(error)}. Use --device cpu, or leave it out."
        ) from error
    return device


def check_pretrained(spec: str, what: str = "MODEL", *, needs_config: bool = True) -> None:
    """Refuse what can be neither a Hugging Face folder nor an id, before anything is fetched.

    Args:
        spec: a folder or an id.
        what: the argument that named it.
        needs_config: a folder must hold a model, not a tokenizer alone.

    Raises:
        ConfigError: it looks like `module:callable` and is not of that form.
        ModelError: there is no such folder, or it has no `config.json`.
    """
    path = Path(spec)
    if ":" in spec and not path.exists():
        raise ConfigError(f"{what} {spec!r} does not exist as a path and is not of the form package.module:callable.")
    looks_like_path = spec.startswith((".", "/", "~")) or spec.count("/") > 1
    if not path.exists() and looks_like_path:
        raise ModelError(
            f"{what} {spec}: there is no such folder. Give a Hugging Face folder or id{_OR_CALLABLE[what]}."
        )
    if path.is_file():
        raise ModelError(f"{what} {spec} is a file. Give the Hugging Face folder it is in, an id{_OR_CALLABLE[what]}.")
    if needs_config and path.is_dir() and not ((path / "config.json").is_file() or is_adapter(spec)):
        raise ModelError(
            f"{what} {spec}: the folder has no config.json, so it is not a Hugging Face model. Give the folder that "
            "save_pretrained wrote, an id, or module:callable."
        )


def _load_pretrained(
    spec: str,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    where: Mapping[str, Any],
    sharded_on: torch.device | None,
) -> nn.Module:
    check_pretrained(spec)
    require("transformers", "hf", f"load the model {spec}")
    import transformers

    if is_adapter(spec):
        if sharded_on is not None:
            raise ConfigError(f"MODEL {spec} is an adapter, which --fsdp cannot shard; load it in a module:callable.")
        return with_adapter(
            lambda base: _load_pretrained(base, dtype, trust_remote_code, where, None), spec, trust_remote_code
        )
    with in_a_sentence(f"MODEL {spec} cannot be loaded", named=spec):
        config = transformers.AutoConfig.from_pretrained(spec, trust_remote_code=trust_remote_code)
        kind = auto_class(transformers, config)
        options = {"config": config, "dtype": dtype or "auto", "use_safetensors": True}
        options["trust_remote_code"] = trust_remote_code
        if sharded_on is not None:
            return load_sharded(kind, spec, options, sharded_on)
        if isinstance(where["device_map"], dict) and "offload_folder" in where:  # the user's own
            with torch.device("meta"):
                check_device_map(kind._from_config(config), where["device_map"])
        return load_weights(kind, spec, {**options, **where})


def is_adapter(spec: str) -> bool:
    """Return whether a folder holds a PEFT adapter, and not the model that it is for."""
    path = Path(spec)
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()


def with_adapter(load: Callable[[str], nn.Module], spec: str, trust_remote_code: bool = False) -> nn.Module:
    """Return the model that an adapter is for, with the adapter on it: the adapter's parameters are trainable.

    Args:
        load: the folder or id of the base model -> the base model.
        spec: the adapter's folder.
        trust_remote_code: of the base model.

    Raises:
        ModelError: the adapter names no base model, or does not fit it.
        MissingExtraError: peft is not installed.
    """
    require("peft", "peft", f"load the adapter {spec}")
    import peft

    with in_a_sentence(f"MODEL {spec} cannot be loaded"):
        base = peft.PeftConfig.from_pretrained(spec).base_model_name_or_path
        if not base:
            raise ModelError(f"MODEL {spec}: adapter_config.json names no base model.")
        check_pretrained(base, "MODEL")
        model = load(base)
        return peft.PeftModel.from_pretrained(model, spec, is_trainable=True)


@contextlib.contextmanager
def in_a_sentence(what: str, remedy: str = "", *, named: str = "") -> Iterator[None]:
    """Say in a sentence what is wrong with a checkpoint: transformers raises whatever its files lead it to.

    Args:
        what: goes before the reason.
        remedy: goes after it.
        named: the folder or id that was given; where there is no such folder, that is said first.

    Raises:
        ModelError: anything was raised but our own errors, and those of a memory that is used up.
    """
    try:
        yield
    except StreamfisherError:
        raise
    except Exception as error:
        if no_memory(error):
            raise
        known = isinstance(error, OSError | ValueError | ImportError | RuntimeError)
        reason = first_line(error) if known else f"{type(error).__name__}: {first_line(error)}"
        if named and isinstance(error, OSError) and not Path(named).exists():
            reason = (
                f"there is no folder {named} here{_similar(named)}, and no model of that id in the cache or within "
                f"reach ({reason.rstrip('.')})."
            )
        raise ModelError(f"{what}: {reason}{'' if reason.endswith('.') or not remedy else '.'}{remedy}") from error


def _similar(name: str) -> str:
    """Return a question after a folder beside the one that is not there, whose name is nearly the same; or nothing."""
    path = Path(name)
    try:
        there = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        parents = difflib.get_close_matches(path.parent.name, [p.name for p in Path().iterdir() if p.is_dir()], n=1)
        return f" (did you mean {Path(parents[0]) / path.name}?)" if parents and len(path.parts) == 2 else ""
    near = difflib.get_close_matches(path.name, there, n=1)
    return f" (did you mean {path.parent / near[0]}?)" if near else ""


def auto_class(transformers: Any, config: Any) -> Any:
    """Return the class the checkpoint was saved from, so that no head is made up or lost."""
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"config.json: architectures must be a list of names of classes, not {names!r:.80}.")
    for name in names:
        kind = getattr(transformers, name, None)
        is_model = name.startswith("AutoModel") or (isinstance(kind, type) and issubclass(kind, nn.Module))
        if kind is not None and not is_model:
            raise ModelError(f"config.json: architectures names {name}, which is no model.")
        if kind is not None:
            return kind
    return transformers.AutoModelForCausalLM
