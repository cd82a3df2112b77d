"""Files of options that are made to hang, to fill memory, or to end in a traceback."""

from __future__ import annotations

import json
import random
from pathlib import Path

from campaign.hostile_fields import EVILS
from campaign.hostile_watch import Command

MODEL, DATA = "tiny_models:causal", "tiny_models:sequences"
QUIET = ("--quiet", "--device", "cpu", "--workers", 1)
Given = tuple[str, list[Command], str]  # what it is, commands, and the name of the answer that it must be; "": none

DIGITS = "9" * 5000
_ALIASES = (
    "[&a [x,x,x,x,x,x,x,x,x,x]"
    + "".join(f", &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]" for n in range(9))
    + "]"
)
CONFIGS = {
    "yaml": [
        f"include: {_ALIASES}\n",
        f"seed: {_ALIASES}\n",
        f"blocks: {_ALIASES}\n",
        f"memory_budget: {_ALIASES}\n",
        f"'first.*': {_ALIASES}\n",
        "include: &a [*a]\n",
        "seed: &a {x: *a}\n",
        "? {a: 1}\n: 2\n",
        "? [a, b]\n: 2\n",
        f"seed: {DIGITS}\n",
        f"seed: 0x{'f' * 20000}\n",
        "seed: 2001-99-99\n",
        "seed: 2001-02-03\n",
        "2001-99-99: 1\n",
        "seed: 2001-01-01T99:99:99Z\n",
        f"seed: {2**64}\n",
        f"chunk_size: {2**70}\n",
        "chunk_size: 1:2:3:4:5\n",
        "eps: .nan\n",
        "eps: .inf\n",
        f"eps: 1e{DIGITS}\n",
        "seed: 1\nseed: 2\n<<: [{}, 7]\n",
        "seed: !!binary '////'\n",
        "seed: !!timestamp x\n",
        "seed: !!int x\n",
        "seed: !!float x\n",
        "seed: !!python/name:os.system\n",
        "include: !!set {a, b}\n",
        "~: 1\n",
        "1.5: x\n",
        "{" * 5000,
        "- " * 20000,
        "a: " + "x" * (8 << 20) + "\n",
        "\ufeffseed: 1\n",
        "seed: \x00\n",
        "--- {}\n--- {}\n",
        "%TAG ! tag:x,2000:\n---\nseed: !x 1\n",
        f"memory_budget: {DIGITS}GB\n",
        "memory_budget: .inf\n",
        "memory_budget: [1]\n",
        "memory_budget: 1e400GB\n",
        "rank_timeout: .inf\n",
        f"rank_timeout: {2**70}\n",
        f"batch_tokens: {2**70}\n",
        f"max_length: {2**70}\n",
        f"samples: {2**70}\n",
        f"project: {2**70}\n",
        f"guard_every: {2**70}\n",
        f"n_workers: {2**40}\n",
        f"top_k: {2**70}\n",
        "blocks: [[parameter]]\n",
        "blocks: [{a: {b: c}}]\n",
        "include: ['" + "[" * 3000 + "']\n",
        "include: ['" + "*a" * 5000 + "']\n",
        "field: [1]\ndata: {a: 1}\n",
        "out: [1]\n",
        "tokenizer: 7\n",
        "device_map: {a: b}\n",
        "dask_scheduler: 7\n",
        "loss: 'os:system'\n",
        "loss: ':'\n",
        "offload_folder: 7\nfsdp: maybe\n",
        *(f"loss: {json.dumps(evil)}\n" for evil in EVILS),
        *(f"{json.dumps(evil)}: 1\n" for evil in EVILS),
    ],
    "json": [
        f'{{"seed": {DIGITS}}}',
        '{"seed": NaN}',
        '{"eps": Infinity}',
        '{"seed": 1e999}',
        '{"seed": 1, "seed": 2}',
        '{"\\ud800": 1}',
        '{"loss": "\\ud800"}',
        '{"loss": "\\u0000"}',
        '{"dtype_store": {"a": 1}}',
        '{"dtype_store": [1]}',
        '{"codec": ["raw"]}',
        '{"on_nonfinite": {}}',
        '{"hold": []}',
        '{"labels": 7}',
        '{"keep_gradients": {"a": 1}}',
        '{"keep_gradients": [["all"]]}',
        '{"device": "cuda:999999999999999999999"}',
        '{"device": "meta"}',
        '{"device": "cpu:7"}',
        '{"eigensolve_device": "cuda:99"}',
        '{"gram_device": "x"}',
        "[" * 100000,
        '{"a":' * 100000,
        "\udcff",
        "",
        "null",
        '"x"',
    ],
    "toml": [
        f"seed = {DIGITS}",
        "seed = 0x" + "f" * 20000,
        "seed = 2001-99-99",
        "seed = 2001-02-03",
        "seed = 07:32:00",
        f"seed = {2**64}",
        "eps = nan",
        "eps = inf",
        f"eps = 1e{DIGITS}",
        "a = " + "[" * 5000,
        "a." * 5000 + "b = 1",
        "seed = 1\nseed = 2",
        "[seed]\nx = 1",
        "[[seed]]",
        '"\\uD800" = 1',
        "seed = '''",
        "# " + "x" * (8 << 20),
    ],
}


def config(folder: Path, finished: Path, dice: random.Random) -> Given:
    """Write a file of options, for `run` and `plan`, or of patterns, for `spectrum`."""
    kind = dice.choice(sorted(CONFIGS))
    text = dice.choice(CONFIGS[kind])
    path = folder / f"a.{dice.choice(['yaml', 'yml']) if kind == 'yaml' else kind}"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    commands = [
        Command(("run", MODEL, DATA, "--config", path, "--out", folder / "new.zarr", *QUIET)),
        Command(("plan", MODEL, DATA, "--config", path)),
        Command(("spectrum", finished, "--blocks", path, "--quiet")),
        Command(("run", MODEL, DATA, "--device-map", path, "--out", folder / "new.zarr", "--quiet")),
    ]
    return f"{path.name}: {text[:50]!a}", commands, ""
