"""The probe sees few samples: what they do not show is not believed of the others."""

import copy

import pytest
import torch
from gradients import model_zoo
from gradients.token_model import Model, assert_equal, batch_of, double, truth_of
from torch import nn
from torch.nn.functional import conv1d, cross_entropy, layer_norm, linear
from torch.utils.checkpoint import checkpoint

from streamfisher.errors import CaptureError
from streamfisher.gradients import GradientEngine, PlainAutograd
from streamfisher.models import resolve_loss

LATE = 4  # samples from here on do what the probed ones do not


def late(n=8, width=6, **more):
    """Return samples whose last ones are `on`."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return {"x": x, "on": (torch.arange(n) >= LATE).double(), "labels": torch.arange(n) % 3} | more


def probed_on(few, model, batch, loss=None, **options):
    """Return the rows of a batch by an engine that was probed on its first samples, and its report."""
    chosen = resolve_loss(model, batch, loss)
    with GradientEngine(model, chosen, **options) as engine:
        report = engine.probe({key: value[:few] for key, value in batch.items()})
        out = engine.allocate(len(batch["labels"] if "labels" in batch else batch["input_ids"]))
        engine.rows(batch, out)
    return out, report, chosen


NO_CHECKPOINTS: list[bool] = []  # not empty while the truth is taken, by what reentrant checkpoints refuse


def truth_without_checkpoints(model, batch, loss):
    NO_CHECKPOINTS.append(True)
    try:
        return truth_of(model, batch, loss)
    finally:
        NO_CHECKPOINTS.clear()


def assert_right(model, batch, loss=None, limit=1e-10, **options):
    out, report, chosen = probed_on(3, model.double(), batch, loss, **options)
    truth = truth_without_checkpoints(model, batch, chosen)
    assert all(float(abs(truth[name]).max()) > 0 for name in out), "the case shows nothing"
    assert_equal(out, truth, limit)
    return report


# Gradients that are zero in the probe


class Gated(nn.Module):
    """A layer that only samples that are `on` go through."""

    def __init__(self, layer, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.layer, self.out = nn.Linear(6, width), layer, nn.Linear(width, 3)

    def forward(self, x, on):
        h = torch.tanh(self.text(x))
        return self.out(h + on[:, None] * self.layer(h))


class EqualLinear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight * 0.25, self.bias)


class ScaledNorm(nn.LayerNorm):
    def forward(self, x):
        return layer_norm(x, self.normalized_shape, 3 * self.weight, self.bias)


class SquaredRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x):
        return self.weight**2 * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class EqualConv(nn.Conv1d):
    def forward(self, x):
        return conv1d(x[:, None], self.weight * 0.5, self.bias, padding=1).mean(1)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.ParameterList([nn.Parameter(torch.randn(6, 6))])

    def forward(self, x):
        return x @ self.table[0]


ODD_LAYERS = {
    "linear": lambda: EqualLinear(6, 6),
    "layer norm": lambda: ScaledNorm(6),
    "rms norm": lambda: SquaredRMSNorm(6),
    "convolution": lambda: EqualConv(1, 2, 3),
    "bare parameters": Bare,
    "attention": lambda: Attending(),
}


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

    def forward(self, x):
        y = x.unflatten(1, (2, 3))
        return self.attention(y, y, y, need_weights=False)[0].flatten(1)


@pytest.mark.parametrize("kind", ODD_LAYERS)
def test_a_formula_is_not_believed_on_zeros(kind):
    torch.manual_seed(1)
    report = assert_right(Gated(ODD_LAYERS[kind]()), late())
    assert all(name in report.zero for name in report.parameters if name.startswith("layer."))


@pytest.mark.parametrize("kind", ["linear", "layer norm", "rms norm", "convolution"])
def test_nor_on_mere_rounding(kind):
    torch.manual_seed(1)
    batch = late()
    batch["on"] = batch["on"] + 1e-17
    report = assert_right(Gated(ODD_LAYERS[kind]()), batch)
    assert not report.zero


def test_rounding_is_believed_where_the_weight_proves_the_formula():
    """The exact gradient of an attention's key bias is zero."""
    entry = next(e for e in model_zoo.ZOO if e.name == "BERT (masked LM)")
    model, batch = model_zoo.build(entry).double(), entry.batch(2)
    with GradientEngine(model, resolve_loss(model, batch)) as engine:
        report = engine.probe(batch)
    biases = [p for name, p in report.parameters.items() if name.endswith("key.bias")]
    assert biases and all(p.noise or p.error == 0.0 for p in biases)  # some processors round both alike
    assert not [name for name in report.unproved if name not in report.zero]


def test_one_weight_per_task_in_data_sorted_by_task():
    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.heads = nn.Linear(6, 8), nn.ParameterList([torch.randn(3, 8) for _ in range(2)])

        def forward(self, x, on):
            h, logits = torch.tanh(self.body(x)), x.new_zeros(len(x), 3)
            for task in on.unique().tolist():
                logits[on == task] = linear(h[on == task], self.heads[int(task)])
            return logits

    torch.manual_seed(0)
    assert_right(Tasks(), late())


def test_a_gradient_that_stays_zero_costs_no_further_pass(monkeypatch):
    """An adapter at its start: the second of its two layers is zero, so the first has no gradient in any sample."""
    model = Gated(nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6, bias=False))).double()
    nn.init.zeros_(model.layer[1].weight)
    batch = late()
    chosen = resolve_loss(model, batch)
    with GradientEngine(model, chosen) as engine:
        batch["on"][:] = 1.0
        report = engine.probe(batch)
        assert "layer.0.weight" in report.zero
        monkeypatch.setattr(PlainAutograd, "one_by_one", None)
        out = engine.allocate(8)
        engine.rows(batch, out)
    assert_equal(out, truth_of(model, batch, chosen))


# Further uses of a parameter, by later samples only


class Reusing(nn.Module):
    """Uses a weight once more where a sample is `on`."""

    def __init__(self, layer, again):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out, self.again = layer, nn.Linear(6, 3), again

    def forward(self, x, on):
        h = torch.tanh(self.layer(x))
        if bool(on.any()):
            h = h + on[:, None] * self.again(self.layer, h)
        return self.out(h)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(x[:, None])[:, 0]


FURTHER_USES = {
    "linear": (lambda: nn.Linear(6, 6), lambda m, h: linear(h, m.weight)),
    "bias": (lambda: nn.Linear(6, 6), lambda m, h: h * m.bias),
    "transposed": (lambda: nn.Linear(6, 6), lambda m, h: h @ m.weight),
    "past the hooks": (lambda: nn.Linear(6, 6), lambda m, h: m.forward(h)),
    "a copy": (lambda: nn.Linear(6, 6), lambda m, h: linear(h, m.weight.clone().mul_(2.0))),
    "norm": (lambda: nn.LayerNorm(6), lambda m, h: h * m.weight.sum()),
    "convolution": (Wide, lambda m, h: conv1d(h[:, None], m.conv.weight, padding=1)[:, 0]),
    "attention": (Attending, lambda m, h: h * m.attention.out_proj.weight.sum()),
    "of a parametrised weight": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        lambda m, h: linear(h, m.weight),
    ),
    "recurrent": (lambda: Recurrent(), lambda m, h: h * m.rnn.weight_hh_l0.sum()),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(2, 2, batch_first=True)

    def forward(self, x):
        return self.rnn(x.unflatten(1, (3, 2)))[0].flatten(1)


@pytest.mark.parametrize("kind", FURTHER_USES)
@pytest.mark.parametrize("inside", ["plainly", "checkpoint", "reentrant checkpoint"])
def test_a_use_outside_its_module_is_seen_when_it_comes(kind, inside):
    make, use = FURTHER_USES[kind]

    def again(module, h):
        if inside == "plainly" or NO_CHECKPOINTS:
            return use(module, h)
        return checkpoint(use, module, h, use_reentrant=inside == "reentrant checkpoint")

    torch.manual_seed(1)
    assert_right(Reusing(make(), again), late())


def test_uses_whose_gradients_cancel_in_the_sum_are_seen_too():
    def loss(model, batch):
        signs = torch.where(torch.arange(len(batch["x"])) % 2 == 0, 1.0, -1.0) * batch["on"]
        ordinary = cross_entropy(model[1](model[0](batch["x"])), batch["labels"], reduction="none")
        return ordinary + batch["sign"] * batch["on"] * model[0].weight.square().sum() + 0 * signs

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    assert_right(model, late(sign=torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)), loss)


def test_a_second_use_of_an_embedding_by_the_loss():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(20, 6), nn.Linear(6, 3)

        def forward(self, ids):
            h = torch.tanh(self.embed(ids).mean(1))
            return self.fc(h), linear(h, self.embed.weight)

    def loss(model, batch):
        one, other = model(batch["ids"])
        return cross_entropy(one, batch["labels"], reduction="none") + cross_entropy(
            other, batch["aux"], reduction="none", ignore_index=-100
        )

    torch.manual_seed(0)
    n = 8
    batch = {"ids": torch.randint(0, 20, (n, 5)), "labels": torch.arange(n) % 3}
    batch["aux"] = torch.where(torch.arange(n) >= LATE, torch.arange(n), -100)
    assert_right(Net(), batch, loss)


def test_a_tied_weight_that_is_used_a_third_time():
    class Third(Model):
        def forward(self, input_ids, attention_mask=None):
            y = super().forward(input_ids)
            if bool((input_ids[:, 0] == 1).any()):
                y = y + (input_ids[:, 0] == 1)[:, None, None] * linear(y, self.embed.weight @ self.embed.weight.T)
            return y

    model, batch = double(Third()), batch_of(8, 6)
    batch["input_ids"][:, 0] = (torch.arange(8) >= LATE).long()
    out, _, chosen = probed_on(3, model, batch)
    assert_equal(out, truth_of(model, batch, chosen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    model = Reusing(nn.Linear(6, 6), lambda m, h: linear(h, m.weight)).to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in late().items()}
    out, _, chosen = probed_on(3, model, batch)
    assert_equal(out, truth_of(model, batch, chosen), 1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize(
    "name", ["GPT-2", "Llama", "T5", "LSTM", "nn.TransformerEncoder", "ResNet", "ALBERT (shared layers)"]
)
def test_what_the_rules_account_for_is_taken_in_one_pass(name, monkeypatch):
    entry = next(e for e in model_zoo.ZOO if e.name == name)
    model, batch = model_zoo.build(entry), entry.batch(4)
    with GradientEngine(model, resolve_loss(model, batch)) as engine:
        engine.probe(batch)
        for plain in ("one_by_one", "gradients"):
            monkeypatch.setattr(PlainAutograd, plain, None)
        out = engine.allocate(4)
        before = [p.requires_grad for p in model.parameters()]
        engine.rows(batch, out)
        assert [p.requires_grad for p in model.parameters()] == before
        assert all(p.grad is None for p in model.parameters())


# Segments of which nothing below is captured


@pytest.mark.parametrize("exclude", [(), ("embed.*",), ("embed.*", "first.*")])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_above_everything_that_is_captured_loses_no_gradient(exclude, reentrant):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.second = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

        def forward(self, input_ids):
            if NO_CHECKPOINTS:
                return self.second(torch.tanh(self.first(self.embed(input_ids))))
            h = checkpoint(lambda x: torch.tanh(self.first(x)), self.embed(input_ids), use_reentrant=reentrant)
            return checkpoint(self.second, h, use_reentrant=reentrant)

    model, batch = double(Net()), batch_of(5, 6)
    del batch["attention_mask"]
    out, report, chosen = probed_on(3, model, batch, "causal", exclude=exclude)
    truth = truth_without_checkpoints(model, batch, chosen)
    assert_equal(out, truth)
    assert not report.zero and all(float(out[name].norm()) > 0 for name in out)


# Tensors that a module keeps


class Keeping(nn.Module):
    """In eval mode the first forward keeps a table made of a parameter, as LeViT does."""

    def __init__(self, container):
        super().__init__()
        self.q, self.table, self.container = nn.Linear(3, 3), nn.Parameter(torch.randn(7)), container
        self.kept = {} if container == "dict" else [] if container == "list" else None
        self.places = (torch.arange(4)[:, None] - torch.arange(4)) + 3

    def train(self, mode=True):
        if mode:
            self.kept = {} if self.container == "dict" else [] if self.container == "list" else None
        return super().train(mode)

    def bias(self):
        made = self.table[self.places]
        if self.training:
            return made
        if self.container == "dict":
            return self.kept.setdefault("cpu", made)
        if self.container == "list":
            self.kept.append(made)
            return self.kept[0]
        self.kept = made if self.kept is None else self.kept
        return self.kept

    def forward(self, x):
        x = x.unflatten(1, (4, 3))
        return (torch.softmax(self.q(x) @ x.mT + self.bias(), -1) @ x).mean(1)


def _size(kept):
    return len(kept) if isinstance(kept, dict | list) else None


class Making(Keeping):
    """Makes the table in every pass."""

    def bias(self):
        return self.table[self.places]


@pytest.mark.parametrize("container", ["attribute", "dict", "list"])
@pytest.mark.parametrize("before", ["train", "eval", "a look in eval mode"])
def test_what_a_pass_keeps_does_not_hide_a_parameter(container, before):
    torch.manual_seed(0)
    model, batch = Keeping(container).double(), late(width=12)
    del batch["on"]
    model.train(before == "train")
    if before.startswith("a look"):
        with torch.no_grad():
            model(batch["x"])
    loss = resolve_loss(model, batch)
    kept = copy.copy(vars(model)), _size(model.kept)
    out, _, chosen = probed_on(3, model, batch, loss)
    making = copy.deepcopy(model)
    making.__class__ = Making
    truth = truth_of(making, batch, chosen)
    assert float(abs(truth["table"]).max()) > 0
    assert_equal(out, truth)
    assert model.kept is kept[0]["kept"] and _size(model.kept) == kept[1]  # as it came


def test_a_table_that_eval_makes_without_gradient_is_refused():
    class Eager(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.table = nn.Linear(12, 3), nn.Parameter(torch.randn(3))

        @torch.no_grad()
        def train(self, mode=True):
            self.ready = None if mode else self.table * 1.0
            return super().train(mode)

        def forward(self, x):
            return self.q(x) * (self.table if self.training else self.ready)

    model, batch = Eager().double(), late(width=12)
    del batch["on"]
    with pytest.raises(CaptureError, match="table has a gradient in train mode and none in eval mode"):
        probed_on(3, model, batch)
    out, _, _ = probed_on(3, model, batch, exclude=("table",))
    assert list(out) == ["q.weight", "q.bias"]
