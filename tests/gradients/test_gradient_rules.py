"""Each formula against autograd in float64, one sample at a time."""

import pytest
import torch
from gradients import zoo_check
from torch import nn

from streamfisher.gradients import RULES


class Weighted(nn.Module):
    """A layer whose every output element has its own weight in the loss, so that no error can cancel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        y = self.layer(x)
        return y if isinstance(y, torch.Tensor) else y[0]


def loss(model, batch):
    y = model(batch["input_ids"])
    weights = torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).view(y[0].shape)
    return (torch.sin(y) * weights).flatten(1).sum(1)


def floats(*shape):
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def integers(*shape):
    return torch.randint(0, 11, (5, *shape), generator=torch.Generator().manual_seed(1))


class LlamaRMSNorm(nn.Module):
    def __init__(self, offset=0.0):
        super().__init__()
        self.weight, self.offset, self.variance_epsilon = nn.Parameter(torch.rand(6) + 0.5), offset, 1e-5

    def forward(self, x):
        return (self.offset + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Scale(nn.Module):
    """A module that no formula knows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(()))

    def forward(self, x):
        return self.a * torch.tanh(self.b * x)


class Branching(Scale):
    """Data-dependent control flow: no vmap."""

    def forward(self, x):
        return self.a * x if x.sum().item() > -1e9 else self.b * x


class SelfAttention(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)

    def forward(self, x):
        if self.attention.batch_first:
            return self.attention(x, x, x)[0]
        x = x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=False)[0].transpose(0, 1)


def gpt2_conv1d():
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, 6)


CASES = {
    "linear 2-D": (lambda: nn.Linear(6, 4), floats(6), "linear"),
    "linear 3-D": (lambda: nn.Linear(6, 4), floats(3, 6), "linear"),
    "linear 5-D no bias": (lambda: nn.Linear(6, 4, bias=False), floats(2, 3, 2, 6), "linear"),
    "conv1d of gpt2": (gpt2_conv1d, floats(3, 6), "conv1d_gpt2"),
    "embedding": (lambda: nn.Embedding(11, 4), integers(7), "embedding"),
    "embedding padding": (lambda: nn.Embedding(11, 4, padding_idx=3), integers(7), "embedding"),
    "embedding of one": (lambda: nn.Embedding(11, 4), integers(), "embedding"),
    "layer norm": (lambda: nn.LayerNorm(6), floats(3, 6), "layer_norm"),
    "layer norm over two axes": (lambda: nn.LayerNorm((3, 6)), floats(2, 3, 6), "layer_norm"),
    "layer norm no bias": (lambda: nn.LayerNorm(6, bias=False), floats(6), "layer_norm"),
    "rms norm": (lambda: nn.RMSNorm(6), floats(3, 6), "rms_norm"),
    "rms norm of llama": (LlamaRMSNorm, floats(3, 6), "rms_norm"),
    "rms norm of gemma": (lambda: LlamaRMSNorm(offset=1.0), floats(3, 2, 6), "rms_norm"),
    "group norm": (lambda: nn.GroupNorm(2, 6), floats(6, 3, 2), "channel_norm"),
    "batch norm": (lambda: nn.BatchNorm1d(6), floats(6, 3), "channel_norm"),
    "batch norm of vectors": (lambda: nn.BatchNorm1d(6), floats(6), "channel_norm"),
    "instance norm": (lambda: nn.InstanceNorm2d(6, affine=True), floats(6, 3, 3), "channel_norm"),
    "conv 1d": (lambda: nn.Conv1d(4, 6, 3), floats(4, 9), "convolution"),
    "conv 1d stride, padding, dilation, groups": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        floats(4, 9),
        "convolution",
    ),
    "conv 2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0)), floats(4, 6, 7), "convolution"),
    "conv 2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), floats(4, 6, 7), "convolution"),
    "conv 2d same, dilated": (lambda: nn.Conv2d(4, 4, 2, padding="same", dilation=2), floats(4, 6, 7), "convolution"),
    "conv 2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), floats(4, 6, 7), "convolution"),
    "conv 3d": (lambda: nn.Conv3d(2, 4, 2, stride=2, groups=2), floats(2, 4, 5, 6), "convolution"),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), floats(4, 3, 3), "generic"),
    "bilinear of itself": (lambda: Twice(nn.Bilinear(6, 6, 3)), floats(6), "generic"),
    "prelu": (lambda: nn.PReLU(4), floats(4, 3), "generic"),
    "unknown": (Scale, floats(3, 6), "generic"),
    "unknown, data-dependent": (Branching, floats(3, 6), "generic_loop"),
    "attention": (lambda: SelfAttention(batch_first=True), floats(3, 6), None),
    "attention, time first": (lambda: SelfAttention(batch_first=False), floats(3, 6), None),
    "gru": (lambda: nn.GRU(6, 4, batch_first=True), floats(3, 6), None),
}


class Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x)


@pytest.mark.parametrize("case", CASES)
def test_a_rule_agrees_with_autograd(case):
    build, x, rule = CASES[case]
    torch.manual_seed(0)
    model = Weighted(build()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(0.5)
    outcome = zoo_check.compare(model, {"input_ids": x}, torch.float64, loss)
    assert outcome.worst < 1e-10
    rules = {p.rule for p in outcome.report.parameters.values()}
    if rule is not None:
        assert rules == {rule}
    assert "per_sample" not in rules


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name][2] not in (None, "generic", "generic_loop")])
def test_a_rule_agrees_in_float32(case):
    build, x, rule = CASES[case]
    torch.manual_seed(0)
    outcome = zoo_check.compare(Weighted(build()), {"input_ids": x}, torch.float32, loss)
    assert outcome.worst < 2e-5
    assert {p.rule for p in outcome.report.parameters.values()} == {rule}


def test_every_rule_is_tested():
    float32_inside = {"rms_norm_float32"}  # met by float64 models of the zoo without `double_throughout`
    assert {rule.name for rule in RULES} - float32_inside <= {rule for _, _, rule in CASES.values()}


def test_a_float64_model_whose_norm_computes_in_float32_keeps_its_formula():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm as Real

    from streamfisher.gradients import GradientEngine
    from streamfisher.models import resolve_loss

    model = Weighted(Real(6)).double()
    batch = {"input_ids": floats(3, 6)}
    with GradientEngine(model, resolve_loss(model, batch, loss)) as engine:
        report = engine.probe(batch)
    assert report.parameters["layer.weight"].rule == "rms_norm_float32"
    assert report.worst_error < 1e-12


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embeddings_without_a_formula_are_still_right_or_refused(options):
    from streamfisher.errors import LossError

    torch.manual_seed(0)
    model = Weighted(nn.Embedding(11, 4, **options)).double()
    if options.get("scale_grad_by_freq"):
        with pytest.raises(LossError, match=r"couples samples|depends on the batch"):
            zoo_check.compare(model, {"input_ids": integers(7)}, torch.float64, loss)
        return
    assert zoo_check.compare(model, {"input_ids": integers(7)}, torch.float64, loss).worst < 1e-10


def test_an_embedding_with_sparse_gradients_has_the_rows_of_a_dense_one():
    from streamfisher.gradients import GradientEngine
    from streamfisher.models import resolve_loss

    rows = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model, batch = Weighted(nn.Embedding(11, 4, sparse=sparse)).double(), {"input_ids": integers(7)}
        with GradientEngine(model, resolve_loss(model, batch, loss)) as engine:
            assert engine.probe(batch).parameters["layer.weight"].rule == "embedding"
            rows.append(engine.allocate(5))
            engine.rows(batch, rows[-1])
            assert engine.guard(batch, rows[-1])["layer.weight"] < 1e-12
    assert torch.equal(rows[0]["layer.weight"], rows[1]["layer.weight"])
