"""Models whose train() and eval() do work: adapters that merge into the weights they adapt."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from streamfisher.errors import ModelError
from streamfisher.models.kept_tensors import values_of, works_on_modes


def check_modes(model: nn.Module) -> None:
    """Refuse a model that eval() changes, and hand it back bit for bit as it came; say where adapters are merged.

    Raises:
        ModelError: eval() changes values, or the parameters were made in inference mode.
    """
    made = next((name for name, parameter in model.named_parameters() if parameter.is_inference()), None)
    if made is not None:
        raise ModelError(
            f"{made} was made in torch.inference_mode() and can have no gradient. Build or load the model outside it."
        )
    merged = [name for name, module in model.named_modules() if getattr(module, "merged", False) is True]
    if merged:
        warnings.warn(
            f"adapters are merged into their weights in {len(merged)} modules (the first: {merged[0]}): the rows of "
            "merged adapters are zero. Unmerge them first.",
            stacklevel=2,
        )
    working = [(n, m) for n, m in model.named_modules() if m.training and works_on_modes(m)]
    for name, module in working:
        before = {key: tensor.clone() for key, tensor in values_of(module).items()}
        modes = [(one, one.training) for one in module.modules()]
        module.eval()
        changed = [key for key, tensor in values_of(module).items() if not _same(before.get(key), tensor)]
        if not changed:
            for one, mode in modes:
                one.training = mode
            continue
        module.train()
        for one, mode in modes:
            one.training = mode
        with torch.no_grad():
            for key, tensor in values_of(module).items():
                if key in before:
                    tensor.copy_(before[key])
        raise ModelError(
            f"eval() changes {', '.join(changed[:3])} of {name or 'the model'} ({type(module).__name__}): it merges "
            "adapters, whose rows would be zero. Switch merging off (merge_weights=False), or merge them for good."
        )


def of_batch_norms(model: nn.Module) -> str:
    """Return, for an error about coupled samples, what to do about batch norms that take statistics of the batch."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    names = [n for n, module in model.named_modules() if isinstance(module, norms) and module.running_mean is None]
    if not names:
        return ""
    return (
        f" {names[0] or 'The model'} is a batch norm without running statistics, which takes those of the batch even "
        "in eval mode: train it with track_running_stats=True, or use another normalisation."
    )


def _same(before: Tensor | None, now: Tensor) -> bool:
    if before is None or before.shape != now.shape or before.dtype != now.dtype:
        return False
    if now.is_floating_point():
        return bool(((before == now) | (before.isnan() & now.isnan())).all())
    return torch.equal(before, now)
