"""The errors a user can meet, each with one sentence on what was wrong and one on what to do.

Everything that a user can cause derives from `StreamfisherError`: the command line prints its message without a
traceback and exits with `exit_code`. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence


class StreamfisherError(Exception):
    """Base of every error caused by the input, the environment or a stored run."""

    exit_code = 2


class ConfigError(StreamfisherError, ValueError):
    """An option has a value that cannot be used; the message names the option, the value and what is allowed."""


class DataError(StreamfisherError, ValueError):
    """The samples cannot be used: empty, too few, too short, or of mixed kinds."""


class ModelError(StreamfisherError, ValueError):
    """The model cannot be loaded or has nothing to differentiate."""


class LossError(StreamfisherError, ValueError):
    """The loss has the wrong shape, no targets, or cannot be chosen.

    Args:
        message: for the user.
        samples: those of the batch that are to blame, by their places in it, where it is known.
    """

    def __init__(self, message: str, samples: Sequence[int] = ()):
        super().__init__(message)
        self.samples = list(samples)


class CaptureError(StreamfisherError, RuntimeError):
    """Per-sample gradients disagree with plain autograd on every path that was tried."""


class NonFiniteError(StreamfisherError, FloatingPointError):
    """A loss or gradient is NaN or infinite; the message names the sample."""

    exit_code = 3


class RunError(StreamfisherError, RuntimeError):
    """A folder is not a run, is unfinished where a finished one is needed, or holds another run."""


class RunMismatchError(RunError):
    """A run cannot be resumed because model, data or settings differ; the message says which."""


class CorruptRunError(RunError):
    """Something stored in a run is missing, altered or torn."""

    exit_code = 4


class RankError(RunError):
    """Another process of the same run failed, died, was not heard of, or was given other work; the message names it."""

    exit_code = 6


class StoppedError(StreamfisherError):
    """A signal asked the run to stop; what was in flight is finished and marked."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}. The same command goes on where it stopped.")
        self.exit_code = 128 + number


class CapacityError(StreamfisherError, OSError):
    """The work does not fit the disk or the memory that is there."""

    exit_code = 5


class RemoteError(StreamfisherError):
    """A store behind a URL does not answer, refuses access, or has no such place. Nothing is damaged by that.

    It is none of the kinds of error that reading damaged files ends in, so nobody takes an outage for damage.
    """


class ConvergenceError(StreamfisherError, RuntimeError):
    """An iterative solver did not reach its tolerance; the message says how far it came."""


class StreamError(StreamfisherError, RuntimeError):
    """The model is no stack of layers that can be streamed; the message says why and what to do instead."""


class MissingExtraError(StreamfisherError, ImportError):
    """An optional package is not installed; the message gives the command that installs it."""


def no_memory(error: BaseException) -> bool:
    """Return whether an error says that memory, on the host or on a device, is used up."""
    signs = (
        *("can't allocate memory", "can't start new thread", "out of memory", "bad_alloc"),
        "failed to map segment from shared object",  # of a library that is loaded
        *("without exception set", "without setting an exception"),  # of code in C that had none to raise one in
    )
    kinds = RuntimeError | OSError | ImportError | SystemError
    return isinstance(error, MemoryError) or (isinstance(error, kinds) and any(sign in str(error) for sign in signs))


def unreadable(error: Exception, message: str) -> StreamfisherError:
    """Return the error to raise where stored data could not be read: damage, unless there was no memory to read it."""
    if isinstance(error, RemoteError):
        return error
    if no_memory(error):
        return CapacityError(f"no memory is left ({error}). What is finished is kept; give less work at a time.")
    return CorruptRunError(message)


def require(package: str, extra: str, purpose: str) -> None:
    """Raise a clear error when an optional package is missing.

    Args:
        package: importable name, for example `matplotlib`.
        extra: the extra of streamfisher that brings it.
        purpose: what it is needed for, completing "is needed to ...".

    Raises:
        MissingExtraError: the package cannot be imported.
    """
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(
            f"{package} is needed to {purpose} and is not installed. "
            f"Install it with: pip install 'streamfisher[{extra}]'"
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
