"""Metadata of a run that can be made again from its manifest, and the manifest from its copy."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from streamfisher.errors import CorruptRunError
from streamfisher.runtime.durable import LARGEST_JSON, read_json, replacing, write_json
from streamfisher.runtime.own_files import read_own
from streamfisher.store.integrity import require_inside
from streamfisher.store.layout import MANIFEST_COPY, create_run
from streamfisher.store.manifest import LARGEST_MANIFEST, Manifest

#: Groups that are made when they are first needed.
_LATER = ("eigenvectors", "fields", "factors", "gram_mean", "spectra")


def wrong_metadata(run: Path, manifest: Manifest) -> list[str]:
    """Return the `zarr.json` files, relative to the run, that are not as the manifest has them.

    An array may be longer than the manifest says, as one of a run that was being grown when it was stopped.
    """
    with tempfile.TemporaryDirectory(prefix="streamfisher-") as folder:
        made = _made_anew(folder, manifest)
        return [name for name in _names(made, run) if not _agrees(run / name, made / name)]


def restore_metadata(run: Path, manifest: Manifest, names: Sequence[str]) -> None:
    """Write `zarr.json` files as the manifest has them; only while holding the lock."""
    with tempfile.TemporaryDirectory(prefix="streamfisher-") as folder:
        made = _made_anew(folder, manifest)
        _names(made, run)
        for name in names:
            content = (made / name).read_bytes()
            target = run / name
            require_inside(run, target)
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing(target) as partial:
                partial.write_bytes(content)


def restore_manifest(run: Path, *, dry_run: bool = False) -> str | None:
    """Put the copy of the manifest in its place where that is damaged, or the manifest in place of a damaged copy.

    Returns:
        What was wrong, in words; `None` where nothing was.

    Raises:
        CorruptRunError: both are damaged.
    """
    found: dict[str, dict | CorruptRunError] = {}
    for name in ("manifest.json", MANIFEST_COPY):
        try:
            found[name] = Manifest.from_dict(read_json(run / name, LARGEST_MANIFEST)).to_dict()
        except CorruptRunError as error:
            found[name] = error
    main, copy = found["manifest.json"], found[MANIFEST_COPY]
    if isinstance(main, CorruptRunError) and isinstance(copy, CorruptRunError):
        raise main
    if not isinstance(main, CorruptRunError) and not isinstance(copy, CorruptRunError):
        return None
    damaged, whole = ("manifest.json", copy) if isinstance(main, CorruptRunError) else (MANIFEST_COPY, main)
    if not dry_run:
        write_json(run / damaged, whole)
    return str(found[damaged])


def _made_anew(folder: str, manifest: Manifest) -> Path:
    path = Path(folder) / "run.zarr"
    create_run(path, manifest)
    return path


def _names(made: Path, run: Path) -> list[str]:
    """Return the metadata that are known; those of groups that came later are as those of `gram`."""
    for group in _LATER:
        if (run / group / "zarr.json").is_file() or any((run / group).glob("*/zarr.json")):
            (made / group).mkdir()
            (made / group / "zarr.json").write_bytes((made / "gram" / "zarr.json").read_bytes())
    return sorted(str(path.relative_to(made)) for path in made.rglob("zarr.json"))


def _agrees(there: Path, made: Path) -> bool:
    expected = json.loads(made.read_text())
    try:
        found = json.loads(read_own(there, LARGEST_JSON))
    except (OSError, ValueError, RecursionError, CorruptRunError):
        return False
    if found == expected:
        return True
    try:
        longer = found["shape"][0] >= expected["shape"][0] and found["shape"][1:] == expected["shape"][1:]
        return longer and {**found, "shape": expected["shape"]} == expected
    except (KeyError, TypeError, IndexError):
        return False
