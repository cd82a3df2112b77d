"""A model without its weights, from a config alone: enough to know every shape."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from streamfisher.errors import ConfigError, ModelError, require
from streamfisher.models.calling import base_model
from streamfisher.models.loading import auto_class, call, check_pretrained


def build_skeleton(spec: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> nn.Module:
    """Return a model on the meta device where that is possible, in eval mode.

    Args:
        spec: a folder that holds at least a `config.json`, a Hugging Face id, or `package.module:callable`, which is
            called on the meta device and, if it cannot work there, once more plainly.
        dtype: cast to it; `None` keeps the dtype that the config names.
        trust_remote_code: run code that comes with a Hugging Face checkpoint.

    Raises:
        ConfigError: the callable does not exist or needs arguments.
        ModelError: there is no such model, or the callable returns something else.
        MissingExtraError: transformers is needed and not installed.
    """
    if ":" in spec and not Path(spec).exists():
        model = _call(spec)
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"MODEL {spec} returned a {type(model).__name__}, not a torch.nn.Module; it must return the model."
            )
        return (model.to(dtype) if dtype is not None else model).eval()
    check_pretrained(spec)
    require("transformers", "hf", f"read the config of {spec}")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(spec, trust_remote_code=trust_remote_code)
        kind = auto_class(transformers, config)
        wanted = dtype or getattr(config, "dtype", None) or torch.float32
        if isinstance(wanted, str):
            wanted = getattr(torch, wanted)
        with torch.device("meta"):
            return kind._from_config(config, dtype=wanted).eval()
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"MODEL {spec} cannot be built from its config: {str(error).splitlines()[0]}") from error


def predicts_next_token(model: nn.Module, loss: str | None) -> bool:
    """Return whether the loss is shifted by one, so that the last position of a sequence has no gradient.

    Args:
        model: may be on the meta device.
        loss: the name of the loss, or `None` where a run would choose it.
    """
    if loss is not None:
        return loss == "causal"
    base = base_model(model)
    name = type(base).__name__
    if name.endswith(("ForMaskedLM", "ForTokenClassification", "ForPreTraining", "ForConditionalGeneration")):
        return False
    config = getattr(base, "config", None)
    named = name.endswith(("ForCausalLM", "LMHeadModel"))
    return named or getattr(base, "is_causal", False) is True or getattr(config, "is_decoder", False) is True


def _call(spec: str) -> object:
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model.*")
            return call(spec, "MODEL")
    except ConfigError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError, OSError):
        return call(spec, "MODEL")  # it reads weights, or looks at values
