"""Options that say which samples of a stored run count: `--samples`, `--weights`, `--normalize-by`, `--partial`."""

from __future__ import annotations

import argparse
import operator
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from streamfisher.analysis.run import StoredRun
from streamfisher.errors import ConfigError, DataError

_COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"^\s*([A-Za-z_]\w*)\s*(<=|>=|==|!=|<|>)\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*$")


class _Intervals(argparse.Action):
    """Takes `--bootstrap R`, the former name, for `--intervals R`, and says so."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if option_string == "--bootstrap":
            print("--bootstrap is called --intervals: they are of a jackknife, not of a bootstrap.", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add_selection_options(parser: argparse.ArgumentParser, *, bootstrap: bool = True, resamples: bool = False) -> None:
    """Add which samples of a stored run count, and how much; and intervals, unless the command has none.

    Args:
        parser: of the command.
        bootstrap: it has intervals.
        resamples: and these are of a bootstrap, not of a jackknife.
    """
    group = parser.add_argument_group("samples")
    group.add_argument(
        "--samples",
        default=None,
        metavar="A:B|FILE|'FIELD>X'",
        help="a slice; a .npy or text file of numbers or a mask; a condition on loss, n_targets or a field of the data",
    )
    group.add_argument("--weights", default=None, metavar="FILE.npy", help="one weight per sample of the run")
    group.add_argument("--normalize-by", default="samples", metavar="samples|tokens", help="default: samples")
    if resamples:
        group.add_argument(
            "--bootstrap", type=int, default=0, metavar="R", help="standard errors from R resamples, e.g. 100"
        )
    elif bootstrap:
        group.add_argument(
            "--intervals",
            "--bootstrap",
            dest="bootstrap",
            action=_Intervals,
            type=int,
            default=0,
            metavar="R",
            help="intervals of the metrics from R subsets of the samples (delete-d jackknife), e.g. 100",
        )
    group.add_argument("--partial", action="store_true", help="analyse what an unfinished run has; marked as partial")


def selection_options(arguments: argparse.Namespace, n_samples: int, run: StoredRun | None = None) -> dict[str, Any]:
    """Return the options of `Run.spectrum` that `add_selection_options` read.

    Args:
        arguments: parsed.
        n_samples: of the run, or the smallest of several.
        run: whose fields a condition is about; `None` where there are several runs.
    """
    condition = _CONDITION.match(arguments.samples or "")
    return {
        "samples": where(run, condition) if condition and run else parse_samples(arguments.samples, n_samples),
        "weights": None if arguments.weights is None else read_weights(arguments.weights),
        "normalization": arguments.normalize_by,
        "partial": arguments.partial,
        **({"bootstrap": arguments.bootstrap} if "bootstrap" in arguments else {}),
    }


def chosen_samples(text: str, run: StoredRun, option: str, *, least: int = 2) -> slice | np.ndarray | None:
    """Return the samples of a run that an option names: a slice, a file of numbers or a mask, or a condition.

    Args:
        text: of the option.
        run: of the samples.
        option: its name, for messages.
        least: how many samples it must select.

    Raises:
        ConfigError: the text has another form or selects fewer than `least`.
    """
    condition = _CONDITION.match(text)
    if condition:
        return where(run, condition, option, least=least)
    return parse_samples(text, run.n_samples, option, least=least)


def where(run: StoredRun, condition: re.Match[str], option: str = "--samples", *, least: int = 2) -> np.ndarray:
    """Return the mask, (N,) bool, of the samples that meet a condition such as `loss>3.5` or `label==2`.

    Raises:
        ConfigError: the run has no such field, or fewer than 2 samples meet the condition.
    """
    name, sign, number = condition.groups()
    fields = run.store.samples.fields()
    if name not in fields:
        raise ConfigError(f"{option} {condition.string}: the run has no field {name!r}; it has {', '.join(fields)}.")
    mask = _COMPARISONS[sign](fields[name], float(number))
    if mask.sum() < least:
        raise ConfigError(f"{option} {condition.string} selects {mask.sum()} of the run's {len(mask)} samples.")
    print(f"{option} {condition.string}: {mask.sum()} of {len(mask)} samples", file=sys.stderr)
    return mask


def parse_samples(
    text: str | None, n_samples: int, option: str = "--samples", *, least: int = 2
) -> slice | np.ndarray | None:
    """Return the slice that `'0:512'`, `':100'` or `'100'` (the first hundred) names, or the numbers in a file.

    Raises:
        ConfigError: the text has another form or selects fewer than `least` of `n_samples`.
    """
    if text is None:
        return None
    if text.endswith((".npy", ".txt")) or Path(text).is_file():
        return read_samples(text, option)
    parts = text.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or (len(numbers) == 3 and numbers[2] == 0):
        raise ConfigError(f"{option} {text!r} is not a slice (start:stop:step); write for example 0:512 or 0:1024:2.")
    chosen = slice(numbers[0]) if len(numbers) == 1 else slice(*numbers)
    if len(range(*chosen.indices(n_samples))) < least:
        raise ConfigError(f"{option} {text} selects fewer than {least} of the run's {n_samples} samples.")
    return chosen


def check_target(path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a file that could not be written, before anything is computed for it."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"--out {path}: the name must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}.")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ConfigError(f"--out {path}: it must name a file in a folder that exists.")


def read_samples(path: str | Path, option: str = "--samples") -> np.ndarray:
    """Read sample numbers from a `.npy` file (integers, or a boolean mask) or a text file, one number per line.

    Raises:
        DataError: the file is not there, empty, or holds something else.
    """
    path = Path(path)
    values = _load_array(path, option) if path.suffix == ".npy" else _read_lines(path, option)
    if values.ndim != 1 or values.dtype.kind not in "iub" or values.size == 0:
        raise DataError(
            f"{option} {path} must hold sample numbers or a mask, one axis; it has {values.dtype} {values.shape}."
        )
    return values


def read_weights(path: str | Path) -> np.ndarray:
    """Read weights, one for each sample of the run, from a `.npy` file.

    Raises:
        DataError: the file is not there or holds something else.
    """
    values = _load_array(Path(path), "--weights")
    if values.ndim != 1 or values.dtype.kind not in "iuf":
        raise DataError(f"--weights {path} must hold one number per sample; it has {values.dtype} {values.shape}.")
    return values.astype(np.float64)


def _load_array(path: Path, option: str) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{option} {path}: there is no such file.")
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{option} {path} cannot be read as a .npy file: {error}") from error


def _read_lines(path: Path, option: str) -> np.ndarray:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{option} {path} cannot be read: {error}") from error
    try:
        return np.array([int(line) for line in lines], dtype=np.int64)
    except ValueError as error:
        raise DataError(f"{option} {path} must hold one sample number per line: {error}.") from None
