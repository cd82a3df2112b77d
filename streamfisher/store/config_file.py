"""`config.yaml` of a run: every option as it was, so that `streamfisher run --config` makes the run once more.

It follows from the manifest alone, byte by byte, which is how `verify` checks it: whoever changes the text leaves the
text of older runs as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from streamfisher.runtime.durable import replacing
from streamfisher.runtime.own_files import read_own
from streamfisher.store.manifest import LARGEST_MANIFEST, Manifest

CONFIG_FILE = "config.yaml"
#: What a description has of the command line, by the names that a file of options takes, in the order they are listed.
_FROM_COMMAND = (
    *("model", "data", "samples", "field", "tokenizer", "trust_remote_code", "device_map", "offload_folder", "fsdp"),
    *("blocks", "center", "top_k"),
)
_HEAD = """# Every option of this run. The same run once more:
#   streamfisher run --config RUN.zarr/config.yaml --out NEW.zarr
"""
_HEAD_OF_PYTHON = """# Every option of this run, which was collected from Python: its model and samples have no names.
# config = SpectralConfig.from_dict(yaml.safe_load(open("RUN.zarr/config.yaml")))
"""


def replay_options(manifest: Manifest) -> dict[str, Any]:
    """Return the options that a run was made with, by the names that a file of options takes.

    Of a run that was collected from Python, these are the fields of its config; `model` and `data` are not among them.
    """
    described = manifest.data.get("description")
    config = dict(manifest.config)
    if not isinstance(described, Mapping) or not described.get("model") or not described.get("data"):
        return config
    own = {name: described[name] for name in _FROM_COMMAND if described.get(name) is not None}
    if isinstance(own.get("center"), list):
        own["center"] = "both" if len(own["center"]) > 1 else own["center"][0]
    same = ({"block_structure"} if "blocks" in own else set()) | ({"center_gradients"} if "center" in own else set())
    return own | {name: value for name, value in config.items() if name not in same}


def config_text(manifest: Manifest) -> str:
    """Return the text of `config.yaml`."""
    options = replay_options(manifest)
    head = _HEAD if "model" in options else _HEAD_OF_PYTHON
    return head + yaml.safe_dump(options, sort_keys=False, allow_unicode=True, width=120)


def write_config(path: Path, manifest: Manifest) -> None:
    """Write `config.yaml` into the run's folder, or let it be where it is right."""
    if not is_right(path, manifest):
        with replacing(path / CONFIG_FILE) as partial:
            partial.write_text(config_text(manifest), encoding="utf-8")


def is_right(path: Path, manifest: Manifest) -> bool:
    """Return whether `config.yaml` is what follows from the manifest.

    Raises:
        CorruptRunError: it is a link or another thing that is no file of the run's own.
    """
    try:
        return read_own(path / CONFIG_FILE, LARGEST_MANIFEST) == config_text(manifest).encode("utf-8")
    except FileNotFoundError:
        return False
