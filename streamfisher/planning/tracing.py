"""One forward pass without numbers: every shape, operation and saved byte of a model of any size, without its weights.

The pass runs on fake tensors, which have shapes and dtypes and no memory, so a model that was built on the meta device
from a config alone is traced like one that is loaded, and nothing is computed in either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from streamfisher.errors import ModelError, first_line
from streamfisher.gradients.parameters import select_parameters
from streamfisher.gradients.shapes import GradientShape
from streamfisher.models.calling import call_model, is_encoder_decoder
from streamfisher.planning.forward_watch import ForwardWatch
from streamfisher.planning.model_trace import ModelTrace
from streamfisher.runtime.caller_state import modes_of_its_own


def captured_names(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    """Return the parameters that a run would capture; values are not needed.

    Raises:
        ModelError: a pattern matches nothing, or nothing is left.
    """
    return list(select_parameters(model, include, exclude, need_values=False).tensors)


def trace_shapes(model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> list[GradientShape]:
    """Return what `trace_model` finds out about the gradients alone."""
    return list(trace_model(model, batch, **options).shapes)


@modes_of_its_own()
def trace_model(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    causal: bool = False,
    parameters: Mapping[str, Any] | None = None,
) -> ModelTrace:
    """Trace one sample.

    Args:
        model: real, or on the meta device.
        batch: a batch of one sample; only its shapes, dtypes and keys count.
        causal: the loss predicts the next token, so that the last position has no gradient and is not stored.
        parameters: names of the captured ones; `None` means all that require a gradient.

    Raises:
        ModelError: the forward needs values where only shapes are known.
    """
    watch = ForwardWatch(model, list(parameters) if parameters is not None else None)
    flops = FlopCounterMode(display=False, custom_mapping=_MORE_FLOPS)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tokens = next((value.shape[1] for value in batch.values() if value.dim() > 1 and not value.is_floating_point()), 1)
    try:
        with watch, mode, flops, torch.enable_grad():
            fakes = {f"model.{name}": _fake(tensor) for name, tensor in model.named_parameters()}
            fakes |= {f"model.{name}": _fake(tensor) for name, tensor in model.named_buffers()}
            fake_batch = {key: _fake(value) for key, value in batch.items()}
            keep = torch.autograd.graph.saved_tensors_hooks(watch.saved, lambda tensor: tensor)
            with keep:
                output = functional_call(_Called(model), fakes, (fake_batch,))
            watch.weights = {tensor.untyped_storage()._cdata for tensor in fakes.values()}
            activation_bytes = watch.saved_bytes()
            del output
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be planned from its shapes alone: {first_line(error)}. Its "
            "forward looks at values, or needs other inputs; give samples of your DATA after MODEL."
        ) from error
    shapes = watch.shapes(causal)
    blocks = watch.blocks(float(flops.get_total_flops()))
    return ModelTrace(
        name=type(model).__name__,
        tokens=float(tokens),
        shapes=shapes,
        blocks=blocks,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()),
        activation_bytes=activation_bytes,
        layer=watch.layer(blocks),
        unused=int(causal),
    )


class _Called(nn.Module):
    """The model called with what its forward takes of a batch, as a run calls it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Any:
        if is_encoder_decoder(self.model):
            return call_model(self.model, {"labels": batch["input_ids"], **batch}, drop=())
        return call_model(self.model, batch)


def _fake(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape on the CPU; called in a fake mode it takes no memory."""
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="cpu")


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """`Q K^T` and its product with V: `2 B H T S (d + d_v)` (masked entries count)."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[-2] * (width + value[-1])


def _grouped_flops(left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Rows by groups of experts: each row meets one matrix."""
    return 2 * left[0] * left[1] * right[-1]


_MORE_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
}
if hasattr(torch.ops.aten, "_grouped_mm"):
    _MORE_FLOPS[torch.ops.aten._grouped_mm] = _grouped_flops
