"""Which classes of each input are the samples of a run with labels='expected', and what probability that leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from streamfisher.byte_sizes import format_bytes
from streamfisher.collection.padding import lengths_of, numbered
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import IGNORED_LABEL, collate, make_units, sequence_length
from streamfisher.data.classes import ClassSamples, inputs_of
from streamfisher.data.samples import Samples
from streamfisher.errors import CapacityError, ConfigError, CorruptRunError
from streamfisher.models.batches import ModelBatches
from streamfisher.models.kept_tensors import KeptTensors
from streamfisher.models.losses import PerSampleLoss
from streamfisher.models.offload import to_model
from streamfisher.runtime.memory import working_memory
from streamfisher.store import RunStore
from streamfisher.store.names import node_name


@dataclass(frozen=True)
class ClassChoice:
    """The classes of every input that a run takes."""

    classes: np.ndarray  # (n, k) int64, ascending in each row
    left_out: np.ndarray  # (n,) float64: the probability of an input's other classes
    n_classes: int  # C, of the model

    def samples(self, inputs: Samples) -> Samples:
        """Return one sample for each of the classes of each input."""
        return Samples(ClassSamples(inputs, self.classes))

    @property
    def inputs(self) -> np.ndarray:
        """Return the number of the input of each sample: (n k,) int64."""
        return inputs_of(np.arange(self.classes.size), self.classes.shape[1])

    def whole_inputs(self, config: SpectralConfig) -> int:
        """Return the chunk size, rounded up to whole inputs where one is not larger than it."""
        k, chunk_size = self.classes.shape[1], config.chunk_size
        return chunk_size if k > chunk_size else -(-chunk_size // k) * k

    def fields(self) -> dict[str, np.ndarray]:
        """Return what a run stores of each sample: its input, its class, what its input leaves out."""
        inputs = self.inputs
        return {
            "input": inputs.astype(np.float64),
            "class": self.classes.reshape(-1).astype(np.float64),
            "left_out": self.left_out[inputs],
        }

    def facts(self) -> dict[str, Any]:
        """Return what the manifest says of them."""
        return {
            "n_inputs": len(self.classes),
            "classes_per_input": self.classes.shape[1],
            "n_classes": self.n_classes,
            "left_out_probability": {"mean": float(self.left_out.mean()), "largest": float(self.left_out.max())},
        }


def choose_classes(
    model: nn.Module,
    inputs: Samples,
    loss: PerSampleLoss,
    config: SpectralConfig,
    known: tuple[np.ndarray, np.ndarray] | None = None,
) -> ClassChoice:
    """Return all classes of every input, or those that the model finds most probable.

    Args:
        model: on its device; for the most probable classes it is run once over the inputs.
        inputs: with one target each.
        loss: of classes.
        config: `classes_per_sample`; `memory_budget`, `batch_tokens` and `chunk_size` of the pass.
        known: classes (n, k) and left-out probabilities (n,) of the first inputs, as a run has stored them: what rounds
            otherwise elsewhere must not choose others.

    Raises:
        ConfigError: there are fewer classes than are asked for, or the most probable ones of a model that is not whole.
        CapacityError: the Gram of so many samples does not fit the memory.
    """
    logits = _logits(model, loss, to_model(collate([inputs[0]]), model))
    n_classes = logits.shape[-1]
    k = n_classes if config.classes_per_sample is None else config.classes_per_sample
    if k > n_classes:
        raise ConfigError(
            f"classes_per_sample={k} and the model has {n_classes} classes; leave it out to take them all."
        )
    _require_memory(len(inputs), k, n_classes, config)
    if k == n_classes:
        return ClassChoice(np.tile(np.arange(k), (len(inputs), 1)), np.zeros(len(inputs)), n_classes)
    if known is not None and len(known[0]) >= len(inputs):
        return ClassChoice(known[0][: len(inputs)], known[1][: len(inputs)], n_classes)
    if logits.is_meta:
        raise ConfigError(
            f"classes_per_sample={k} takes the most probable classes from a pass over the inputs, and this model's "
            "weights are not in memory. Leave it out, or use a machine that holds the model."
        )
    choice = _most_probable(model, inputs, loss, config, k, n_classes)
    if known is not None:
        choice.classes[: len(known[0])], choice.left_out[: len(known[1])] = known
    return choice


def stored_classes(store: RunStore) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the classes that a run has stored of its inputs, and the probability that they leave out, or `None`.

    Raises:
        CorruptRunError: they are not what was written.
    """
    k = store.manifest.data.get("classes_per_input")
    folders = [store.path / "fields" / node_name(name) for name in ("class", "left_out")]
    if k is None or not all((folder / "zarr.json").is_file() for folder in folders):
        return None
    classes, left_out = (store.samples.read_field(folder)[1] for folder in folders)
    if len(classes) != store.n_samples or len(left_out) != len(classes) or len(classes) % k:
        raise CorruptRunError(f"{store.path}: the classes of its samples are not what was written.")
    return classes.astype(np.int64).reshape(-1, k), left_out[::k].copy()


def _logits(model: nn.Module, loss: PerSampleLoss, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of the one target of each sample of a batch in eval mode: (B, C) float64."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), KeptTensors(model).held():
            logits = loss.logits(model, batch)
    finally:
        for module, mode in modes:
            module.training = mode
    if loss.name == "classification" or logits.is_meta:
        return logits.double()
    places = (loss.targets(batch) != IGNORED_LABEL).int().argmax(dim=1)
    return logits[torch.arange(len(logits), device=logits.device), places.to(logits.device)].double()


def _most_probable(
    model: nn.Module, inputs: Samples, loss: PerSampleLoss, config: SpectralConfig, k: int, n_classes: int
) -> ClassChoice:
    axes = [lengths_of(inputs[index]) for index in range(len(inputs))]
    lengths = [sequence_length(inputs[index]) or 1 for index in range(len(inputs))]
    units = make_units(len(inputs), config.chunk_size)
    # Inputs of different shapes are kept apart, so that no padding has a say.
    batches = ModelBatches(model, inputs, lengths, units, config.batch_tokens, loss=loss, apart=numbered(axes))
    classes, left_out = np.empty((len(inputs), k), dtype=np.int64), np.empty(len(inputs))
    for batch in batches:
        probabilities = _logits(model, loss, batches[batch]).softmax(-1)
        largest, which = probabilities.topk(k)
        classes[batch.start : batch.stop] = np.sort(which.cpu().numpy(), axis=1)
        left_out[batch.start : batch.stop] = (1.0 - largest.sum(-1)).clamp_min(0.0).cpu().numpy()
    return ClassChoice(classes, left_out, n_classes)


def _require_memory(n_inputs: int, k: int, n_classes: int, config: SpectralConfig) -> None:
    """Refuse more samples than a Gram in memory has room for, before they are looked at one by one."""
    budget = working_memory(config.memory_budget)
    needed = 8 * (n_inputs * k) ** 2
    if needed <= budget:
        return
    fits = int((budget / 8) ** 0.5) // n_inputs
    remedy = f"--classes-per-sample {fits} fits" if fits else "take fewer samples, or --classes-per-sample 1"
    raise CapacityError(
        f"labels='expected' makes {n_inputs * k:,} samples of {n_inputs:,} inputs and {k:,} of {n_classes:,} classes: "
        f"one Gram of them needs {format_bytes(needed)} in memory and the budget is {format_bytes(budget)}; {remedy}."
    )


def every_class_of(
    model: nn.Module,
    inputs: Samples,
    loss: PerSampleLoss,
    config: SpectralConfig,
    sequence_of: Sequence[int] | np.ndarray,
    known: tuple[np.ndarray, np.ndarray] | None,
) -> tuple[Samples, PerSampleLoss, np.ndarray, ClassChoice]:
    """Return the samples of labels='expected', their loss, the given sample that each is of, and their classes.

    Raises:
        LossError: the loss is not of classes.
        ConfigError: the loss is of a sequence's tokens together; or as `choose_classes`.
        CapacityError: as `choose_classes`.
    """
    of_classes = loss.of_every_class()
    if loss.name != "classification" and config.sample_unit != "token":
        raise ConfigError(
            f"labels='expected' takes the classes of one prediction, and the loss {loss.name!r} is of all tokens of a "
            "sequence: the Fisher of a sequence is the sum of those of its tokens. Give sample_unit='token', with "
            "tokens_per_sequence for a seeded subset of positions and classes_per_sample for the most probable tokens "
            "(--sample-unit token --tokens-per-sequence 4 --classes-per-sample 16)."
        )
    choice = choose_classes(model, inputs, loss, config, known)
    return choice.samples(inputs), of_classes, np.asarray(sequence_of)[choice.inputs], choice
