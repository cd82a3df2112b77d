"""One look at all samples before the first gradient: the loss they need, what N counts, their lengths and contents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from streamfisher.collection.classes import ClassChoice, every_class_of
from streamfisher.collection.masks import Masks, check_masks
from streamfisher.collection.padding import lengths_of, numbered, padding_changes
from streamfisher.config import SpectralConfig
from streamfisher.data.batches import Unit, collate, make_units, sequence_length
from streamfisher.data.samples import Samples, TokenSamples, add_contents, check_unchanged, sample_digest
from streamfisher.data.snippets import snippets
from streamfisher.data.tokenizing import Tokenizer, numbers_of, tokenizer_of
from streamfisher.errors import ConfigError, DataError, LossError, ModelError, StreamfisherError
from streamfisher.gradients import GradientEngine, select_parameters
from streamfisher.gradients.modes import check_modes
from streamfisher.gradients.probe import PROBE_SAMPLES
from streamfisher.models.batches import ModelBatches
from streamfisher.models.kept_tensors import KeptTensors
from streamfisher.models.losses import PerSampleLoss, resolve_loss
from streamfisher.models.offload import to_model
from streamfisher.models.own_loss import reproducing
from streamfisher.models.positions import LongestSequence
from streamfisher.models.tokenizers import check_bytes


@dataclass(frozen=True)
class RunData:
    """The samples of a run and what is fixed about them before it starts; the same on every rank."""

    samples: Samples  # numbered 0 to N - 1, one per token where the unit is the token
    loss: PerSampleLoss
    lengths: list[int]  # tokens of each sample; 1 where it is no sequence
    chunk_digests: list[str]  # SHA-256 of the contents of each unit
    n_sequences: int | None  # how many sequences the tokens come from; None unless the unit is the token
    sample_digests: list[bytes]  # of the contents of each sample, compared whenever it is read again
    fields: dict[str, np.ndarray] = field(default_factory=dict)  # name -> (N,) float64: scalars that every sample has
    shapes: list[int] = field(default_factory=list)  # the same number for samples that need no padding to share a batch
    kept_apart: bool | None = None  # whether only such share one, see `padding`; None: all need no padding
    tokenizer: Tokenizer | None = None  # by which text became token ids, where that is known
    classes: ClassChoice | None = None  # of labels='expected': each sample is one class of an input
    texts: list[str] | None = None  # what each sample says, where that is to be stored

    @property
    def apart(self) -> list[int] | None:
        """Numbers of the samples, of which those with different ones never share a batch; `None`: any may."""
        return self.shapes if self.kept_apart else None

    def settled(self, config: SpectralConfig) -> SpectralConfig:
        """Return the config with units of whole inputs, so that a forward pass serves all classes of an input."""
        return config if self.classes is None else config.replace(chunk_size=self.classes.whole_inputs(config))

    def sample_unit(self, config: SpectralConfig) -> str:
        """Return what N counts: 'sequence', 'token', or 'example' for samples that are no sequences."""
        if config.sample_unit == "sequence" and sequence_length(self.samples[0]) is None:
            return "example"
        return config.sample_unit

    def batches(
        self, model: nn.Module, config: SpectralConfig, batch_tokens: int | None = None, units: Sequence[Unit] = ()
    ) -> ModelBatches:
        """Return the batches of a run of these samples.

        Args:
            model: on whose device and in whose dtype they are.
            config: of the run.
            batch_tokens: padded tokens of one batch; `None`: the config's.
            units: whose batches; empty: of all samples.
        """
        return ModelBatches(
            model,
            self.samples,
            self.lengths,
            units or make_units(len(self.samples), config.chunk_size),
            batch_tokens or config.batch_tokens,
            loss=self.loss,
            label_seed=config.seed if config.labels == "model" else None,
            apart=self.apart,
            digests=self.sample_digests,
            per_input=1 if self.classes is None else self.classes.classes.shape[1],
        )

    def data_manifest(self, config: SpectralConfig, description: str | Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the manifest's entry about the data."""
        facts: dict[str, Any] = {
            "n_samples": len(self.samples),
            "sample_unit": self.sample_unit(config),
            "chunk_size": config.chunk_size,
            "chunk_digests": self.chunk_digests,
            "fingerprint": hashlib.sha256("".join(self.chunk_digests).encode()).hexdigest(),
            "description": description,
            **({} if self.tokenizer is None else {"tokenizer": self.tokenizer.facts()}),
            **({} if self.classes is None else self.classes.facts()),
        }
        return facts if self.n_sequences is None else facts | {"n_sequences": self.n_sequences}


def survey(
    model: nn.Module,
    source: Any,
    config: SpectralConfig,
    loss: Callable[..., Tensor] | None = None,
    n_samples: int | None = None,
    kept_apart: bool | None = None,
    known_classes: tuple[np.ndarray, np.ndarray] | None = None,
) -> RunData:
    """Number the samples, choose the loss, and check that every sample has something to predict.

    Args:
        model: on its device.
        source: samples in any form that `Samples` takes.
        config: `max_length`, `sample_unit`, `chunk_size` and `loss` count here.
        loss: the user's own `(model, batch) -> (B,)`; `None` means `config.loss`, or a choice.
        n_samples: how many to use, from the first (sequences, where the unit is the token).
        kept_apart: what a run that is resumed has found; `None`: it is to be found out.
        known_classes: of a run that is resumed, see `choose_classes`.

    Raises:
        DataError: there are fewer than 2 samples, or one has no target token; the message names it.
        ModelError: it has no parameters to capture, or some without values; or it cannot be run on the samples.
        LossError: no loss fits the model's output and the labels.
        ConfigError: token samples are asked for where the loss has no tokens.
        CapacityError: labels='expected' makes more samples than a Gram in memory has room for.
    """
    samples = given = Samples(source, n_samples, config.max_length)
    if len(samples) < 2 and config.sample_unit != "token" and config.labels != "expected":
        raise DataError(f"{len(samples)} sample was given; a spectrum needs at least 2.")
    tokenizer, numbers = tokenizer_of(samples.source), numbers_of(samples.source)
    check_bytes(model, tokenizer)
    select_parameters(model, config.include, config.exclude)  # a model that cannot be captured is not run first
    check_modes(model)
    probed = [samples[index] for index in range(min(PROBE_SAMPLES, len(samples)))]
    longest = LongestSequence(model)
    for index, sample in enumerate(probed):
        longest.note(index, sequence_length(sample))
    first = collate(probed)
    try:
        on_device = to_model(first, model)
        with KeptTensors(model).held():
            chosen = resolve_loss(model, on_device, loss if loss is not None else config.loss)
            chosen = reproducing(model, on_device, chosen)
    except StreamfisherError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        raise ModelError(
            f"the model cannot be run on sample 0: {type(error).__name__}: {error}. Its forward must take what the "
            "samples hold, and token ids must lie in its vocabulary; --debug shows where it failed."
        ) from error
    n_sequences = None
    sequence_of = np.arange(len(samples))
    if config.sample_unit == "token":
        if chosen.name not in ("causal", "token"):
            raise ConfigError(
                f"sample_unit='token' needs a token-wise loss of streamfisher's own; the loss here is {chosen.name!r}."
            )
        n_sequences = len(samples)
        tokens = TokenSamples(
            samples,
            shifted=chosen.name == "causal",
            per_sequence=config.tokens_per_sequence,
            seed=config.seed,
        )
        samples, sequence_of = Samples(tokens), np.array([sequence for sequence, _ in tokens.targets])
        if len(samples) < 2:
            raise DataError("the data holds 1 target token; a spectrum needs at least 2.")
    texts = None
    if config.store_text is not None:
        texts = snippets(given, samples, sequence_of.tolist(), config.store_text, tokenizer)
    classes = None
    if config.labels == "expected":
        samples, chosen, sequence_of, classes = every_class_of(
            model, samples, chosen, config, sequence_of, known_classes
        )
        config = config.replace(chunk_size=classes.whole_inputs(config))
        texts = None if texts is None else [texts[number] for number in classes.inputs]
    units = make_units(len(samples), config.chunk_size)
    lengths, scalars, digests, axes, masks = [], [], [], [], Masks()
    for index in range(len(samples)):
        sample = samples[index]
        lengths.append(sequence_length(sample) or 1)
        longest.note(index, lengths[-1])
        digests.append(sample_digest(sample))
        axes.append(lengths_of(sample))
        masks.note(index, sample)
        _require_targets(chosen, sample, index)
        scalars.append({key: float(value) for key, value in sample.items() if value.ndim == 0})
    longest.warn()
    fields = {key: np.array([values[key] for values in scalars]) for key in _common_keys(scalars)}
    fields |= {key: np.array(values, dtype=np.float64)[sequence_of] for key, values in numbers.items()}
    fields |= {} if classes is None else classes.fields()
    chunk_digests = [_read_again(samples, unit, digests) for unit in units]
    engine = GradientEngine(
        model, chosen, include=config.include, exclude=config.exclude, deterministic=config.use_deterministic
    )
    check_masks(engine, samples, masks)
    if kept_apart is None:
        budget = None if config.memory_budget is None else int(config.memory_budget)
        kept_apart = padding_changes(engine, samples, axes, budget)
    shapes = numbered(axes)
    return RunData(
        samples,
        chosen,
        lengths,
        chunk_digests,
        n_sequences,
        digests,
        fields,
        shapes,
        kept_apart,
        tokenizer,
        classes,
        texts,
    )


def _read_again(samples: Samples, unit: Unit, digests: Sequence[bytes]) -> str:
    """Return the digest of a unit, read for the second time; its samples must be what they were."""
    whole = hashlib.sha256()
    for index in range(unit.start, unit.stop):
        sample = samples[index]
        check_unchanged(index, sample, digests[index])
        add_contents(whole, sample)
    return whole.hexdigest()


def _common_keys(scalars: list[dict[str, float]]) -> list[str]:
    return [key for key in scalars[0] if all(key in values for values in scalars)]


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
