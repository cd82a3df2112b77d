"""Calling any model with a batch, and finding in its output what a loss is made of."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.errors import DataError, LossError


def call_model(model: nn.Module, batch: Mapping[str, Any], *, drop: Sequence[str] = ("labels",)) -> Any:
    """Call `model` with what its forward accepts of `batch`.

    Keywords that forward names are given by name, others only if it takes `**kwargs`. A forward without `input_ids`
    gets them as its first argument; if it names nothing of the batch, it gets the batch's first tensor. Key-value
    caches are switched off where the forward has the switch. Tensors are given as copies: a forward may write into what
    it gets, and the batch is used again.

    Raises:
        LossError: nothing in the batch can be given to the forward.
    """
    values = {key: value for key, value in copied(batch).items() if key not in drop}
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = {key: value for key, value in values.items() if key in named}
    positional: list[Any] = []
    if "input_ids" in values and "input_ids" not in named:
        if not open_ended or named:
            positional = [values["input_ids"]]
    elif not known and not open_ended:
        first = next((value for value in values.values() if isinstance(value, Tensor)), None)
        if first is None:
            raise LossError(
                f"{type(model).__name__}.forward takes nothing of the batch's {', '.join(batch) or 'keys'}."
            )
        positional = [first]
    if open_ended:
        known = {key: value for key, value in values.items() if not (positional and key == "input_ids")}
    if "use_cache" in named and "use_cache" not in known:
        known["use_cache"] = False
    return model(*positional, **known)


def copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose tensors may be written to; those that are part of a graph are left as they are."""
    return {
        key: value.clone() if isinstance(value, Tensor) and not value.requires_grad else value
        for key, value in batch.items()
    }


def find_logits(output: Any) -> Tensor | None:
    """Return the logits of a model's output: the tensor itself, `.logits`, `["logits"]` or a tuple's first element.

    A tensor without axes is a loss, not logits.
    """
    found: Any = None
    if isinstance(output, Tensor):
        found = output
    elif getattr(output, "logits", None) is not None:
        found = output.logits
    elif isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    return found if isinstance(found, Tensor) and found.dim() > 0 else None


def find_loss(output: Any) -> Tensor | None:
    """Return the scalar loss of a model's output, or None."""
    found: Any = output
    if not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            found = output.get("loss")
        elif isinstance(output, tuple | list) and output:
            found = output[0]
        else:
            found = getattr(output, "loss", None)
    return found if isinstance(found, Tensor) and found.numel() == 1 else None


def try_forward(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor | None, bool]:
    """Return the logits on the first sample, and whether there is a scalar loss instead."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            sample = sample_of(batch, 0)
            needs_labels = is_encoder_decoder(model)
            if needs_labels and "labels" not in sample and "input_ids" in sample:
                sample["labels"] = sample["input_ids"]
            # A model that insists on its labels cannot be called without them: it computes its own loss.
            takes_labels = "labels" in sample and _requires(model, "labels")
            try:
                output = call_model(model, sample, drop=() if needs_labels or takes_labels else ("labels",))
            except (AttributeError, TypeError, ValueError, RuntimeError):
                if "labels" not in sample:
                    raise
                # Labels may be optional in the signature and still needed; what fails with them fails for good.
                output = call_model(model, sample, drop=())
            logits = find_logits(output)
            if logits is not None:
                return logits, False
            if find_loss(output) is None and "labels" in sample:
                output = call_model(model, sample, drop=())
            return None, find_loss(output) is not None
    finally:
        for module, mode in modes.items():
            module.training = mode


def scalar_loss(model: nn.Module, sample: Mapping[str, Any]) -> Tensor:
    """Return the model's own scalar loss on a batch of one."""
    value = find_loss(call_model(model, sample, drop=()))
    if value is None:
        raise LossError(
            f"{type(model).__name__} returned no scalar loss. Give a loss(model, batch) -> (B,) of your own."
        )
    return value.reshape(())


def base_model(model: nn.Module) -> nn.Module:
    """Return the model under adapters (PEFT) and compilation, whose class name says what it is."""
    model = getattr(model, "_orig_mod", model)
    getter = getattr(model, "get_base_model", None)
    return getter() if callable(getter) else model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the model's config says that a decoder is fed with (shifted) labels."""
    return getattr(getattr(base_model(model), "config", None), "is_encoder_decoder", False) is True


def _requires(model: nn.Module, name: str) -> bool:
    parameter = inspect.signature(model.forward).parameters.get(name)
    return parameter is not None and parameter.default is parameter.empty


def unpadded(batch: Mapping[str, Any], *, leading: bool = False, labels: bool = True) -> Mapping[str, Any]:
    """Return a batch of one without the padding at its end that `attention_mask` shows, itself if there is none.

    Args:
        batch: of one sample.
        leading: padding at its start is left out too.
        labels: they are as long as the input; not those of an encoder-decoder.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != 1 or bool(mask.all()) or not mask.any():
        return batch
    length = mask.shape[1]
    used = mask[0].nonzero().flatten()
    where = slice(int(used[0]) if leading else 0, int(used[-1]) + 1)
    if where == slice(0, length):
        return batch
    found = {}
    for key, value in batch.items():
        own = not key.startswith("decoder_") and (labels or key != "labels")
        if own and isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == length:
            if length in value.shape[2:]:
                return batch  # a mask of pairs, or what happens to be as wide: it cannot be told
            value = value[:, where]
        found[key] = value
    return found


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of samples: the first axis of `input_ids`, `labels` or the first tensor.

    Raises:
        DataError: the batch has no batched tensor.
    """
    for key in ("input_ids", "labels", *batch):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    raise DataError(f"The batch has no tensor with a batch axis, only {', '.join(map(str, batch)) or 'nothing'}.")


def sample_of(batch: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return sample `index` as a batch of one; what has no batch axis is passed on.

    Raises:
        DataError: a tensor's first axis is neither the batch nor 1.
    """
    return samples_of(batch, slice(index, index + 1))


def samples_of(batch: Mapping[str, Any], where: slice | list[int]) -> dict[str, Any]:
    """Return some samples of a batch as a batch, padded as they are; what has no batch axis is passed on.

    Raises:
        DataError: a tensor's first axis is neither the batch nor 1.
    """
    n_samples = batch_size(batch)
    samples = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.shape[0] == n_samples:
                value = value[where]
            elif value.shape[0] != 1:
                raise DataError(
                    f"{key} has shape {tuple(value.shape)}, but the batch has {n_samples} samples. Batched tensors "
                    "have the sample as their first axis."
                )
        samples[key] = value
    return samples
