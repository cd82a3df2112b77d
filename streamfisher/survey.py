"""One look at all samples before the first gradient: the loss they need, what N counts, their lengths and contents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from streamfisher.config import SpectralConfig
from streamfisher.errors import ConfigError, DataError, LossError
from streamfisher.losses import PerSampleLoss, resolve_loss
from streamfisher.samples import Samples, TokenSamples, collate, make_units, sequence_length

#: The probe takes this many samples: a third tells a batch axis from an axis that happens to have size 2.
PROBE_SAMPLES = 3


@dataclass(frozen=True)
class Survey:
    """What is fixed before a run starts; the same on every rank."""

    samples: Samples  # numbered 0 to N - 1, one per token where the unit is the token
    loss: PerSampleLoss
    lengths: list[int]  # tokens of each sample; 1 where it is no sequence
    chunk_digests: list[str]  # SHA-256 of the contents of each unit
    n_sequences: int | None  # how many sequences the tokens come from; None unless the unit is the token

    def sample_unit(self, config: SpectralConfig) -> str:
        """Return what N counts: 'sequence', 'token', or 'example' for samples that are no sequences."""
        if config.sample_unit == "sequence" and sequence_length(self.samples[0]) is None:
            return "example"
        return config.sample_unit

    def data_manifest(self, config: SpectralConfig, description: str | None) -> dict[str, Any]:
        """Return the manifest's entry about the data."""
        facts: dict[str, Any] = {
            "n_samples": len(self.samples),
            "sample_unit": self.sample_unit(config),
            "chunk_size": config.chunk_size,
            "chunk_digests": self.chunk_digests,
            "fingerprint": hashlib.sha256("".join(self.chunk_digests).encode()).hexdigest(),
            "description": description,
        }
        return facts if self.n_sequences is None else facts | {"n_sequences": self.n_sequences}


def survey(
    model: nn.Module,
    source: Any,
    config: SpectralConfig,
    loss: Callable[..., Tensor] | None = None,
    n_samples: int | None = None,
) -> Survey:
    """Number the samples, choose the loss, and check that every sample has something to predict.

    Args:
        model: on its device.
        source: samples in any form that `Samples` takes.
        config: `max_length`, `sample_unit`, `chunk_size` and `loss` count here.
        loss: the user's own `(model, batch) -> (B,)`; `None` means `config.loss`, or a choice.
        n_samples: how many to use, from the first (sequences, where the unit is the token).

    Raises:
        DataError: there are fewer than 2 samples, or one has no target token; the message names it.
        LossError: no loss fits the model's output and the labels.
        ConfigError: token samples are asked for where the loss has no tokens.
    """
    samples = Samples(source, n_samples, config.max_length)
    if len(samples) < 2 and config.sample_unit != "token":
        raise DataError(f"{len(samples)} sample was given; a spectrum needs at least 2.")
    first = collate([samples[index] for index in range(min(PROBE_SAMPLES, len(samples)))])
    chosen = resolve_loss(model, to_model(first, model), loss if loss is not None else config.loss)
    n_sequences = None
    if config.sample_unit == "token":
        if chosen.name not in ("causal", "token"):
            raise ConfigError(
                f"sample_unit='token' needs a token-wise loss of streamfisher's own; the loss here is {chosen.name!r}."
            )
        n_sequences = len(samples)
        samples = Samples(TokenSamples(samples, shifted=chosen.name == "causal"))
        if len(samples) < 2:
            raise DataError("the data holds 1 target token; a spectrum needs at least 2.")
    units = make_units(len(samples), config.chunk_size)
    lengths = []
    for index in range(len(samples)):
        sample = samples[index]
        lengths.append(sequence_length(sample) or 1)
        _require_targets(chosen, sample, index)
    return Survey(samples, chosen, lengths, [samples.digest(unit) for unit in units], n_sequences)


def to_model(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the batch on the model's device, floating inputs in the model's dtype."""
    parameter = next(iter(model.parameters()), None)
    if parameter is None:
        return batch
    dtype = parameter.dtype if parameter.is_floating_point() else None
    return {
        key: value.to(parameter.device, dtype if value.is_floating_point() else None, non_blocking=True)
        for key, value in batch.items()
    }


def _require_targets(loss: PerSampleLoss, sample: dict[str, Tensor], index: int) -> None:
    try:
        count = int(loss.n_targets(collate([sample]))[0])
    except LossError as error:
        raise DataError(f"sample {index}: {error}") from error
    if count > 0:
        return
    length = sequence_length(sample)
    if length is not None and length < 2 and loss.name == "causal":
        raise DataError(
            f"sample {index} is a sequence of {length} token; a causal model predicts the next token, so it needs 2."
        )
    raise DataError(f"all labels of sample {index} are masked; it has nothing to predict. Leave it out.")


def probe_batch(found: Survey) -> dict[str, Tensor]:
    """Return the first samples as a batch, with one of another length among them where the data has one."""
    count = min(PROBE_SAMPLES, len(found.samples))
    numbers = list(range(count))
    same = len({found.lengths[number] for number in numbers}) == 1
    if same:
        other = next((n for n in range(count, len(found.samples)) if found.lengths[n] != found.lengths[0]), None)
        if other is not None:
            numbers[-1] = other
    return collate([found.samples[number] for number in numbers])
