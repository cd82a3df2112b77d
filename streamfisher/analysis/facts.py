"""The facts that every result of a run carries: what N counts, what was left out, and of what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamfisher.config import SpectralConfig
from streamfisher.store import Manifest

#: Of runs with labels='expected': N counts classes of inputs.
_OF_CLASSES = ("n_inputs", "classes_per_input", "n_classes", "left_out_probability")


def describe(
    manifest: Manifest, config: SpectralConfig, *, n_stored: int, n_targets: int, skipped: Mapping[int, str]
) -> dict[str, Any]:
    """Return the facts that every result carries, as plain JSON values.

    Args:
        manifest: of the run.
        config: options of the analysis.
        n_stored: samples that were asked for, skipped ones included.
        n_targets: target tokens of the valid samples.
        skipped: sample number -> why it does not count.
    """
    return {
        "n_samples_stored": n_stored,
        "n_target_tokens": n_targets,
        **{key: manifest.data[key] for key in ("sample_unit", "n_sequences", *_OF_CLASSES) if key in manifest.data},
        **{key: manifest.config[key] for key in ("tokens_per_sequence",) if manifest.config.get(key) is not None},
        "labels": manifest.config["labels"],
        **{key: manifest.loss[key] for key in ("loss", "loss_reduction", "loss_reason") if key in manifest.loss},
        "model_mode": "eval",
        "skipped_samples": {str(sample): reason for sample, reason in skipped.items()},
        "excluded_parameters": dict(manifest.excluded),
        **projection_facts(manifest),
        "coverage_parameters": manifest.probe.get("coverage_parameters"),
        "coverage_squared_norm": manifest.probe.get("coverage_norm"),
        "dtype_model": ", ".join(sorted({item["dtype"] for item in manifest.parameters})),
        "dtype_row": manifest.layout["dtype_row"],
        "dtype_store": manifest.layout["dtype_store"],
        "stored_centered": manifest.layout["centered"],
        "model": dict(manifest.model),
        "data_fingerprint": manifest.data["fingerprint"],
        "seed": config.seed,
        "collected_with": dict(manifest.versions),
    }


def projection_facts(manifest: Manifest) -> dict[str, Any]:
    """Return what every result of a projected run says about it; nothing for an exact run."""
    if manifest.config.get("project") is None:
        return {}
    n_projected = sum("columns" in item for item in manifest.parameters)
    facts = {"numbers": manifest.config["project"], "seed": manifest.config["seed"], "parameters": n_projected}
    return {"projection": facts}
