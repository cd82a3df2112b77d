"""The rule for every other module: recompute it, one sample at a time, from its captured inputs and output gradients.

For a module `y = f(w, x)` with captured `x` and `d = dL/dy`, the gradient of sample i is the vector-Jacobian product
`d_i^T df(w, x_i)/dw`. It is taken for all samples at once by `vmap`, or in a loop over this one module where `vmap`
cannot go (data-dependent control flow, fused kernels). Both are pure functions of what was captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from streamfisher.models.offload import is_offloaded
from streamfisher.models.sharding import is_sharded

#: How a tensor holds its samples: 'batch' (axis 0), 'time' (axis 1), 'flat' (axis 0, sample-major), 'single' (1, ...)
#: or 'shared' (no sample axis at all).
Kinds = tuple[str, ...]


def tensor_leaves(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Return the tensors of a nested structure and a function that puts others in their place."""
    leaves, spec = pytree.tree_flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    # Only the other leaves are kept: keeping the tensors here would keep activations alive through checkpointing.
    template = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        filled = list(template)
        for i, tensor in zip(where, tensors, strict=True):
            filled[i] = tensor
        return pytree.tree_unflatten(filled, spec)

    return [leaves[i] for i in where], rebuild


def kinds_of(shapes: Sequence[torch.Size], layout: str, n_samples: int, length: int) -> Kinds:
    """Return how each tensor holds its samples in a module whose main output has `layout` (and `length` for 'flat')."""
    return tuple(_kind(shape, layout, n_samples, length) for shape in shapes)


def _kind(shape: torch.Size, layout: str, n_samples: int, length: int) -> str:
    if not shape:
        return "shared"
    if layout == "time" and len(shape) > 1 and shape[1] == n_samples:
        return "time"
    if layout == "flat" and shape[0] == n_samples * length:
        return "flat"
    if shape[0] == n_samples:
        return "batch"
    return "single" if shape[0] == 1 else "shared"


def kinds_fit(shapes: Sequence[torch.Size], kinds: Kinds, n_samples: int) -> bool:
    """Return whether tensors of these shapes can hold their samples as `kinds` says."""
    for shape, kind in zip(shapes, kinds, strict=True):
        if (kind == "batch" and shape[0] != n_samples) or (kind == "time" and shape[1] != n_samples):
            return False
        if (kind == "flat" and shape[0] % n_samples) or (kind == "single" and shape[0] != 1):
            return False
    return True


def _samples_first(tensor: Tensor, kind: str, n_samples: int) -> Tensor:
    """Return `(B, ...)` such that element i is what the module sees for sample i alone."""
    if kind == "batch":
        return tensor.unsqueeze(1)
    if kind == "time":
        return tensor.movedim(1, 0).unsqueeze(2)
    return tensor.reshape(n_samples, -1, *tensor.shape[1:])  # flat


def per_sample_vjp(
    module: nn.Module,
    names: Sequence[str],
    inputs: Sequence[Tensor],
    input_kinds: Kinds,
    rebuild: Callable[[Sequence[Tensor]], Any],
    cotangents: Sequence[Tensor | None],
    output_kinds: Kinds,
    n_samples: int,
    batched: bool,
) -> dict[str, Tensor]:
    """Return the per-sample gradients `{name: (B, *shape)}` of a module's parameters.

    Args:
        module: the module to recompute; its hooks must be inert.
        names: parameter names relative to `module`.
        inputs: the tensors among its arguments, as captured.
        input_kinds: how each of them holds its samples.
        rebuild: makes `(args, kwargs)` of tensors.
        cotangents: gradient of each floating output tensor, None where it has none.
        output_kinds: how each of those holds its samples; 'single' ones were expanded, so gradients are `(B, ...)`.
        n_samples: B.
        batched: one `vmap`, or a loop over the samples.

    Raises:
        ValueError: an output without a sample axis has a gradient, so it cannot be taken apart; or the module is
            offloaded.
    """
    if is_offloaded(module) or is_sharded(module):
        raise ValueError("its weights are offloaded or sharded, so that it cannot be called with others in their place")
    parameters = {name: module.get_parameter(name).detach() for name in names}
    used = [(i, d) for i, d in enumerate(cotangents) if d is not None]
    if any(output_kinds[i] == "shared" for i, _ in used):
        raise ValueError("an output without a batch axis has a gradient")
    pulled = [
        _samples_first(d, "batch" if output_kinds[i] == "single" else output_kinds[i], n_samples) for i, d in used
    ]
    mapped = [kind in ("batch", "time", "flat") for kind in input_kinds]
    tensors = [
        _samples_first(tensor, kind, n_samples) if is_mapped else tensor
        for tensor, kind, is_mapped in zip(inputs, input_kinds, mapped, strict=True)
    ]

    def outputs(parameters: Mapping[str, Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        args, kwargs = rebuild(tensors)
        # Untied: every place of a tied parameter has its own contribution, and each is counted where it is.
        result = functional_call(module, dict(parameters), args, kwargs, tie_weights=False)
        leaves = pytree.tree_leaves(result)
        floating = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        return tuple(floating[i] for i, _ in used)

    if batched:

        def one(tensors: list[Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
            pull = vjp(lambda parameters: outputs(parameters, tensors), parameters)[1]
            return pull(tuple(cotangents))[0]

        return vmap(one, in_dims=([0 if is_mapped else None for is_mapped in mapped], 0))(tensors, pulled)

    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for i in range(n_samples):
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
            results = outputs(leaves, [t[i] if is_mapped else t for t, is_mapped in zip(tensors, mapped, strict=True)])
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            kept = [(y, d[i]) for y, d in zip(results, pulled, strict=True) if y.requires_grad]
            if kept:
                ys, ds = zip(*kept, strict=True)
                grads = torch.autograd.grad(ys, list(leaves.values()), ds, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            rows[name].append(torch.zeros_like(parameters[name]) if grad is None else grad)
    return {name: torch.stack(values) for name, values in rows.items()}
