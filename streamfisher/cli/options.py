"""What the command line and a `--config` file ask for: a `SpectralConfig`, and what only a command needs."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from streamfisher.blocks.structures import STRUCTURES
from streamfisher.cli.config_file import read_config_file, read_mapping
from streamfisher.config import SpectralConfig, check_keys
from streamfisher.config.kinds import FLAG, Kind
from streamfisher.config.option import option, options_of
from streamfisher.errors import ConfigError
from streamfisher.store.config_file import replay_options
from streamfisher.store.manifest import Manifest

_CENTER = {"no": (False,), "yes": (True,), "both": (False, True)}
#: Fields of the config that a command takes several of, and the options that hold them.
SEVERAL = {"block_structure": "structures", "center_gradients": "centers"}
Structure = str | dict[str, str]  # a dict: own patterns, pattern -> block


def _structures(name: str, value: Any) -> tuple[Structure, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ConfigError(f"--blocks {value!r} names no structure; choose among {', '.join(STRUCTURES)}.")
    return tuple(_structure(item.strip() if isinstance(item, str) else item) for item in names)


def _structure(name: Any) -> Structure:
    """Return the name of a block structure, or the patterns that a file holds."""
    if isinstance(name, str) and name.endswith((".yaml", ".yml", ".toml", ".json")):
        patterns = read_mapping(name, "--blocks")
        if not patterns or not all(isinstance(item, str | int) for pair in patterns.items() for item in pair):
            raise ConfigError(f"--blocks {name} must map patterns of parameter names to names of blocks.")
        return {str(pattern): str(block) for pattern, block in patterns.items()}
    if isinstance(name, dict) and name and all(isinstance(item, str) for pair in name.items() for item in pair):
        return name
    if not isinstance(name, str) or name not in STRUCTURES:
        raise ConfigError(f"--blocks {name!r} is unknown; choose among {', '.join(STRUCTURES)}, or name a .yaml file.")
    return name


def _centers(name: str, value: Any) -> tuple[bool, ...]:
    if isinstance(value, bool):
        return (value,)
    if not isinstance(value, str) or value not in _CENTER:
        raise ConfigError(f"--center {value!r} is unknown; choose no, yes or both.")
    return _CENTER[value]


def _at_least(least: int, remedy: str) -> Kind:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"--{name.replace('_', '-')} {value!r} must be a whole number.")
        if value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: {remedy}.")
        return value

    return Kind(check, parse=int)


_ANY = Kind(lambda name, value: value)
_TEXT = Kind(lambda name, value: str(value))


@dataclass(frozen=True)
class RunOptions:
    """What a command was asked for: the config, and what only the command line needs."""

    config: SpectralConfig = field(default_factory=SpectralConfig)
    model: str = option("", _TEXT, "a Hugging Face folder or id, or package.module:callable", metavar="MODEL")
    data: str = option(
        "",
        _TEXT,
        "a text file, a folder of them, a .jsonl (.gz, .zst), .parquet, .arrow, .npy or .npz file, hf:ID:SPLIT, or "
        "package.module:callable that gives dicts",
        metavar="DATA",
    )
    out: str = option("", _TEXT, "the run's folder; an unfinished run there is resumed", metavar="RUN.zarr")
    staging: str | None = option(
        None,
        _ANY,
        "local folder for a run whose --out is a URL, while it is written",
        group="store",
        metavar="DIR",
        unset="<name of the run>.staging, here",
    )
    staging_budget: str | None = option(
        None,
        _ANY,
        "bytes that it may take there, as 200GB; chunks of gradients that were sent are freed beyond it",
        group="store",
        metavar="SIZE",
        unset="what is free",
    )
    no_lock: bool = option(
        False,
        FLAG,
        "write to a URL whose store has no conditional puts; nothing keeps two writers apart",
        group="store",
    )
    samples: int | None = option(
        None,
        _at_least(2, "a spectrum needs at least 2 samples"),
        "how many, from the first",
        group="data",
        unset="all",
    )
    field: str = option("text", _ANY, "of a .jsonl, .parquet or .arrow file that holds the text", group="data")
    tokenizer_spec: str | None = option(
        None,
        _ANY,
        "a Hugging Face folder or id, or 'bytes'",
        name="tokenizer",
        group="data",
        unset="the model's own; UTF-8 bytes where it has none and its vocabulary is of 256 to 512 tokens",
    )
    trust_remote_code: bool = option(False, FLAG, "run code of a checkpoint", group="model and devices")
    device_map: str | None = option(
        None,
        _ANY,
        "spread a large model: auto, balanced, sequential, or a .json or .yaml file of modules and devices",
        group="model and devices",
        metavar="MAP",
    )
    offload_folder: str | None = option(
        None,
        _ANY,
        "for weights that a device map puts on disk",
        group="model and devices",
        unset="RUN.zarr.offload",
    )
    fsdp: bool = option(False, FLAG, "spread the weights over the ranks (FSDP2)", group="model and devices")
    structures: tuple[Structure, ...] = option(
        ("layer",),
        Kind(_structures),
        f"one or more of {','.join(STRUCTURES)}, with commas, or a file: pattern -> block",
        name="blocks",
        group="spectrum",
        metavar="LIST",
        unset="layer",
    )
    centers: tuple[bool, ...] = option(
        (False,),
        Kind(_centers, nargs="?", const="yes"),
        "subtract the mean gradient: the covariance instead of the Fisher",
        name="center",
        group="spectrum",
        metavar="no|yes|both",
        unset="no",
    )
    top_k: int | None = option(
        None,
        _at_least(1, "ask for at least 1 eigenvalue, or leave it out for all"),
        "list only the largest eigenvalues of each block",
        group="spectrum",
        unset="all",
    )
    dask_scheduler: str | None = option(
        None,
        _ANY,
        "of a running Dask cluster",
        group="reduction on a GPU or cluster",
        metavar="ADDRESS",
        unset="threads here",
    )

    def tokenizer(self, model: Any = None, returned: Any = None) -> Any:
        """Return what text of the data is encoded by, see `load_samples`; it is looked for when there is text.

        Args:
            model: where MODEL is a callable, what it gave: its own tokenizer counts where none is asked for.
            returned: the tokenizer that the callable gave beside it.
        """
        from streamfisher.data.tokenizing import BYTES, LaterTokenizer, as_tokenizer
        from streamfisher.models.tokenizers import load_tokenizer, own_tokenizer

        if self.tokenizer_spec == "bytes":
            return BYTES
        if self.tokenizer_spec is None and returned is not None:
            return as_tokenizer(returned)
        trust = self.trust_remote_code
        if self.tokenizer_spec is None and model is not None:
            return LaterTokenizer(lambda: own_tokenizer(model, trust_remote_code=trust))
        spec, what = (self.tokenizer_spec, "--tokenizer") if self.tokenizer_spec else (self.model, "MODEL")
        return LaterTokenizer(lambda: as_tokenizer(load_tokenizer(spec, trust_remote_code=trust, what=what)))

    @property
    def model_brings_tokenizer(self) -> bool:
        """Whether the data cannot be read before a callable has made the model, whose tokenizer they may need."""
        from streamfisher.runtime.callables import is_callable_spec

        read = self.data and not is_callable_spec(self.data) and not self.data.endswith((".npy", ".npz"))
        return bool(read) and self.tokenizer_spec is None and is_callable_spec(self.model)

    def description(self) -> dict[str, Any]:
        """Return what was asked for besides the config, for the manifest."""
        return {
            "model": self.model,
            "data": self.data,
            "samples": self.samples,
            "field": self.field,
            "tokenizer": self.tokenizer_spec,
            "trust_remote_code": self.trust_remote_code,
            "blocks": list(self.structures),
            "center": ["yes" if center else "no" for center in self.centers],
            "top_k": self.top_k,
            **{
                name: value
                for name in ("device_map", "offload_folder", "fsdp")
                if (value := getattr(self, name)) not in (None, False)
            },
        }

    def analysis_config(self, of_run: SpectralConfig) -> SpectralConfig:
        """Return the run's config with this command's solver and Gram options."""
        fields = ["eps", "n_workers", "memory_budget", "eigensolve_device", "dtype_gram", "dtype_eigensolve"]
        fields += ["gram_device", "solver", "fsync"]
        return of_run.replace(**{name: getattr(self.config, name) for name in fields})


RUN_OPTIONS = options_of(RunOptions)
#: Every option there is, by its field: those of a command, then those of the config.
OPTIONS = RUN_OPTIONS | options_of(SpectralConfig)


def read_run_options(arguments: argparse.Namespace, base: SpectralConfig | None = None) -> RunOptions:
    """Merge a `--config` file and the command line (which wins) into options.

    Args:
        arguments: parsed; only options that were given are there.
        base: a stored run's config, for commands that re-analyse.

    Raises:
        ConfigError: an option is unknown, missing or has a value that cannot be used.
    """
    base = base or SpectralConfig()
    collects = "config" in vars(arguments)
    given = {name: value for name, value in vars(arguments).items() if value is not None and name in OPTIONS}
    if not collects:
        given.pop("samples", None)  # there it is a slice of a stored run
    values = (_from_file(arguments.config) if collects and arguments.config is not None else {}) | given
    options = _options(values, base)
    if collects and "out" in vars(arguments):
        for name in ("model", "data", "out"):
            if not getattr(options, name):
                option_name = "--out" if name == "out" else name.upper()
                raise ConfigError(f"{option_name} is missing; see `streamfisher run --help`.")
    return options


def _options(values: dict[str, Any], base: SpectralConfig) -> RunOptions:
    """Return what values mean, by fields; those that are not there are as in `base`."""
    own: dict[str, Any] = {"structures": base.block_structure, "centers": base.center_gradients}
    own |= {name: value for name in RUN_OPTIONS if (value := values.pop(name, None)) is not None}
    own = {name: RUN_OPTIONS[name].kind.check(name, value) for name, value in own.items()}
    named = next((name for name in own["structures"] if isinstance(name, str)), base.block_structure)
    values |= {"block_structure": named, "center_gradients": own["centers"][0]}
    try:
        config = base.replace(**values)
    except TypeError as error:
        raise ConfigError(str(error)) from error
    return RunOptions(config=config, **own)


def read_replay_options(arguments: argparse.Namespace, manifest: Manifest) -> RunOptions:
    """Return the options that a run was made with, for another folder.

    Args:
        arguments: parsed.
        manifest: of the run.

    Raises:
        ConfigError: the run does not name its model and data, or was made with code of a checkpoint, which is run only
            where the command asks for it.
    """
    values = replay_options(manifest)
    if not values.get("model") or not values.get("data"):
        raise ConfigError(
            f"{arguments.run} was collected from Python or by `demo`, so it names no MODEL and DATA to take again. "
            f"Its options: {arguments.run}/config.yaml."
        )
    if values.get("trust_remote_code") and not arguments.trust_remote_code:
        raise ConfigError(f"{arguments.run} was made with --trust-remote-code; give it again if you do trust the code.")
    return _options(_by_fields(values) | {"out": arguments.out}, SpectralConfig())


def _from_file(path: str) -> dict[str, Any]:
    """Return the options of a file by their fields; a file may name an option as the field or the command line does."""
    return _by_fields(read_config_file(path))


def _by_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: name for name in SpectralConfig.names()} | SEVERAL
    fields |= {item.name or name: name for name, item in RUN_OPTIONS.items()}
    fields |= {item.name: name for name, item in OPTIONS.items() if item.name}
    check_keys(values, fields, "option")
    return {fields[key]: value for key, value in values.items()}


def check_deep(count: int) -> None:
    """Refuse a number of samples that `verify --deep` cannot compare.

    Raises:
        ConfigError: it is less than 1.
    """
    _at_least(1, "compare at least 1 sample").check("deep", count)


def read_model_options(arguments: argparse.Namespace, base: SpectralConfig, usage: str) -> RunOptions:
    """Return the model and data that a run was made with, and its settings.

    Args:
        arguments: parsed.
        base: the run's config; of it only the device may be another.
        usage: how the command is to be given, for the message.

    Raises:
        ConfigError: model or data are missing, or a value cannot be used.
    """
    for name in ("model", "data"):
        if not getattr(arguments, name):
            raise ConfigError(f"{name.upper()} is missing: {usage}")
    given = {name: value for name, value in vars(arguments).items() if name in RUN_OPTIONS and value is not None}
    return RunOptions(config=base if arguments.device is None else base.replace(device=arguments.device), **given)
