"""A running Dask cluster for the reduction, by the address of its scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from streamfisher.errors import ConfigError, require

#: Seconds in which a scheduler must answer and have a worker.
TIMEOUT = 15.0


@contextmanager
def dask_client(address: str | None, timeout: float = TIMEOUT) -> Iterator[None]:
    """Let Grams be built by the cluster at `address` inside; `None` leaves it to threads of this process.

    The workers must see the run's folder under the same path, and have streamfisher installed.

    Raises:
        ConfigError: the scheduler does not answer, or has no worker; the message names the address.
        MissingExtraError: distributed is not installed.
    """
    if address is None:
        yield
        return
    require("distributed", "distributed", f"use the Dask scheduler at {address}")
    from distributed import Client

    try:
        # Not as the default: a client that never connected would stay it, and later reductions would wait for it.
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"--dask-scheduler {address}: no scheduler answered within {timeout:.0f} s ({reason}). "
            "Start one with `dask scheduler`, or leave the option out."
        ) from error
    with client, client.as_current():
        try:
            client.wait_for_workers(1, timeout=timeout)
        except TimeoutError as error:
            raise ConfigError(
                f"--dask-scheduler {address}: the scheduler has no worker after {timeout:.0f} s. "
                f"Start some with `dask worker {address}`."
            ) from error
        yield
