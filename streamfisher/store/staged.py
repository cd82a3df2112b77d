"""A run below a URL, opened for writing: locked there, staged in a local folder, and sent as it is written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from streamfisher.byte_sizes import parse_bytes
from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError, RunError
from streamfisher.runtime.disk import DISK_MARGIN, free_disk
from streamfisher.runtime.durable import write_json
from streamfisher.runtime.memory import world_size
from streamfisher.runtime.paths import expanded
from streamfisher.runtime.ranks import Ranks, start_ranks
from streamfisher.runtime.remote_path import RemotePath
from streamfisher.runtime.remote_store import RemoteStore
from streamfisher.runtime.staging import Staging, may_be_freed
from streamfisher.runtime.upload import Upload
from streamfisher.store.layout import MANIFEST_COPY, OWN_NAMES
from streamfisher.store.remote_lock import TURNS, RemoteLock
from streamfisher.store.run_store import RunStore

_LEDGER, _RECORD = "sent.jsonl", "staging.json"
_AT_A_TIME = 16


@contextlib.contextmanager
def written(
    path: str | os.PathLike[str],
    *,
    staging: str | os.PathLike[str] | None = None,
    budget: str | int | None = None,
    locked: bool = True,
    ranks: Ranks | None = None,
) -> Iterator[Path]:
    """Let a run be written, wherever it is: yield the local folder that stands for it.

    That of a local run is its own. One below a URL is locked there; what it has is brought here but for gradients,
    which are read from there when they are asked for; and what is written is sent until the folder is left, which is
    then deleted. After an error it stays, and the next one goes on with it.

    Args:
        path: of the run, or its URL.
        staging: folder for the run while it is written; `None` means `<name of the run>.staging` in the working folder.
        budget: bytes that it may take there, as '200GB'; `None` means what is free.
        locked: take the lock of the URL. Without it nothing keeps two writers apart.
        ranks: all that write the run, see `ranks_of`. Rank 0 locks, brings and sends; the staging folder is one that
            all of them see, and holds the whole run. Others may leave it while rank 0 still sends.

    Raises:
        RunError: another process writes the run, or there is something else at the URL or in the staging folder.
        RemoteError: the store does not answer.
        ConfigError: there are several ranks and `ranks` was not given, or a budget was; this one does not see the
            staging folder.
        RankError: another rank failed.
    """
    run = expanded(path)
    if not isinstance(run, RemotePath):
        if staging is not None or budget is not None:
            raise ConfigError(f"{run} is a local folder, which takes no staging; leave --staging out.")
        yield run
        return
    place = Path(f"{run.name}.staging") if staging is None else expanded(staging)
    if ranks is None:
        if world_size() > 1:
            raise ConfigError(
                f"{run} is to be written by {world_size()} ranks. `run` and `collect` do that; this takes one process."
            )
        with _staged(place, run, budget, locked=locked) as (folder, _):
            yield folder
        return
    if budget is not None:
        raise ConfigError(
            f"--staging-budget {budget}: of {ranks.count} ranks each reads in the staging folder what others wrote, so "
            "that nothing there is freed; leave it out, and give --staging a disk that has room for the run."
        )
    with contextlib.ExitStack() as sending:
        shared = None
        if ranks.is_main:
            folder, token = sending.enter_context(_staged(place, run, 1 << 62, locked=locked, whole=True))
            shared = [str(folder.absolute()), token]
        path, token = ranks.share("the staging folder", shared)
        folder = Path(path)
        if _token(folder.parent / _RECORD) != token:
            raise ConfigError(
                f"rank {ranks.index} on {socket.gethostname()} does not see rank 0's {folder.parent}. Name a staging "
                "folder that all ranks see with --staging."
            )
        ranks.wait("for the staging folder")
        yield folder


@contextlib.contextmanager
def rewritten(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Let a run that is there be changed, wherever it is; see `written`.

    Raises:
        RunError: there is none.
    """
    run = expanded(path)
    if not any((run / name).is_file() for name in ("manifest.json", MANIFEST_COPY)):
        RunStore(run)  # says so; a place that holds no run is not locked
    with written(path) as folder:
        yield folder


@contextlib.contextmanager
def ranks_of(path: str | os.PathLike[str], config: SpectralConfig) -> Iterator[Ranks | None]:
    """Yield the ranks that write a run below a URL; `None` where there is one, or the run is a local folder.

    They wait for one another as long as they live: what rank 0 brings and sends may take hours.

    Args:
        path: of the run, or its URL.
        config: `device` and `rank_timeout` count here.
    """
    if world_size() == 1 or not isinstance(expanded(path), RemotePath):
        yield None
        return
    state = start_ranks(cpu=config.device == "cpu", timeout=config.rank_timeout)
    with Ranks(state, timeout=math.inf) as ranks:
        yield ranks


@contextlib.contextmanager
def _staged(
    place: Path, run: RemotePath, budget: str | int | None, *, locked: bool, whole: bool = False
) -> Iterator[tuple[Path, str]]:
    """Yield the folder of the run in a staging folder, and the token of this turn of writing it."""
    with RemoteLock(str(run), locked=locked) as lock:
        folder = _prepared(place, run, lock)
        with Staging(folder, run.store, place / _LEDGER) as staged:
            _bring(staged, run.store, whole=whole)
            room = free_disk(place) - DISK_MARGIN if budget is None else parse_bytes(budget)
            with Upload(staged, lock.check, room) as upload:
                staged.made = upload.made
                yield folder, _token(place / _RECORD)
        shutil.rmtree(place)


def _token(record: Path) -> str:
    """Return the token that a staging folder was last written under; '' where there is none."""
    try:
        return str(json.loads(record.read_bytes())["token"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _prepared(place: Path, run: RemotePath, lock: RemoteLock) -> Path:
    """Return the folder of the run in a staging folder, empty where another process has written the run since."""
    folder, record = place / run.name, place / _RECORD
    if place.exists() and not record.is_file() and (not place.is_dir() or any(place.iterdir())):
        raise RunError(f"{place} exists and is no staging folder; name another with --staging.")
    if record.is_file():
        try:
            content = json.loads(record.read_bytes())
            url, token = content["url"], content["token"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{record} is damaged ({error}); delete {place}, or name another with --staging.") from error
        if url != str(run):
            raise RunError(f"{place} holds what {url} still lacks; name another folder with --staging.")
        if token != lock.before:
            warnings.warn(
                f"{run} was written by another process since {place} was: what was not sent from there is computed "
                "again.",
                stacklevel=4,
            )
            shutil.rmtree(folder, ignore_errors=True)
            (place / _LEDGER).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, {"url": str(run), "token": lock.token if lock.locked else lock.before})
    return folder


def _bring(staged: Staging, store: RemoteStore, *, whole: bool) -> None:
    """Bring what the store has and this folder lacks; chunks of gradients are only noted, but for a `whole` one."""
    there = {name: store.size(name) or 0 for name in store.below("")}
    foreign = sorted({name.split("/")[0] for name in there} - OWN_NAMES - {TURNS, "manifest.json", "stream"})
    if foreign and "manifest.json" not in there:
        raise RunError(
            f"{store.url} is not a streamfisher run (it holds {', '.join(foreign[:3])}); name another place."
        )
    wanted = []
    for name, size in there.items():
        if name.split("/")[0] in (TURNS, "lock", "lock.ranks", "stream") or name.endswith(".partial"):
            continue
        if "manifest.json" not in there:  # the remains of a run that never began: noted, and so deleted or replaced
            if staged.sent.get(name, (0, 0))[0] != size:
                staged.note(name, [size, 0])
            continue
        path, stays = staged.folder / name, whole or not may_be_freed(name)
        sent = name in staged.sent and name not in staged.away
        if path.exists() or (sent and stays):  # deleted here, and there before long
            continue
        if stays:
            wanted.append(name)
        elif name not in staged.away or staged.away[name] != size:
            staged.note(name, [size, 0])
            staged.note(name, "away")
    for name in [name for name in staged.away if name not in there]:
        staged.note(name, "gone")
    for name in staged.away:
        if "/c/" in name and not name.startswith("factors/"):
            (staged.folder / "/".join(name.split("/")[:3])).mkdir(parents=True, exist_ok=True)

    def bring(name: str) -> None:
        path = staged.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(store.read(name, 1 << 40))
        partial.replace(path)
        facts = path.stat()
        staged.note(name, [facts.st_size, facts.st_mtime_ns])

    with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="streamfisher-bring") as pool:
        for _ in pool.map(bring, (name for name in wanted if name != "manifest.json")):
            pass
    if "manifest.json" in wanted:  # last of all: without one there is no run
        bring("manifest.json")
    store.forget()
