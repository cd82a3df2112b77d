"""Per-sample losses: what one row of the gradient matrix is the gradient of.

A sample's loss is the negative log-likelihood of everything in it: the *sum* over its target tokens, never the mean,
because a mean scales each gradient by its sequence length and the Fisher is defined by the likelihood.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from streamfisher.config import LossName
from streamfisher.data.batches import IGNORED_LABEL
from streamfisher.errors import LossError
from streamfisher.models.calling import (
    base_model,
    batch_size,
    call_model,
    copied,
    find_logits,
    is_encoder_decoder,
    sample_of,
    scalar_loss,
    try_forward,
)
from streamfisher.models.expected_labels import by_root_of_probability
from streamfisher.models.sharding import class_of

REDUCTIONS = {
    "causal": "sum over target tokens of cross-entropy, targets shifted by one",
    "token": "sum over target tokens of cross-entropy, targets aligned with the logits",
    "classification": "cross-entropy of the sample's class",
    "regression": "Gaussian negative log-likelihood, 0.5 * ||y - f||^2",
    "model": "model",
    "user": "user",
}


@dataclass(frozen=True)
class PerSampleLoss:
    """A loss `(model, batch) -> (B,)` and how it was chosen.

    Raises:
        LossError: (when called) the loss has the wrong shape, labels are out of range, or a sample has no target; the
            exception's `samples` lists the offending samples by their index in the batch.
    """

    name: str  # 'causal' | 'token' | 'classification' | 'regression' | 'model' | 'user:<qualname>'
    reduction: str
    reason: str = ""  # why this loss was chosen
    function: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None  # the user's own
    labels_to_model: bool = False  # an encoder-decoder derives its decoder inputs from the labels
    leaves_batch: bool = False  # the function never writes into what it gets
    expected: bool = False  # gradients count by the root of the probability of what they are the likelihood of

    @property
    def sequential(self) -> bool:
        """Whether the loss can only be had one sample at a time (the model returns one scalar)."""
        return self.name == "model"

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the per-sample losses `(B,)`, in float32 at least."""
        n_samples = batch_size(batch)
        if self.function is not None:
            given = batch if self.leaves_batch else copied(batch)
            return _check_user_losses(self.function(model, given), n_samples, self.name)
        if self.sequential:
            return torch.stack([scalar_loss(model, sample_of(batch, i)) for i in range(n_samples)])
        return self.from_logits(self.logits(model, batch), batch)

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Return the model's logits (or means, for regression) on `batch`."""
        if self.labels_to_model and "decoder_input_ids" not in batch and "decoder_inputs_embeds" not in batch:
            output = call_model(model, {**batch, "labels": self.labels(batch).contiguous()}, drop=())
        else:
            output = call_model(model, batch)
        logits = find_logits(output)
        if logits is None:
            raise LossError(
                f"{type(model).__name__} returned no logits. Give a loss(model, batch) -> (B,) of your own."
            )
        return logits

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the labels of `batch`; they default to its `input_ids`."""
        labels = batch.get("labels")
        if labels is None:
            labels = batch.get("input_ids")
        if labels is None:
            raise LossError(_no_labels(batch))
        return labels if labels.is_floating_point() else labels.long()  # cross-entropy knows no other integers

    def from_logits(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the losses `(B,)` of already computed logits."""
        losses = self._from_logits(logits, batch)
        return by_root_of_probability(losses) if self.expected else losses

    def _from_logits(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        n_samples = batch_size(batch)
        if logits.dim() == 0 or logits.shape[0] != n_samples:
            raise LossError(
                f"The model returned logits of shape {tuple(logits.shape)} for a batch of {n_samples} samples: its "
                "forward ignores the batch axis, or puts it elsewhere. Per-sample losses need it first."
            )
        if self.name == "regression":
            labels = self.labels(batch).to(logits.device)
            return _gaussian(logits, labels)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.name == "classification":
            labels = self.labels(batch).reshape(n_samples)
            _check_targets(labels.unsqueeze(1), logits.shape[-1])
            return cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
        targets = self.targets(batch)
        if logits.dim() != 3 or logits.shape[1] != targets.shape[1]:
            raise LossError(
                f"Logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(targets.shape)} for the "
                f"{self.name!r} loss, which takes one label per logit. A loss of another kind (CTC, ...) is given as "
                "loss(model, batch) -> (B,), with reduction='none'; one that the model computes itself as loss='model'."
            )
        _check_targets(targets, logits.shape[-1])
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
        return losses.view(targets.shape).sum(1)

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the class that each logit is to predict `(B, T)`, -100 where there is none.

        For a causal loss the target at t is label t + 1, and the last position has none. Padding counts neither as a
        target nor as the position that predicts one, so that left padding changes nothing.
        """
        labels = self.labels(batch)
        if labels.dim() != 2 or labels.is_floating_point():
            raise LossError(
                f"The {self.name!r} loss needs integer labels (B, T), not {labels.dtype} of shape "
                f"{tuple(labels.shape)}."
            )
        mask = None if self.labels_to_model else batch.get("attention_mask")
        if self.labels_to_model:
            mask = batch.get("decoder_attention_mask")
        targets = labels.clone()
        if mask is not None and mask.shape == labels.shape:
            targets = targets.masked_fill(mask == 0, IGNORED_LABEL)
        if self.name == "causal":
            shifted = torch.full_like(targets, IGNORED_LABEL)
            shifted[:, :-1] = targets[:, 1:]
            targets = shifted
            if mask is not None and mask.shape == labels.shape:
                targets = targets.masked_fill(mask == 0, IGNORED_LABEL)
        return targets

    def n_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the number of target tokens of each sample, or 1 where a sample is one target: `(B,)` int64."""
        if self.name in ("causal", "token"):
            return (self.targets(batch) != IGNORED_LABEL).sum(1).to(torch.int64)
        return torch.ones(batch_size(batch), dtype=torch.int64)

    def of_every_class(self) -> PerSampleLoss:
        """Return the loss of samples of which each has one class, counted by the root of that class's probability.

        The gradients of all classes of an input then add up to its part of the exact Fisher:
        `sum_c p_c g_c g_c^T`, with `g_c` the gradient of `-log p_c`.

        Raises:
            LossError: the loss gives no probabilities of classes.
        """
        if self.name not in ("classification", "causal", "token"):
            what = {"regression": "a Gaussian, which has no classes"}.get(self.name, "no probabilities of classes")
            raise LossError(
                f"labels='expected' takes every class of a classifier, and the loss {self.name!r} is of {what}. Use "
                "labels='data', or a loss of classes: loss='classification', 'causal' or 'token'."
            )
        if self.labels_to_model:
            raise LossError(
                "labels='expected' changes the labels and not what the model sees, and this encoder-decoder makes its "
                "decoder's inputs of the labels. Use labels='data' or labels='model'."
            )
        reduction = "cross-entropy of one class, its gradient times the root of the class's probability"
        return replace(self, expected=True, reduction=reduction)

    def metadata(self) -> dict[str, Any]:
        """Return what a result must say about its loss, as plain JSON values."""
        return {"loss": self.name, "loss_reduction": self.reduction, "loss_reason": self.reason}


def resolve_loss(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss: LossName | Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
) -> PerSampleLoss:
    """Choose the per-sample loss once, from the model's class, its output on `batch`, and the labels.

    Args:
        model: anything callable by `call_model`; it is run once in eval mode, and its mode is restored.
        batch: a dict of batched tensors.
        loss: None to choose, the name of a loss, or a callable `(model, batch) -> (B,)`.

    Raises:
        LossError: no loss fits, or the name is unknown.
    """
    if isinstance(loss, PerSampleLoss):
        return loss
    if loss is not None and not isinstance(loss, str):
        if not callable(loss):
            raise LossError(f"loss={loss!r} must be a name or a callable (model, batch) -> per-sample losses (B,).")
        name = f"user:{getattr(loss, '__qualname__', type(loss).__qualname__)}"
        return PerSampleLoss(name, "user", "given by the user", loss)
    seq2seq = is_encoder_decoder(model)
    if loss is not None:
        if loss not in get_args(LossName):
            raise LossError(f"loss={loss!r} is unknown; choose one of {', '.join(get_args(LossName))} or a callable.")
        return PerSampleLoss(loss, REDUCTIONS[loss], "named by the user", labels_to_model=seq2seq and loss == "token")
    name, reason = _choose(model, batch, seq2seq)
    if name == "causal" and _moved_by_one(batch):
        warnings.warn(
            "the labels are the inputs moved by one, so that they are aligned with the logits already, and the loss "
            f"'causal' ({reason}) moves them once more. Give loss='token' (--loss token) if that is not meant.",
            stacklevel=2,
        )
    return PerSampleLoss(name, REDUCTIONS[name], reason, labels_to_model=seq2seq and name == "token")


def _choose(model: nn.Module, batch: Mapping[str, Any], seq2seq: bool) -> tuple[str, str]:
    """Return the name of the loss and the reason for choosing it."""
    class_name = class_of(base_model(model)).__name__
    labels = batch.get("labels")
    logits, has_scalar = try_forward(model, batch)
    if logits is None:
        if has_scalar:
            return "model", "the model returns only a scalar loss; it is taken one sample at a time"
        raise LossError(
            f"{class_name} returns neither logits nor a loss, so there is nothing to differentiate. Use a model with a "
            "head, or give a loss(model, batch) -> (B,) of your own."
        )
    inputs = batch.get("input_ids")
    if labels is None:
        if inputs is None:
            raise LossError(_no_labels(batch))
        if inputs.is_floating_point():
            if logits.shape[1:] == inputs.shape[1:]:
                return "regression", "float inputs without labels: the model is to reproduce its inputs"
            raise LossError(
                f"Float input_ids of shape {tuple(inputs.shape)} have no labels, and the output's shape "
                f"{tuple(logits.shape)} differs, so the labels cannot be the inputs. Add labels."
            )
        labels = inputs
    if labels.is_floating_point():
        per_sample = logits.numel() // logits.shape[0]
        if per_sample == 1 and labels.numel() > 1 and bool(((labels == 0) | (labels == 1)).all()):
            raise LossError(
                f"{class_name} has one output per sample and the first labels are only 0.0 and 1.0: that may be a "
                "classification by one logit or a regression. Give loss='regression', or for one logit a "
                "loss(model, batch) -> (B,) of binary_cross_entropy_with_logits(..., reduction='none')."
            )
        return "regression", "float labels"
    if logits.dim() == 2 and logits.shape[1] == 1 and labels.numel() == labels.shape[0] and bool((labels <= 1).all()):
        raise LossError(
            f"{class_name} has one output per sample and the labels are integers: cross-entropy of one class is zero. "
            "For a classification by one logit give a loss(model, batch) -> (B,) of "
            "binary_cross_entropy_with_logits(..., reduction='none'); for a regression make the labels floats."
        )
    if logits.dim() == 2 and labels.numel() == labels.shape[0]:
        return "classification", "one class per sample"
    if logits.dim() != 3 or labels.dim() != 2:
        raise LossError(
            f"No loss is known for an output of shape {tuple(logits.shape)} with labels of shape "
            f"{tuple(labels.shape)}. Give a loss(model, batch) -> (B,) of your own."
        )
    if seq2seq or class_name.endswith("ForConditionalGeneration"):
        return ("token", "encoder-decoder: labels are aligned with the decoder's logits") if seq2seq else _shifted()
    if class_name.endswith(("ForMaskedLM", "ForTokenClassification", "ForPreTraining")):
        return "token", f"{class_name} predicts the token at its own position"
    if class_name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal", f"{class_name} predicts the next token"
    if getattr(base_model(model), "is_causal", False) is True:
        return "causal", "the model says is_causal"
    if getattr(getattr(base_model(model), "config", None), "is_decoder", False) is True:
        return "causal", "the model's config says is_decoder"
    if inputs is not None and inputs.shape == labels.shape:
        same = (labels == inputs) | (labels == IGNORED_LABEL)
        if bool(same.all()):
            return _shifted()
    return "token", "labels differ from the inputs: aligned with the logits"


def _no_labels(batch: Mapping[str, Any]) -> str:
    return (
        f"The batch has neither labels nor input_ids, only {', '.join(batch)}. Call the targets 'labels' and token ids "
        "'input_ids', or give a loss(model, batch) -> (B,) of your own."
    )


def _moved_by_one(batch: Mapping[str, Any]) -> bool:
    """Return whether every label is the next position's input: `labels[t] = input_ids[t + 1]`."""
    inputs, labels = batch.get("input_ids"), batch.get("labels")
    if inputs is None or labels is None or inputs.shape != labels.shape or inputs.dim() != 2:
        return False
    now, following, own = labels[:, :-1], inputs[:, 1:], inputs[:, :-1]
    counts = now != IGNORED_LABEL
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == labels.shape:
        counts = counts & (mask[:, 1:] != 0)
    return bool(counts.any() and (now == following)[counts].all() and not (now == own)[counts].all())


def _shifted() -> tuple[str, str]:
    return "causal", "labels are the inputs: shifted by one"


def _gaussian(mean: Tensor, labels: Tensor) -> Tensor:
    n_samples = mean.shape[0]
    mean, labels = mean.reshape(n_samples, -1), labels.reshape(n_samples, -1)
    if mean.shape != labels.shape:
        raise LossError(
            f"Labels with {labels.shape[1]} values per sample do not fit an output with {mean.shape[1]} for the "
            "'regression' loss. Make them equal, or choose another loss."
        )
    dtype = torch.promote_types(mean.dtype, torch.float32)
    return 0.5 * (labels.to(dtype) - mean.to(dtype)).pow(2).sum(1)


def _check_targets(targets: Tensor, n_classes: int) -> None:
    """Raise `LossError` for samples without a target and for labels that are no class."""
    valid = targets != IGNORED_LABEL
    empty = (~valid.any(1)).nonzero().flatten().tolist()
    if empty:
        raise _sample_error(f"Sample {_list(empty)} of the batch has no target: every label is masked.", empty)
    wrong = valid & ((targets < 0) | (targets >= n_classes))
    if wrong.any():
        samples = wrong.any(1).nonzero().flatten().tolist()
        raise _sample_error(
            f"Label {int(targets[wrong][0])} in sample {_list(samples)} of the batch is not one of {n_classes} "
            f"classes (0 to {n_classes - 1}, or {IGNORED_LABEL} for none).",
            samples,
        )


def _sample_error(message: str, samples: list[int]) -> LossError:
    return LossError(message, samples)


def _list(samples: list[int]) -> str:
    return ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")


def _check_user_losses(losses: Any, n_samples: int, name: str) -> Tensor:
    if not isinstance(losses, Tensor):
        raise LossError(f"The loss {name!r} returned {type(losses).__name__}; it must return a tensor ({n_samples},).")
    if losses.shape != (n_samples,):
        hint = " A mean or sum over the batch loses the samples: use reduction='none'." if losses.numel() == 1 else ""
        raise LossError(
            f"The loss {name!r} returned shape {tuple(losses.shape)}; one value per sample, ({n_samples},), is "
            f"needed.{hint}"
        )
    if not losses.is_floating_point():
        raise LossError(f"The loss {name!r} returned {losses.dtype}; it must be a floating dtype.")
    return losses
