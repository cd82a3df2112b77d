"""Options of the command line and of `--config` files, and what they mean for a `SpectralConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from streamfisher.blocks.structures import STRUCTURES
from streamfisher.cli.config_file import read_config_file, read_mapping
from streamfisher.config import SpectralConfig, check_keys
from streamfisher.errors import ConfigError

#: Names on the command line and in files that differ from the field they set.
_ALIASES = {
    "blocks": "block_structure",
    "center": "center_gradients",
    "dtype": "dtype_model",
    "store_dtype": "dtype_store",
    "gram_dtype": "dtype_gram",
    "compute_dtype": "dtype_compute",
    "deterministic": "use_deterministic",
    "workers": "n_workers",
}
_CENTER = {"no": (False,), "yes": (True,), "both": (False, True)}
_RUN_KEYS: tuple[str, ...] = (
    "model",
    "data",
    "out",
    "samples",
    "field",
    "tokenizer",
    "trust_remote_code",
    "top_k",
    "dask_scheduler",
)
_RUN_KEYS += ("device_map", "offload_folder", "fsdp")


@dataclass(frozen=True)
class RunOptions:
    """What a command was asked for: the config, and what only the command line needs."""

    config: SpectralConfig = field(default_factory=SpectralConfig)
    structures: tuple[str | dict[str, str], ...] = ("layer",)  # a dict: own patterns, pattern -> block
    centers: tuple[bool, ...] = (False,)
    model: str = ""
    data: str = ""
    out: str = ""
    samples: int | None = None
    field: str = "text"
    tokenizer_spec: str | None = None
    trust_remote_code: bool = False
    top_k: int | None = None
    device_map: str | None = None  # a strategy of Accelerate or a file, for a model larger than one device
    offload_folder: str | None = None  # for weights on disk; None: beside the run
    fsdp: bool = False  # spread the weights over the ranks
    dask_scheduler: str | None = None  # address of a running cluster for the reduction

    def tokenizer(self) -> Any:
        """Return text -> token ids: the model's own tokenizer for Hugging Face models, bytes for callables."""
        from streamfisher.data.loading import tokenize_bytes
        from streamfisher.models.loading import load_tokenizer
        from streamfisher.runtime.callables import is_callable_spec

        spec = self.tokenizer_spec or ("bytes" if is_callable_spec(self.model) else self.model)
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
            "tokenizer": self.tokenizer_spec,
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
        values |= {_ALIASES.get(key, key): value for key, value in read_config_file(given["config"]).items()}
    known = [item.name for item in dataclasses.fields(SpectralConfig)] + list(_RUN_KEYS)
    check_keys(values, known, "option")
    values |= {key: value for key, value in given.items() if key in known}
    structures = values.pop("block_structure", None)
    centers = values.pop("center_gradients", None)
    extra = {key: values.pop(key) for key in _RUN_KEYS if key in values}
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
    trust = extra.get("trust_remote_code", False)
    if not isinstance(trust, bool):
        raise ConfigError(f"trust_remote_code={trust!r} must be true or false.")
    return RunOptions(
        config=config,
        structures=structures,
        centers=centers,
        model=str(extra.get("model", "")),
        data=str(extra.get("data", "")),
        out=str(extra.get("out", "")),
        samples=samples,
        field=extra.get("field", "text"),
        tokenizer_spec=extra.get("tokenizer"),
        trust_remote_code=trust,
        top_k=extra.get("top_k"),
        device_map=extra.get("device_map"),
        offload_folder=extra.get("offload_folder"),
        fsdp=bool(extra.get("fsdp", False)),
        dask_scheduler=extra.get("dask_scheduler"),
    )


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
        tokenizer_spec=arguments.tokenizer,
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


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes."""
    parser.add_argument("--json", action="store_true", help="print what a program can read")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_collection_options(parser: argparse.ArgumentParser) -> None:
    """Add model, data and everything that decides the gradients."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="a Hugging Face folder or id, or package.module:callable")
    add(
        "data",
        metavar="DATA",
        nargs="?",
        help="a text file, a folder of them, a .jsonl, .npy or .npz file, or package.module:callable that gives dicts",
    )
    add("--out", default=None, metavar="RUN.zarr", help="the run's folder; an unfinished run there is resumed")
    add(
        "--config",
        default=None,
        metavar="FILE",
        help="options from a .yaml, .toml or .json file; the command line wins",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--samples", type=int, default=None, help="how many, from the first (default: all)")
    data.add_argument(
        "--max-length", type=int, default=None, help="tokens per sequence (default: 128 where text is cut)"
    )
    data.add_argument("--field", default=None, help="of a .jsonl that holds the text (default: text)")
    data.add_argument(
        "--tokenizer", default=None, help="a Hugging Face folder or id, or 'bytes' (default: the model's own)"
    )
    data.add_argument("--sample-unit", default=None, help="sequence (default), or token: one gradient per token's loss")
    data.add_argument("--tokens-per-sequence", type=int, default=None, help="draw so many of them (default: all)")
    data.add_argument(
        "--labels", default=None, help="data: empirical Fisher (default); model: labels drawn from the model"
    )
    gradients = parser.add_argument_group("gradients")
    gradients.add_argument(
        "--loss", default=None, help="causal, token, classification, regression, model (default: chosen)"
    )
    gradients.add_argument("--include", nargs="+", default=None, metavar="PATTERN", help="only parameters that match")
    gradients.add_argument(
        "--exclude", nargs="+", default=None, metavar="PATTERN", help="all but parameters that match"
    )
    gradients.add_argument(
        "--batch-tokens", type=int, default=None, help="padded tokens per backward pass (default: 4096)"
    )
    gradients.add_argument(
        "--chunk-size", type=int, default=None, help="samples written and marked together (default: 32)"
    )
    gradients.add_argument("--on-nonfinite", default=None, help="raise (default), or skip: leave out, count and name")
    gradients.add_argument("--dtype", dest="dtype_model", default=None, help="cast the model (default: as it comes)")
    gradients.add_argument("--seed", type=int, default=None, help="default: 42")
    gradients.add_argument(
        "--deterministic",
        dest="use_deterministic",
        action="store_true",
        default=None,
        help="the same bits every time, on CUDA too",
    )
    gradients.add_argument(
        "--rank-timeout",
        type=int,
        default=None,
        metavar="SECONDS",
        help="give up when no rank got on for so long (default: 1800)",
    )
    gradients.add_argument(
        "--device-map",
        default=None,
        metavar="MAP",
        help="spread a large model: auto, balanced, sequential, or a .json or .yaml file of modules and devices",
    )
    gradients.add_argument(
        "--offload-folder", default=None, help="for weights that a device map puts on disk (default: RUN.zarr.offload)"
    )
    gradients.add_argument(
        "--fsdp", action="store_true", default=None, help="spread the weights over the ranks (FSDP2)"
    )
    gradients.add_argument("--device", default=None, help="auto (default), cpu, cuda, cuda:1")
    gradients.add_argument(
        "--stream",
        default=None,
        help="layers: one layer at a time, for models larger than the memory; none (default): one pass, or waves; "
        "auto: layers where the weights or the waves do not fit, or where waves cost clearly more",
    )
    gradients.add_argument("--trust-remote-code", action="store_true", default=None, help="run code of a checkpoint")
    store = parser.add_argument_group("store")
    store.add_argument("--store-dtype", dest="dtype_store", default=None, help="of rows on disk; bfloat16 halves them")
    store.add_argument(
        "--bitround", type=int, default=None, metavar="BITS", help="keep so many mantissa bits (BitRound)"
    )
    store.add_argument("--codec", default=None, help="blosc-lz4 (default), zstd, raw")
    store.add_argument(
        "--representation", default=None, help="dense rows, factors of linear layers, or auto (default): the smaller"
    )
    store.add_argument(
        "--project",
        type=int,
        default=None,
        metavar="K",
        help="project larger gradients to K random numbers: an estimate, with error bars (default: exact)",
    )
    store.add_argument(
        "--disk-budget", default=None, metavar="SIZE", help="of the run, for example 200GB (default: what is free)"
    )
    store.add_argument(
        "--keep-gradients",
        nargs="+",
        default=None,
        metavar="PATTERN",
        help="after the reduction: all, none, or patterns of parameters (default: all, if they fit at once)",
    )
    store.add_argument(
        "--gram-per",
        default=None,
        help="keep a Gram for each parameter (default), layer-module, layer, or all: fewer bytes, fewer questions",
    )
    store.add_argument(
        "--fsync", action="store_true", default=None, help="flush the disk before each marker, against power cuts"
    )
    store.add_argument(
        "--store-centered", action="store_true", default=None, help="write centered gradients (one more pass)"
    )


def add_deep_options(parser: argparse.ArgumentParser) -> None:
    """Add what `verify --deep` takes: how many samples, and the model and data that the run was made with."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="for --deep: as the run was given it")
    parser.add_argument("data", metavar="DATA", nargs="?", help="for --deep: as the run was given it")
    group = parser.add_argument_group("deep")
    group.add_argument(
        "--deep",
        type=int,
        default=None,
        metavar="K",
        help="compute the gradients of K random samples again with the model, and compare",
    )
    group.add_argument("--seed", type=int, default=0, help="of the choice of samples (default: %(default)s)")
    group.add_argument("--field", default="text", help="of a .jsonl that holds the text (default: %(default)s)")
    group.add_argument("--tokenizer", default=None, help="as the run was given it (default: the model's own)")
    group.add_argument("--device", default=None, help="auto, cpu, cuda, cuda:1 (default: that of the run)")
    group.add_argument("--device-map", default=None, metavar="MAP", help="spread a large model, as for `run`")
    group.add_argument("--trust-remote-code", action="store_true", help="run code of a checkpoint")


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add where Gram matrices are multiplied."""
    group = parser.add_argument_group("reduction")
    group.add_argument(
        "--dask-scheduler", default=None, metavar="ADDRESS", help="of a running Dask cluster (default: threads here)"
    )
    group.add_argument("--gram-device", default=None, help="cpu (default), cuda, auto: where products are formed")


def add_product_options(group: Any) -> None:
    """Add to a parser or a group of it how Gram matrices are multiplied."""
    group.add_argument("--gram-dtype", dest="dtype_gram", default=None, help="float32 (default) or float64 products")
    group.add_argument(
        "--workers", dest="n_workers", type=int, default=None, help="Dask workers (default: one per core)"
    )
    group.add_argument(
        "--memory-budget",
        default=None,
        help="of a host, beside the models of its ranks, for example 2GB (default: half of what is free)",
    )


def add_analysis_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides the spectrum of given gradients."""
    group = parser.add_argument_group("spectrum")
    group.add_argument(
        "--blocks",
        dest="block_structure",
        default=None,
        metavar="LIST",
        help=f"one or more of {','.join(STRUCTURES)}, with commas (default: layer), or a file: pattern -> block",
    )
    group.add_argument(
        "--center",
        dest="center_gradients",
        nargs="?",
        const="yes",
        default=None,
        metavar="no|yes|both",
        help="subtract the mean gradient: the covariance instead of the Fisher",
    )
    group.add_argument("--top-k", type=int, default=None, help="list only the largest eigenvalues of each block")
    group.add_argument(
        "--eps", type=float, default=None, help="noise floor over the largest eigenvalue (default: derived)"
    )
    add_product_options(group)
    group.add_argument(
        "--solver",
        default=None,
        help="auto (default), dense, iterative: the largest eigenvalues only, with residuals",
    )
    group.add_argument("--eigensolve-device", default=None, help="auto (default), cpu, cuda")
