"""Which samples the probe looks at: the first whose gradients are finite, of more than one length."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from streamfisher.collection.survey import RunData
from streamfisher.data.batches import collate
from streamfisher.errors import NonFiniteError
from streamfisher.gradients.probe import PROBE_SAMPLES
from streamfisher.models.kept_tensors import KeptTensors
from streamfisher.models.offload import to_model

#: Among so many first samples the probe looks for some with finite gradients.
_SEARCHED = 64


def first_samples(data: RunData, model: nn.Module) -> dict[str, Tensor]:
    """Return the batch that the model is traced on: the first samples, the second of another length if there is one."""
    numbers = list(range(min(PROBE_SAMPLES, len(data.samples))))
    length = data.lengths[0]
    if len(numbers) > 1 and all(data.lengths[number] == length for number in numbers):
        numbers[1] = next((n for n, other in enumerate(data.lengths) if other != length), numbers[1])
    return to_model(collate([data.samples[number] for number in numbers]), model)


def probe_batch(
    data: RunData, model: nn.Module, parameters: Iterable[Tensor], *, skip_nonfinite: bool = False
) -> dict[str, Tensor]:
    """Return the first samples whose gradients are finite, the second of another length where there is one.

    Args:
        data: of the run.
        model: on its device.
        parameters: the captured ones; whether they require a gradient does not matter.
        skip_nonfinite: look through all samples, as those that are not finite are left out.

    Raises:
        NonFiniteError: not even two of the samples that are looked at have finite gradients.
    """
    parameters = list(parameters)
    first = range(len(data.samples) if skip_nonfinite else min(_SEARCHED, len(data.samples)))
    numbers = list(itertools.islice((n for n in first if _is_finite(data, model, parameters, n)), PROBE_SAMPLES))
    if len(numbers) < 2:
        bad = next(n for n in first if n not in numbers)
        raise NonFiniteError(
            f"sample {bad}: the loss or its gradient is not finite, as for all but {len(numbers)} of the "
            f"{'' if skip_nonfinite else 'first '}{len(first)} samples. Look for NaN in the data and in the model's "
            "parameters, or use a wider --dtype."
        )
    length = data.lengths[numbers[0]]
    if all(data.lengths[number] == length for number in numbers):
        others = (n for n in range(numbers[-1] + 1, len(data.samples)) if data.lengths[n] != length)
        candidates = itertools.islice(others, PROBE_SAMPLES)
        numbers[1] = next((n for n in candidates if _is_finite(data, model, parameters, n)), numbers[1])
    return collate([data.samples[number] for number in numbers])


def _is_finite(data: RunData, model: nn.Module, parameters: Sequence[Tensor], number: int) -> bool:
    """Return whether the loss of a sample and its gradient are finite, by plain autograd."""
    if any(parameter.is_meta or isinstance(parameter, DTensor) for parameter in parameters):  # the loss alone
        loss = data.loss(model, to_model(collate([data.samples[number]]), model)).sum()
        return bool(torch.isfinite(loss))
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad(), KeptTensors(model).held():  # what one sample leaves is not the next one's
            loss = data.loss(model, to_model(collate([data.samples[number]]), model)).sum()
            if not bool(torch.isfinite(loss)) or not loss.requires_grad:
                return bool(torch.isfinite(loss))
            return _backward_is_finite(loss, parameters)
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)


def _backward_is_finite(loss: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Return whether the gradients by leaves are finite; each is dropped as soon as it was looked at."""
    finite: list[bool] = []

    def look(parameter: Tensor) -> None:
        assert parameter.grad is not None  # it was accumulated just now
        finite.append(bool(torch.isfinite(parameter.grad).all()))
        parameter.grad = None

    before = [parameter.grad for parameter in parameters]
    handles = [parameter.register_post_accumulate_grad_hook(look) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
    finally:
        for handle, parameter, grad in zip(handles, parameters, before, strict=True):
            handle.remove()
            parameter.grad = grad
    return all(finite)
