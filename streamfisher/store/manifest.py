"""What a run was made of: settings, model, data and layout, so that only its like can resume it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from streamfisher.errors import CorruptRunError
from streamfisher.store.integrity import check_manifest

FORMAT = "streamfisher-run"
FORMAT_VERSION = 3
#: Bytes: a hundred thousand parameters and a million samples take less. Parsed, a byte may take twenty.
LARGEST_MANIFEST = 64 << 20
#: Version 1 knew rows only, one pass, and a Gram for each parameter, version 2 no packs: what a run without those keys
#: has.
_READ_VERSIONS = (1, 2, 3)


#: What a sample is for: a query has weight zero in every spectrum, and is what training samples are held against.
Role = Literal["train", "query"]


@dataclass(frozen=True)
class Manifest:
    """The facts of a run, all plain JSON values; written once, last of all at creation."""

    config: dict[str, Any]  # every option as it was when the run was created
    identity: dict[str, Any]  # the options that decide stored bits
    model: dict[str, Any]  # class, fingerprint, n_params
    parameters: list[dict[str, Any]]  # captured: name, shape, dtype, columns and those of a chunk; in the model's order
    excluded: dict[str, str]  # parameter name -> why it is not captured
    data: dict[str, Any]  # n_samples, what N counts, chunk digests
    loss: dict[str, Any]  # which loss, and how it reduces
    layout: dict[str, Any]  # rows per chunk, dtypes, codec; waves, representation and Grams of the parameters
    probe: dict[str, Any]  # which rule serves which parameter, coverage, worst error
    versions: dict[str, str] = field(default_factory=dict)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values, which are the manifest's own: not to be changed."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    @property
    def names(self) -> list[str]:
        """Return the names of the captured parameters, in the model's order."""
        return [item["name"] for item in self.parameters]

    @property
    def waves(self) -> list[list[str]]:
        """Return the parameters of each wave."""
        return self.layout.get("waves") or [self.names]

    @property
    def gram_members(self) -> dict[str, list[str]]:
        """Return the parameters that each Gram sums over."""
        return self.layout.get("grams") or {name: [name] for name in self.names}

    def representation(self, name: str) -> str:
        """Return how a parameter's gradients are held: 'dense' or 'factors'."""
        return self.layout.get("representation", {}).get(name, "dense")

    def facts(self) -> dict[str, Any]:
        """Return what ranks must agree on, by short names."""
        return {
            **{f"setting {key}": value for key, value in self.identity.items()},
            "number of samples": self.data["n_samples"],
            "data": self.data["fingerprint"],
            "model class": self.model["class"],
            "model fingerprint": self.model["fingerprint"],
            "parameters": [item["name"] for item in self.parameters],
            "loss": self.loss,
            "versions": self.versions,
        }

    @classmethod
    def from_dict(cls, values: Any) -> Manifest:
        """Read a manifest back.

        Raises:
            CorruptRunError: it is of another format, another version, or lacks a field.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise CorruptRunError("manifest.json is not the manifest of a streamfisher run.")
        if values.get("format_version") not in _READ_VERSIONS:
            raise CorruptRunError(
                f"the run has format version {values.get('format_version')!r} and this version of streamfisher reads "
                f"{', '.join(map(str, _READ_VERSIONS))}; use the version that wrote it "
                f"({_version_of(values)})."
            )
        names = {item.name for item in dataclasses.fields(cls)}
        missing = names - values.keys()
        if missing:
            raise CorruptRunError(f"manifest.json lacks {', '.join(sorted(missing))}.")
        check_manifest(values)
        return cls(**{name: values[name] for name in names})


def _version_of(values: Mapping[str, Any]) -> Any:
    found = values.get("versions")
    return found.get("streamfisher") if isinstance(found, dict) else None


def with_new_samples_as(role: Role, now: Manifest, stored: Manifest | None) -> Manifest:
    """Return the manifest of a run that grows, with which of its samples are queries: `data['queries']`, as ranges.

    Args:
        role: of the samples that the run has not yet.
        now: of the work that is asked for.
        stored: of the run; `None`: it is made now.
    """
    queries = [] if stored is None else list(stored.data.get("queries", []))
    known = 0 if stored is None else stored.data["n_samples"]
    if role == "query" and now.data["n_samples"] > known:
        queries.append([known, now.data["n_samples"]])
    return dataclasses.replace(now, data={**now.data, "queries": queries}) if queries else now


def columns_of(item: Mapping[str, Any]) -> int:
    """Return the numbers of a stored row of one of a manifest's parameters: P, or fewer where rows are projected."""
    return int(item.get("columns", math.prod(item["shape"])))


def differences(stored: Manifest, now: Manifest) -> list[str]:
    """Return in words what keeps `now` from resuming the run `stored`; empty where nothing does."""
    found = []
    for key, value in now.identity.items():
        before = stored.identity.get(key)
        if before != value:
            found.append(f"setting {key}: {before!r} in the run, {value!r} now")
    if stored.model["class"] != now.model["class"]:
        found.append(f"model class: {stored.model['class']} in the run, {now.model['class']} now")
    before, after = _shapes(stored), _shapes(now)
    for name in {**before, **after}:
        if before.get(name) != after.get(name):
            found.append(f"parameter {name}: {before.get(name, 'absent')} in the run, {after.get(name, 'absent')} now")
    if len(found) == 0 and stored.model["fingerprint"] != now.model["fingerprint"]:
        found.append(
            "model: the same parameters with other values "
            f"(fingerprint {stored.model['fingerprint'][:12]} in the run, {now.model['fingerprint'][:12]} now)"
        )
    found += _data_differences(stored.data, now.data)
    for key, value in now.loss.items():
        if stored.loss.get(key) != value:
            found.append(f"loss {key}: {stored.loss.get(key)!r} in the run, {value!r} now")
    return found


def _data_differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if stored["n_samples"] != now["n_samples"]:
        return [f"number of samples: {stored['n_samples']} in the run, {now['n_samples']} now"]
    for index, (before, after) in enumerate(zip(stored["chunk_digests"], now["chunk_digests"], strict=False)):
        if before != after:
            start = index * stored["chunk_size"]
            last = min(start + stored["chunk_size"], stored["n_samples"]) - 1
            return [f"data: samples {start} to {last} have other contents (first difference)"]
    return []


def _shapes(manifest: Manifest) -> dict[str, str]:
    return {item["name"]: f"{tuple(item['shape'])} {item['dtype']}" for item in manifest.parameters}
