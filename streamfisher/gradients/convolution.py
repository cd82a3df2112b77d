"""Per-sample gradients of convolutions: a convolution is a linear layer over unfolded windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from streamfisher.gradients.batch_rows import RowSink


def unfold_windows(module: _ConvNd, x: Tensor) -> Tensor:
    """Return the windows that each output position sees: `(B, C, *positions, *kernel)`, a view of the padded input.

    Works for one, two and three spatial axes, with any stride, padding (also 'same' and the reflecting and circular
    modes) and dilation.
    """
    mode = module.padding_mode
    pad = module._reversed_padding_repeated_twice
    x = torch.nn.functional.pad(x, pad) if mode == "zeros" else torch.nn.functional.pad(x, pad, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    return x


def write_convolution(module: nn.Module, x: Tensor, d: Tensor, names: Mapping[str, str], sink: RowSink) -> None:
    """`dW_i[g] = sum_p d_i[g, :, p] u_i[g, :, p]^T` per group g, with u the unfolded windows; `db_i = sum_p d_ip`."""
    module = cast(_ConvNd, module)  # the rule matches no other
    n_samples, n_groups = d.shape[0], module.groups
    if "weight" in names:
        windows = unfold_windows(module, x)  # (B, C, *positions, *kernel)
        n_axes = d.dim() - 2
        spatial, kernel = range(2, 2 + n_axes), range(2 + n_axes, 2 + 2 * n_axes)
        u = windows.permute(0, *spatial, 1, *kernel)
        n_positions = d[0, 0].numel()
        u = u.reshape(n_samples, n_positions, n_groups, -1)  # (B, p, G, C/G * K)
        left = d.reshape(n_samples, n_groups, -1, n_positions)  # (B, G, O/G, p)
        if n_groups == 1:
            sink.product(names["weight"], left[:, 0], u[:, :, 0])
        else:
            dtype = sink.dtype(names["weight"])
            sink.add(names["weight"], left.to(dtype) @ u.permute(0, 2, 1, 3).to(dtype))
    if "bias" in names:
        sink.add(names["bias"], d.flatten(2).sum(2, dtype=sink.dtype(names["bias"])))
