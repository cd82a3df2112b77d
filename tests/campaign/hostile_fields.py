"""Manifests and markers that contradict themselves or one another, and names that would act where they are shown.

Their seals are right: whoever writes them can make those. Only what they mean can be refused.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from campaign.corruption_campaign import kind_of
from campaign.hostile_runs import Make, write_sealed

from streamfisher.runtime import read_json

_MANIFESTS = ("manifest.json", "manifest.copy.json")
_OTHERS = (None, True, False, -1, 0, 1, 2, 0.5, 2**31, 2**53, 2**70, -(2**70), 1e308, "", "x", "1", "../../outside")
_OTHERS += ([], {}, [[]], [None], ["x"], {"a": {}}, {"0": "x"}, "\ud800", "x" * 1000, 10**4000)

Change = Callable[[dict[str, Any], random.Random], str | None]


def _somewhere(content: Any, dice: random.Random) -> str | None:
    """Change one value anywhere in a JSON object: another one, none, a sibling's, or moved by one."""
    path: list[Any] = []
    node = content
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        keys = [key for key in keys if key not in ("seal", "format", "format_version")]
        if not keys:
            return None
        key = dice.choice(keys)
        path.append(key)
        if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.75:
            node = node[key]
            continue
        how = dice.random()
        if how < 0.15:
            del node[key]
            return f"without {path}"
        if how < 0.25:
            node[key] = copy.deepcopy(node[dice.choice(keys)])
        elif how < 0.4 and isinstance(node[key], int | float):
            node[key] = node[key] + dice.choice([-1, 1, 2])
        else:
            node[key] = copy.deepcopy(dice.choice(_OTHERS))
        return f"{path} = {str(node[key])[:60]!a}"


def _set(*path: Any, to: Any) -> Change:
    def change(manifest: dict[str, Any], dice: random.Random) -> str:
        node = manifest
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to(node.get(path[-1]) if isinstance(node, dict) else node[path[-1]]) if callable(to) else to
        return f"{path} = {str(node[path[-1]])[:60]!a}"

    return change


def _name(manifest: dict[str, Any], index: int = 0) -> str:
    return manifest["parameters"][index]["name"]


def _grams(of: Callable[[list[str]], Any]) -> Change:
    def change(manifest: dict[str, Any], dice: random.Random) -> str:
        manifest["layout"]["grams"] = of([item["name"] for item in manifest["parameters"]])
        return f"grams {str(manifest['layout']['grams'])[:80]}"

    return change


def _waves(of: Callable[[list[str]], Any]) -> Change:
    def change(manifest: dict[str, Any], dice: random.Random) -> str:
        manifest["layout"]["waves"] = of([item["name"] for item in manifest["parameters"]])
        return f"waves {str(manifest['layout']['waves'])[:80]}"

    return change


def _parameter(what: Callable[[dict[str, Any], list[dict[str, Any]]], None]) -> Change:
    def change(manifest: dict[str, Any], dice: random.Random) -> str:
        items = manifest["parameters"]
        item = dice.choice(items)
        what(item, items)
        return f"parameters: {str(item)[:100]}"

    return change


_MANIFEST: list[Change] = [
    *[_set("layout", "centered", to=lambda value: not value)] * 2,
    _set("config", "store_centered", to=lambda value: not value),
    _set("identity", "store_centered", to=lambda value: not value),
    _waves(lambda names: []),
    _waves(lambda names: [[]]),
    _waves(lambda names: [names, names]),
    _waves(lambda names: [names[:1]]),
    _waves(lambda names: [[*names, "no such"]]),
    _waves(lambda names: [["x"] * 10, names]),
    _waves(lambda names: {"0": names}),
    _waves(lambda names: ["".join(names)]),
    _waves(lambda names: [[name] for name in names]),
    _grams(lambda names: {name: [name] for name in names[1:]}),
    _grams(lambda names: {name: [name, name] for name in names}),
    _grams(lambda names: dict.fromkeys(names, names)),
    _grams(lambda names: {name: [other] for name, other in zip(names, reversed(names), strict=True)}),
    _grams(lambda names: {"x/../y": names}),
    _grams(lambda names: {name: [] for name in names}),
    _grams(lambda names: {name: ["no such"] for name in names}),
    _grams(lambda names: {name: name for name in names}),
    _grams(lambda names: names),
    _set("layout", "representation", to={"first.weight": "sparse"}),
    _set("layout", "representation", to={"no such": "factors"}),
    _set("layout", "representation", to=lambda was: dict.fromkeys(was or {"first.weight": 0}, "factors")),
    _set("layout", "representation", to=["factors"]),
    _set("layout", "dtype_store", to="float64"),
    _set("layout", "dtype_store", to="bfloat16"),
    _set("layout", "dtype_row", to="float64"),
    _set("layout", "dtype_row", to="float16"),
    _set("layout", "bitround", to=7),
    _set("layout", "bitround", to=-5),
    _set("layout", "bitround", to=2000),
    _set("layout", "codec", to="pickle"),
    _set("layout", "keep", to="*"),
    _set("layout", "keep", to=[7]),
    _set("layout", "keep", to=[]),
    _set("layout", "hold", to="elsewhere"),
    _set("layout", "streamed", to=True),
    _set("layout", "batch_tokens", to=0),
    _set("layout", "batch_tokens", to="x"),
    _set("layout", "chunk_rows", to=lambda rows: rows * 2),
    _set("data", "n_samples", to=lambda n: n - 1),
    _set("data", "n_samples", to=lambda n: n + 1),
    _set("data", "n_samples", to=2),
    _set("data", "chunk_digests", to=lambda digests: digests[:-1]),
    _set("data", "chunk_digests", to=lambda digests: [7] * len(digests)),
    _set("data", "sample_unit", to=["x"]),
    _set("data", "chunk_size", to=0),
    _set("config", "project", to=3),
    _set("config", "max_params_per_block", to=3),
    _set("config", "solver", to="lanczos"),
    _set("config", "gram_per", to="layer"),
    _set("config", "dtype_gram", to="float64"),
    _set("config", "eps", to=0.999),
    _set("config", "block_structure", to="\x1b[31m"),
    _set("config", "memory_budget", to="1B"),
    _set("config", "memory_budget", to=2**70),
    _set("config", "n_workers", to=2**40),
    _set("config", "device", to="cuda:99"),
    _set("config", "eigensolve_device", to="cuda"),
    _set("config", "gram_device", to="meta"),
    _set("config", "seed", to=2**70),
    _set("config", "store_path", to="/proc/self/mem"),
    _set("versions", to=["x"]),
    _set("versions", to={"streamfisher": {"a": [1]}}),
    _set("probe", to={}),
    _set("probe", "parameters", to={"first.weight": 7}),
    _set("probe", "coverage_norm", to="x"),
    _set("probe", "notes", to="x" * 100),
    _set("excluded", to={"first.weight": ["x"]}),
    _set("model", "fingerprint", to=None),
    _set("loss", to={"loss": {"a": 1}, "n_samples": 3, "eigenvalues": [1]}),
    _parameter(lambda item, items: item.update(shape=[])),
    _parameter(lambda item, items: item.update(shape=[*item["shape"], 1])),
    _parameter(lambda item, items: item.update(shape=[*item["shape"], 2])),
    _parameter(lambda item, items: item.update(shape=[1] * 60_000)),
    _parameter(lambda item, items: item.update(columns=1)),
    _parameter(lambda item, items: item.update(dtype="object")),
    _parameter(lambda item, items: item.update(name="../../../outside/precious")),
    _parameter(lambda item, items: item.update(name="x" * 300)),
    _parameter(lambda item, items: item.update(name="\ud800")),
    _parameter(lambda item, items: item.update(name="")),
    _parameter(lambda item, items: item.update(chunk_columns=item["chunk_columns"] + 1)),
    _parameter(lambda item, items: items.reverse()),
    _parameter(lambda item, items: items.remove(item)),
    _parameter(lambda item, items: items.append({**item, "name": "more"})),
    _parameter(lambda item, items: items.clear()),
    _parameter(lambda item, items: items.extend({**item, "name": str(n)} for n in range(20_000))),
]


def manifest(run: Path, outside: Path, dice: random.Random) -> str:
    """Let the manifest, and mostly its copy, say what no run has."""
    content = read_json(run / "manifest.json")
    for _ in range(20):
        changed = copy.deepcopy(content)
        change = dice.choice(_MANIFEST) if dice.random() < 0.7 else _somewhere
        try:
            what = change(changed, dice)
        except (KeyError, TypeError, IndexError, AttributeError):
            continue
        if what is not None and changed != content:
            break
    both = dice.random() < 0.8
    for name in _MANIFESTS if both else _MANIFESTS[:1]:
        write_sealed(run / name, changed)
    return what + ("" if both else " (not in the copy)")


def marker(run: Path, outside: Path, dice: random.Random) -> str:
    """Let a marker, or an attribute of an array, say what it cannot say."""
    by_kind: dict[str, list[Path]] = {}
    for path in sorted((run / "done").rglob("*.json")):
        by_kind.setdefault(kind_of(str(path.relative_to(run))), []).append(path)
    path = dice.choice(by_kind[dice.choice(sorted(by_kind))])
    content = read_json(path)
    special: dict[str, list[dict[str, Any]]] = {
        "marker of gram": [
            *({"tiles": value} for value in (0, -1, 1, 2**40, "x", None, 0.5, True)),
            *({"n_samples": value} for value in (0, -1, 7, 2**40, 2**70, "8", None, 8.0, True)),
            *({"mean_crc32c": value} for value in (None, 0, "x")),
            {"moment_crc32c": None},
            {"files": None},
            {"settings": {}},
            {"settings": None},
            {"float32_products": False},
            {"parameter": None},
        ],
        "marker of moment": [{"count": value} for value in (0, -1, 2, 2**70, "x", None, float(8), 7)],
        "marker of rows": [
            *({"skipped": value} for value in ({"0": "x"}, {"99": "x"}, {"-1": "x"}, {"x": "x"}, {"0": None}, [], "0")),
            *({"wave": value} for value in (1, -1, None, "0", 2**70)),
            *({"factors": value} for value in ([], {}, [7], [{}], [{"start": 0, "sides": {}, "pairs": {}}], "x")),
            *({"crc32c": value} for value in ({}, None, [], 7)),
            *({"chunks": value} for value in ({}, None, [], 7)),
            *({"samples": value} for value in ({}, None, [], 7)),
        ],
        "marker of fields": [{"crc32c": value} for value in (None, 7, ["../../outside"], {"../../x": 1}, {"": 1})],
        "marker of mean": [{"crc32c": value} for value in (None, 7, {}, [])],
        "marker of deleted": [{"parameters": value} for value in (None, ["no such"], "x")],
        "marker of spectrum": [{"crc32c": value} for value in (None, "x", 2**70)],
    }
    changes = special.get(kind_of(str(path.relative_to(run))), [])
    if changes and dice.random() < 0.6:
        change = dice.choice(changes)
        what, content = str(change)[:80], content | change
    elif dice.random() < 0.15:
        what, content = "it holds a list", {"x": list(content)}
        path.write_text(json.dumps(list(content)))
        return f"{path.relative_to(run)}: {what}"
    else:
        what = _somewhere(content, dice) or "nothing"
    write_sealed(path, content)
    return f"{path.relative_to(run)}: {what}"


def between(run: Path, outside: Path, dice: random.Random) -> str:
    """Let files that are good by themselves contradict one another: markers of others, keys twice, one too many."""
    done = sorted((run / "done").glob("*.json"))
    ways = ["keys twice", "another's marker", "one marker more", "NaN", "a marker of no parameter", "both manifests"]
    way = dice.choice(ways)
    path = dice.choice(done)
    if way == "keys twice":
        path = dice.choice([*done, run / "manifest.json"])
        content = json.loads(path.read_text())
        key = dice.choice(sorted(content))
        first = json.dumps({key: dice.choice([None, 2**70, [], "x"])})[:-1]
        path.write_text(first + ", " + json.dumps(content)[1:])  # the last one counts, as for all of Python
    elif way == "another's marker":
        other = dice.choice(done)
        path.write_bytes(other.read_bytes())
        return f"{path.name} is {other.name}"
    elif way == "one marker more":
        name = dice.choice(
            ["rows-000099.json", "rows-999999999999999999999.json", "rows-00000٣.json", "rows.7-000000.json"]
        )
        path = run / "done" / name
        path.write_bytes(dice.choice(done).read_bytes())
    elif way == "NaN":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"n_samples": float("nan")}))
    elif way == "a marker of no parameter":
        path = run / "done" / dice.choice(["gram-x.json", "gram-%2E%2E%2Fx.json", "moment-x.json", "gram-%.json"])
        write_sealed(path, {"parameter": "x", "n_samples": 8, "crc32c": 0, "settings": {}})
    else:
        content = read_json(run / "manifest.json")
        write_sealed(run / _MANIFESTS[1], content | {"loss": {}, "data": content["data"] | {"n_samples": 8}})
    return f"{path.relative_to(run)}: {way}"


#: What acts on terminals, in HTML, in spreadsheets, in pictures, and on the order of letters.
EVIL = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e\u2066\nstreamfisher: all is well\r=cmd|' /C calc'!A0"
EVILS = (
    EVIL,
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "</title></table><iframe src=//x>",
    '=HYPERLINK("http://x")',
    "\t@SUM(1)",
    "$\\frac{1}{$ \\undefined{",
    "{{ 7 * 7 }}{% for x in y %}",
    "\ud800\udfff",
    "%s%n{0}{x.__class__}",
    "\u0000\u2028\u2029\ufeff",
)


def injection(run: Path, outside: Path, dice: random.Random) -> str:
    """Let what is shown of a run hold what would act where it is shown."""
    evil = dice.choice(EVILS)
    content = read_json(run / "manifest.json")
    content["model"]["class"] = evil
    content["loss"] |= {"loss": evil, "loss_reduction": evil}
    content["excluded"] = {evil: evil}
    content["data"] |= {"sample_unit": evil, "fingerprint": evil, "description": dice.choice([evil, {"data": evil}])}
    content["probe"] |= {"notes": [evil], "excluded": {evil: evil}}
    content["versions"] |= {evil: evil, "streamfisher": evil}
    content["parameters"][0]["dtype"] = evil
    for name in _MANIFESTS:
        write_sealed(run / name, content)
    line = {"event": "warning", "rank": evil, "stage": evil, "message": evil, "time": evil}
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(line | {"event": "failed"}) + "\n")
    first = next(iter(sorted((run / "done").glob("rows*.json"))))
    more = dice.choice(["nothing", "a skipped sample", "a damaged name", "an error"])
    if more == "a skipped sample":
        write_sealed(first, read_json(first) | {"skipped": {"0": evil}})
    elif more == "a damaged name":
        write_sealed(run / "done" / "fields.json", {"crc32c": {evil: 1}})
    elif more == "an error":
        write_sealed(run / "manifest.json", content | {"format_version": evil})
    return f"{evil!a}, {more}"


MAKERS: dict[str, Make] = {
    "contradiction in the manifest": manifest,
    "contradiction in a marker": marker,
    "contradiction between files": between,
    "injection": injection,
}
