"""Options of the command line and of `--config` files, and what they mean for a `SpectralConfig`."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from streamfisher.blocks import STRUCTURES
from streamfisher.config import SpectralConfig, check_keys, read_config_file
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
_RUN_KEYS = ("model", "data", "out", "samples", "field", "tokenizer", "trust_remote_code", "top_k")


@dataclass(frozen=True)
class RunOptions:
    """What a command was asked for: the config, and what only the command line needs."""

    config: SpectralConfig = field(default_factory=SpectralConfig)
    structures: tuple[str, ...] = ("layer",)
    centers: tuple[bool, ...] = (False,)
    model: str = ""
    data: str = ""
    out: str = ""
    samples: int | None = None
    field: str = "text"
    tokenizer_spec: str | None = None
    trust_remote_code: bool = False
    top_k: int | None = None

    def tokenizer(self) -> Any:
        """Return text -> token ids: the model's own tokenizer for Hugging Face models, bytes for callables."""
        from streamfisher.data import tokenize_bytes
        from streamfisher.models import is_callable_spec, load_tokenizer

        spec = self.tokenizer_spec or ("bytes" if is_callable_spec(self.model) else self.model)
        if spec == "bytes":
            return tokenize_bytes
        if self.data.endswith((".npy", ".npz")) or is_callable_spec(self.data):
            return None  # already tokens
        tokenizer = load_tokenizer(spec, trust_remote_code=self.trust_remote_code)
        return partial(_token_ids, tokenizer)

    def description(self) -> dict[str, Any]:
        """Return what model and data were named as, for the manifest."""
        return {"model": self.model, "data": self.data, "field": self.field, "tokenizer": self.tokenizer_spec}

    def analysis_config(self, of_run: SpectralConfig) -> SpectralConfig:
        """Return the run's config with this command's solver and Gram options."""
        fields = ("eps", "n_workers", "memory_budget", "eigensolve_device", "dtype_gram", "dtype_eigensolve")
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
        config = base.replace(**values, block_structure=structures[0], center_gradients=centers[0])
    except TypeError as error:
        raise ConfigError(str(error)) from error
    if hasattr(arguments, "out") and "model" in vars(arguments):
        for key in ("model", "data", "out"):
            if not extra.get(key):
                raise ConfigError(
                    f"{'--out' if key == 'out' else key.upper()} is missing; see `streamfisher run --help`."
                )
    samples = extra.get("samples")
    if "model" in vars(arguments) and samples is not None and (not isinstance(samples, int) or samples < 2):
        raise ConfigError(f"--samples {samples}: a spectrum needs at least 2 samples.")
    if isinstance(extra.get("top_k"), int) and extra["top_k"] < 1:
        raise ConfigError(f"--top-k {extra['top_k']}: ask for at least 1 eigenvalue, or leave it out for all.")
    return RunOptions(
        config=config,
        structures=structures,
        centers=centers,
        model=str(extra.get("model", "")),
        data=str(extra.get("data", "")),
        out=str(extra.get("out", "")),
        samples=samples if isinstance(samples, int) else None,
        field=extra.get("field", "text"),
        tokenizer_spec=extra.get("tokenizer"),
        trust_remote_code=bool(extra.get("trust_remote_code", False)),
        top_k=extra.get("top_k"),
    )


def parse_samples(text: str | None, n_samples: int) -> slice | None:
    """Return the slice that `'0:512'`, `':100'` or `'100'` (the first hundred) names.

    Raises:
        ConfigError: the text has another form or selects fewer than 2 of `n_samples`.
    """
    if text is None:
        return None
    parts = text.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3:
        raise ConfigError(f"--samples {text!r} is not a slice; write for example 0:512 or 0:1024:2.")
    chosen = slice(numbers[0]) if len(numbers) == 1 else slice(*numbers)
    if len(range(*chosen.indices(n_samples))) < 2:
        raise ConfigError(f"--samples {text} selects fewer than 2 of the run's {n_samples} samples.")
    return chosen


def _structures(value: Any) -> tuple[str, ...]:
    names = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
    for name in names:
        if name not in STRUCTURES:
            raise ConfigError(f"--blocks {name!r} is unknown; choose among {', '.join(STRUCTURES)}.")
    return names


def _centers(value: Any) -> tuple[bool, ...]:
    if isinstance(value, bool):
        return (value,)
    if value not in _CENTER:
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
    gradients.add_argument("--device", default=None, help="auto (default), cpu, cuda, cuda:1")
    gradients.add_argument("--trust-remote-code", action="store_true", default=None, help="run code of a checkpoint")
    store = parser.add_argument_group("store")
    store.add_argument("--store-dtype", dest="dtype_store", default=None, help="of rows on disk; bfloat16 halves them")
    store.add_argument(
        "--bitround", type=int, default=None, metavar="BITS", help="keep so many mantissa bits (BitRound)"
    )
    store.add_argument("--codec", default=None, help="blosc-lz4 (default), zstd, raw")
    store.add_argument(
        "--store-centered", action="store_true", default=None, help="write centered gradients (one more pass)"
    )


def add_analysis_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides the spectrum of given gradients."""
    group = parser.add_argument_group("spectrum")
    group.add_argument(
        "--blocks",
        dest="block_structure",
        default=None,
        metavar="LIST",
        help=f"one or more of {','.join(STRUCTURES)}, with commas (default: layer)",
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
    group.add_argument("--gram-dtype", dest="dtype_gram", default=None, help="float32 (default) or float64 products")
    group.add_argument(
        "--workers", dest="n_workers", type=int, default=None, help="Dask workers (default: one per core)"
    )
    group.add_argument(
        "--memory-budget", default=None, help="of the reduction, for example 2GB (default: half of free)"
    )
    group.add_argument("--eigensolve-device", default=None, help="auto (default), cpu, cuda")
