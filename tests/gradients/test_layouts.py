"""Where the samples are in what a layer returns is not guessed from sizes that happen to be equal."""

import pytest
import torch
from gradients.token_model import assert_equal, truth_of
from torch import nn

from streamfisher.gradients import GradientEngine
from streamfisher.models import resolve_loss

LENGTH = 6


class Scaled(nn.Module):
    """Known to no formula."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return torch.tanh(x) * self.scale


LAYERS = {"linear": lambda: nn.Linear(4, 4), "norm": lambda: nn.LayerNorm(4), "generic": Scaled}


class BothWays(nn.Module):
    """Calls one layer with the samples first, and in other orders."""

    def __init__(self, layer, order):
        super().__init__()
        self.inner, self.layer, self.out, self.order = nn.Linear(3, 4), layer, nn.Linear(4, 3), order

    def forward(self, x):
        h = self.inner(x)
        if self.order[0] == "samples":
            h = torch.tanh(self.layer(h))
        h = h.transpose(0, 1)  # (T, B, D)
        h = torch.tanh(self.layer(h)).transpose(0, 1)
        if self.order[-1] == "flat":
            h = torch.tanh(self.layer(h.reshape(-1, 4))).view(h.shape)
        if self.order[-1] == "sums":
            h = h + torch.tanh(self.layer(h.sum(1)))[:, None]
        return self.out(h.sum(1))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("order", [("samples", "time"), ("time", "flat"), ("samples", "time", "sums"), ("time",)])
@pytest.mark.parametrize("n", [LENGTH - 1, LENGTH, LENGTH + 1, 2 * LENGTH])
@pytest.mark.parametrize("probed", [2, 3])
def test_a_layer_that_is_called_both_ways_is_right_whatever_the_sizes(kind, order, n, probed):
    torch.manual_seed(0)
    model = BothWays(LAYERS[kind](), order).double()
    batch = {"x": torch.randn(n, LENGTH, 3).double(), "labels": torch.arange(n) % 3}
    loss = resolve_loss(model, batch)
    with GradientEngine(model, loss) as engine:
        engine.probe({key: value[:probed] for key, value in batch.items()})
        out = engine.allocate(n)
        engine.rows(batch, out)
        assert max(engine.guard(batch, out).values()) < 1e-12
    assert_equal(out, truth_of(model, batch, loss))
