"""How far a gradient row may be from plain autograd, by dtype."""

from __future__ import annotations

import torch

#: Norm-relative error that is rounding, by the coarsest dtype in play; and the share of the whole gradient's norm below
#: which an error is rounding even if the parameter's own gradient is smaller still (an attention key bias, whose exact
#: gradient is zero).
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
FLOOR = {torch.float64: 2e-15, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 2e-3}
#: A sample's gradient that differs by less than this between its batch and alone differs by rounding.
COUPLING = 1e-5
