"""What a command was asked for: options of the command line and of `--config` files, put together.

Every option is defined once: those of a `SpectralConfig` in `config/sections.py`, and here those that only commands
have. `cli/arguments.py` makes the command line of them.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from streamfisher.blocks.structures import STRUCTURES
from streamfisher.cli.config_file import read_config_file, read_mapping
from streamfisher.config import SpectralConfig, check_keys, option_of
from streamfisher.config.option import option, yes_or_no
from streamfisher.errors import ConfigError

_CENTER = {"no": (False,), "yes": (True,), "both": (False, True)}


def _as_it_is(field: str, value: Any) -> Any:
    return value


@dataclass(frozen=True)
class RunOptions:
    """What a command was asked for: the config, and what only the command line needs."""

    config: SpectralConfig = field(default_factory=SpectralConfig)
    structures: tuple[str | dict[str, str], ...] = ("layer",)  # a dict: own patterns, pattern -> block
    centers: tuple[bool, ...] = (False,)
    model: str = option("", "a Hugging Face folder or id, or package.module:callable", _as_it_is)
    data: str = option(
        "",
        "a text file, a folder of them, a .jsonl, .npy or .npz file, or package.module:callable that gives dicts",
        _as_it_is,
    )
    out: str = option("", "the run's folder; an unfinished run there is resumed", _as_it_is, metavar="RUN.zarr")
    samples: int | None = option(None, "how many, from the first (default: all)", _as_it_is, group="data", type=int)
    field: str = option("text", "of a .jsonl that holds the text (default: text)", _as_it_is, group="data")
    tokenizer: str | None = option(
        None, "a Hugging Face folder or id, or 'bytes' (default: the model's own)", _as_it_is, group="data"
    )
    trust_remote_code: bool = option(
        False, "run code of a checkpoint", yes_or_no, group="gradients", action="store_true"
    )
    device_map: str | None = option(
        None,
        "spread a large model: auto, balanced, sequential, or a .json or .yaml file of modules and devices",
        _as_it_is,
        group="gradients",
        metavar="MAP",
    )
    offload_folder: str | None = option(
        None, "for weights that a device map puts on disk (default: RUN.zarr.offload)", _as_it_is, group="gradients"
    )
    fsdp: bool = option(
        False, "spread the weights over the ranks (FSDP2)", yes_or_no, group="gradients", action="store_true"
    )
    dask_scheduler: str | None = option(
        None, "of a running Dask cluster (default: threads here)", _as_it_is, group="reduction", metavar="ADDRESS"
    )
    top_k: int | None = option(
        None, "list only the largest eigenvalues of each block", _as_it_is, group="spectrum", type=int
    )

    def encode(self) -> Any:
        """Return text -> token ids: the model's own tokenizer for Hugging Face models, bytes for callables."""
        from streamfisher.data.loading import tokenize_bytes
        from streamfisher.models.loading import load_tokenizer
        from streamfisher.runtime.callables import is_callable_spec

        spec = self.tokenizer or ("bytes" if is_callable_spec(self.model) else self.model)
        if spec == "bytes":
            return tokenize_bytes
        if self.data.endswith((".npy", ".npz")) or is_callable_spec(self.data):
            return None  # already tokens
        tokenizer = load_tokenizer(spec, trust_remote_code=self.trust_remote_code)
        return partial(_token_ids, tokenizer)

    def description(self) -> dict[str, Any]:
        """Return what was asked for besides the config, for the manifest."""
        return {
            "model": self.model,
            "data": self.data,
            "samples": self.samples,
            "field": self.field,
            "tokenizer": self.tokenizer,
            "trust_remote_code": self.trust_remote_code,
            "blocks": list(self.structures),
            "center": ["yes" if center else "no" for center in self.centers],
            "top_k": self.top_k,
        }

    def analysis_config(self, of_run: SpectralConfig) -> SpectralConfig:
        """Return the run's config with this command's solver and Gram options."""
        fields: tuple[str, ...] = (
            "eps",
            "n_workers",
            "memory_budget",
            "eigensolve_device",
            "dtype_gram",
            "dtype_eigensolve",
        )
        fields += ("gram_device", "solver", "fsync")
        return of_run.replace(**{name: getattr(self.config, name) for name in fields})


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


#: Fields of `RunOptions` that are options.
_OWN = {item.name: item for item in dataclasses.fields(RunOptions) if "option" in item.metadata}

#: Name on the command line and in files -> the field that it sets, where they differ.
FIELDS = {"blocks": "block_structure", "center": "center_gradients", "compute_dtype": "dtype_compute"} | {
    (option_of(item).flag or "").removeprefix("--").replace("-", "_"): item.name
    for item in dataclasses.fields(SpectralConfig)
    if option_of(item).flag
}


def read_run_options(arguments: argparse.Namespace, base: SpectralConfig | None = None) -> RunOptions:
    """Merge a `--config` file and the command line (which wins) into options.

    Args:
        arguments: parsed; only options that were given are there.
        base: a stored run's config, for commands that re-analyse.

    Raises:
        ConfigError: an option is unknown, missing or has a value that cannot be used.
    """
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    values: dict[str, Any] = {}
    if "config" in given:
        values |= {FIELDS.get(key, key): value for key, value in read_config_file(given["config"]).items()}
    known = [item.name for item in dataclasses.fields(SpectralConfig)] + list(_OWN)
    check_keys(values, known, "option")
    values |= {key: value for key, value in given.items() if key in known}
    structures = values.pop("block_structure", None)
    centers = values.pop("center_gradients", None)
    extra = {key: values.pop(key) for key in _OWN if key in values}
    base = base or SpectralConfig()
    structures = _structures(structures if structures is not None else base.block_structure)
    centers = _centers(centers if centers is not None else base.center_gradients)
    try:
        config = base.replace(**values, block_structure=_named(structures, base), center_gradients=centers[0])
    except TypeError as error:
        raise ConfigError(str(error)) from error
    if hasattr(arguments, "out") and "model" in vars(arguments):
        for key in ("model", "data", "out"):
            if not extra.get(key):
                raise ConfigError(
                    f"{'--out' if key == 'out' else key.upper()} is missing; see `streamfisher run --help`."
                )
    samples = extra.get("samples") if "model" in vars(arguments) else None  # a slice where a run is re-analysed
    _require_whole("samples", samples, 2, "a spectrum needs at least 2 samples")
    _require_whole("top-k", extra.get("top_k"), 1, "ask for at least 1 eigenvalue, or leave it out for all")
    own = {
        item.name: option_of(item).check(item.name, extra[item.name]) for item in _OWN.values() if item.name in extra
    }
    own |= {key: str(own[key]) for key in ("model", "data", "out") if key in own} | {"samples": samples}
    return RunOptions(config=config, structures=structures, centers=centers, **own)


def read_deep_options(arguments: argparse.Namespace, base: SpectralConfig) -> RunOptions:
    """Return model and data of `verify --deep`, with the settings of the run.

    Args:
        arguments: parsed.
        base: the run's config; of it only the device may be another.

    Raises:
        ConfigError: model or data are missing, or a value cannot be used.
    """
    _require_whole("deep", arguments.deep, 1, "compare at least 1 sample")
    for key in ("model", "data"):
        if not getattr(arguments, key):
            raise ConfigError(
                f"{key.upper()} is missing: streamfisher verify RUN.zarr MODEL DATA --deep {arguments.deep}"
            )
    return RunOptions(
        config=base if arguments.device is None else base.replace(device=arguments.device),
        model=arguments.model,
        data=arguments.data,
        field=arguments.field,
        tokenizer=arguments.tokenizer,
        trust_remote_code=arguments.trust_remote_code,
        device_map=arguments.device_map,
    )


def _require_whole(option: str, value: Any, least: int, remedy: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"--{option} {value!r} must be a whole number.")
    if value < least:
        raise ConfigError(f"--{option} {value}: {remedy}.")


def _named(structures: tuple[str | dict[str, str], ...], base: SpectralConfig) -> str:
    """Return the first structure that has a name."""
    return next((name for name in structures if isinstance(name, str)), base.block_structure)


def _structures(value: Any) -> tuple[str | dict[str, str], ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ConfigError(f"--blocks {value!r} names no structure; choose among {', '.join(STRUCTURES)}.")
    return tuple(_structure(name.strip() if isinstance(name, str) else name) for name in names)


def _structure(name: Any) -> str | dict[str, str]:
    """Return the name of a block structure, or the patterns that a file holds."""
    if isinstance(name, str) and name.endswith((".yaml", ".yml", ".toml", ".json")):
        patterns = read_mapping(name, "--blocks")
        if not patterns or not all(isinstance(item, str | int) for pair in patterns.items() for item in pair):
            raise ConfigError(f"--blocks {name} must map patterns of parameter names to names of blocks.")
        return {str(pattern): str(block) for pattern, block in patterns.items()}
    if name not in STRUCTURES:
        raise ConfigError(f"--blocks {name!r} is unknown; choose among {', '.join(STRUCTURES)}, or name a .yaml file.")
    return name


def _centers(value: Any) -> tuple[bool, ...]:
    if isinstance(value, bool):
        return (value,)
    if not isinstance(value, str) or value not in _CENTER:
        raise ConfigError(f"--center {value!r} is unknown; choose no, yes or both.")
    return _CENTER[value]
