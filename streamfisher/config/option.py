"""One definition of an option for Python, files, the command line and the documents: the metadata of a field.

A section of the config is a frozen dataclass whose fields are made by `option`. What is said there is all there is:
`Section` checks values by it, `documented` writes docstrings from it, and the command line makes its arguments of it.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from streamfisher.config.dtypes import dtype_name
from streamfisher.config.kinds import Kind

T = TypeVar("T")
Group = Literal[
    "data", "model and devices", "gradients", "store", "spectrum", "reduction", "reduction on a GPU or cluster"
]


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its type."""

    default: Any
    kind: Kind
    help: str
    name: str  # on the command line and in files; empty: that of the field
    group: Group | None  # its heading in `--help`; None: in Python and in files only
    metavar: str  # what stands for a value in `--help`; empty: the name in capitals
    unset: str  # what the default means, where the value does not say it
    unit: str = ""  # of its values, where the text does not say it

    @property
    def description(self) -> str:
        """What the option is for, and its default."""
        default = self.unset
        if not default and self.default is not None and self.default not in (False, "", ()):
            default = dtype_name(self.default) if isinstance(self.default, torch.dtype) else str(self.default)
        return f"{self.help} (default: {default})" if default else self.help


def option(
    default: T,
    kind: Kind,
    help: str,
    *,
    name: str = "",
    group: Group | None = None,
    metavar: str = "",
    unset: str = "",
    unit: str = "",
) -> T:
    """Return a dataclass field that is an option; its parameters are the attributes of `Option`."""
    about = Option(default, kind, help, name, group, metavar, unset, unit)
    return dataclasses.field(default=default, metadata={"option": about})


def options_of(cls: type[Any]) -> dict[str, Option]:
    """Return the options of a dataclass by the names of their fields."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(cls) if "option" in field.metadata}


def documented(cls: type[T]) -> type[T]:
    """List the options of a dataclass in its docstring."""
    lines = [f"    {name}: {_full(item)}" for name, item in options_of(cls).items()]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Attributes:", *lines])
    return cls


def _full(item: Option) -> str:
    """What an option is for, with its unit where that is bytes, and its default, whatever it is."""
    text = item.description
    if item.unit:
        text = text.replace(item.help, f"{item.help}; in {item.unit}")
    default = "no" if item.default is False else "none" if item.default in ("", (), None) else str(item.default)
    return text if "(default:" in text else f"{text} (default: {default})"


@dataclass(frozen=True, kw_only=True)
class Section:
    """Options that belong together and are checked when they are set.

    Raises:
        ConfigError: a field has a value that cannot be used; the message names the field and the value.
    """

    def __post_init__(self) -> None:
        for name, item in options_of(type(self)).items():
            object.__setattr__(self, name, item.kind.check(name, getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Refuse values that are good alone and not together."""
