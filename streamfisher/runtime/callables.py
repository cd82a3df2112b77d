"""`package.module:callable`: a user's own code, named on the command line."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from streamfisher.errors import ConfigError


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


def _needs_arguments(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:  # it has no signature that Python knows
        return False
    return False


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
