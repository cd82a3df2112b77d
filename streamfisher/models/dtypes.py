"""A model in another floating dtype, the user's own left as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from streamfisher.errors import ModelError, first_line, no_memory


def in_dtype(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """Return the model where its floating parameters have that dtype, or none is asked for; else a cast copy.

    Raises:
        ModelError: it cannot be copied.
    """
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}  # quantised weights keep theirs
    if dtype is None or not dtypes - {dtype}:
        return model
    # What weight norm has computed is no leaf, which no deepcopy takes; it is computed again in the next forward.
    computed = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed}
    try:
        return copy.deepcopy(model, memo).to(dtype)
    except Exception as error:
        if no_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot be copied to be cast to {dtype} ({type(error).__name__}: "
            f"{first_line(error)}). Cast it yourself, and leave dtype_model (--dtype) out."
        ) from error
