"""What the engine promises around the formulas: tied and reused parameters, selection, probe, refusal, factors."""

import copy
import json

import float64_loop
import numpy as np
import pytest
import torch
from gradients import model_zoo, zoo_check
from gradients.token_model import Model, assert_equal, batch_of, double, rows_of, squares, truth_of
from torch import nn

from streamfisher.errors import CaptureError, LossError, ModelError
from streamfisher.gradients import GradientEngine, PlainAutograd, ProbeReport, factors, select_parameters
from streamfisher.gradients import rules as rules_module
from streamfisher.models import resolve_loss

# Tied, reused, broadcast, padded


def test_tied_reused_and_broadcast_parameters_are_exact_and_batched():
    model, batch = double(), batch_of()
    out, report, result, loss = rows_of(model, batch)
    assert_equal(out, truth_of(model, batch, loss))
    assert list(out) == ["embed.weight", "position.weight", "reused.weight", "reused.bias", "norm.weight", "norm.bias"]
    assert report.parameters["embed.weight"].rule == "embedding+linear"
    assert report.per_sample == ()
    truth = float64_loop.causal_token_loss(copy.deepcopy(model).eval(), batch)
    assert torch.allclose(result.losses, truth.detach(), rtol=1e-12)
    assert result.n_targets.tolist() == (batch["attention_mask"].sum(1) - 1).tolist()


def test_a_row_does_not_depend_on_batch_mates_or_padding():
    model, batch = double(), batch_of(6, 8)
    alone, _, _, loss = rows_of(model, batch)
    with GradientEngine(model, loss) as engine:
        engine.probe(batch)
        out = engine.allocate(1)
        for i in range(6):
            length = int(batch["attention_mask"][i].sum())
            engine.rows({key: value[i : i + 1, :length] for key, value in batch.items()}, out)
            for name in out:
                assert torch.allclose(out[name][0], alone[name][i], rtol=1e-10, atol=1e-13), name


def test_a_batch_as_long_as_its_sequences_is_not_confused():
    model, batch = double(), batch_of(6, 6)
    out, _, _, loss = rows_of(model, batch)
    assert_equal(out, truth_of(model, batch, loss))


def test_two_samples_of_two_tokens_are_not_confused():
    model = double(model_zoo.Encoder(batch_first=False))
    batch = {key: value[:, :2] for key, value in model_zoo.masked(2).items()}
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    out, _, _, loss = rows_of(model, batch)
    assert_equal(out, truth_of(model, batch, loss))


def test_rows_are_written_into_slices_of_a_larger_buffer():
    model, batch = double(), batch_of(4)
    truth, _, _, loss = rows_of(model, batch)
    with GradientEngine(model, loss) as engine:
        engine.probe(batch)
        big = engine.allocate(10)
        for rows in big.values():
            rows.fill_(7.0)
        engine.rows(batch, {name: rows[3:9] for name, rows in big.items()})
    for name, rows in big.items():
        assert torch.equal(rows[3:7], truth[name])
        assert bool((rows[:3] == 7).all() and (rows[7:] == 7).all())


def test_flattened_tokens_are_told_apart():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

        def forward(self, input_ids):
            x = self.embed(input_ids.reshape(-1))
            return self.head(torch.tanh(self.mix(x))).view(*input_ids.shape, -1)

    model, batch = double(Flat()), batch_of(4, 5)
    out, report, _, loss = rows_of(model, batch)
    assert_equal(out, truth_of(model, batch, loss))
    assert report.per_sample == ()
    with GradientEngine(model, loss) as engine:  # a flat layout goes with the length of the batch
        engine.apply_routes(report)
        other = batch_of(3, 9)
        out = engine.allocate(3)
        engine.rows(other, out)
    assert_equal(out, truth_of(model, other, loss))


class Router(nn.Module):
    """Experts that see as many tokens as the router sends them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 11)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        flat = x.reshape(-1, x.shape[-1])
        weights = self.router(flat).softmax(-1)
        chosen, result = weights.argmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            where = (chosen == i).nonzero().flatten()
            if len(where):
                result = result.index_add(0, where, weights[where, i, None] * expert(flat[where]))
        return self.head(x + result.view_as(x))


@pytest.mark.parametrize("seed", range(4))
def test_routed_experts_are_exact(seed):
    model = double(Router(), seed)
    for batch in (batch_of(4, 5), batch_of(6, 4)):
        out, _, _, loss = rows_of(model, batch)
        assert_equal(out, truth_of(model, batch, loss))


def test_a_module_that_the_probe_never_met_is_taken_one_by_one():
    class Rare(Model):
        def __init__(self):
            super().__init__()
            self.rare = nn.Linear(6, 6)

        def forward(self, input_ids, attention_mask=None):
            y = super().forward(input_ids)
            if input_ids.shape[1] > 6:
                y = y + self.rare(self.embed(input_ids)).sum(-1, keepdim=True)
            return y * y

    model, batch = double(Rare()), batch_of(4, 6)
    out, report, _, loss = rows_of(model, batch)
    assert report.parameters["rare.weight"].rule == "unreached"
    assert report.parameters["rare.weight"].zero
    assert bool((out["rare.weight"] == 0).all())
    with GradientEngine(model, loss) as engine:
        engine.apply_routes(report)
        longer = batch_of(4, 8)
        out = engine.allocate(4)
        engine.rows(longer, out)
    assert float(out["rare.weight"].norm()) > 0
    assert_equal(out, truth_of(model, longer, loss))


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_in_torch_itself(batch_first):
    entry = next(e for e in model_zoo.ZOO if e.name == "nn.TransformerEncoder")
    model = model_zoo.Encoder(batch_first)
    outcome = zoo_check.compare(model, entry.batch(5), torch.float64)
    assert outcome.worst < 1e-10
    assert outcome.report.per_sample == ()


def test_parametrized_weights():
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 4))
    model = nn.Sequential(layer, nn.Tanh(), torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)))
    outcome = zoo_check.compare(model.eval(), {"input_ids": torch.randn(5, 6)}, torch.float64, squares)
    assert outcome.captured == outcome.trainable
    assert outcome.worst < 1e-10


# Selection


def test_include_exclude_and_frozen_parameters():
    model, batch = double(Model(tied=False)), batch_of()
    model.norm.weight.requires_grad_(False)
    truth = truth_of(model, batch, float64_loop.causal_token_loss)
    out, report, _, _ = rows_of(model, batch, include=("reused.*", "norm.*", "head.*"), exclude=("*.bias",))
    assert list(out) == ["reused.weight", "head.weight"]
    assert_equal(out, truth)
    assert report.excluded == {
        "embed.weight": "not in the included patterns",
        "position.weight": "not in the included patterns",
        "reused.bias": "excluded by pattern '*.bias'",
        "norm.weight": "frozen",
        "norm.bias": "excluded by pattern '*.bias'",
    }
    captured = sum(np.linalg.norm(truth[name][:2]) ** 2 for name in out)
    assert report.coverage_norm == pytest.approx(captured / sum(np.linalg.norm(r[:2]) ** 2 for r in truth.values()))
    assert report.coverage_parameters == pytest.approx((36 + 66) / (36 + 66 + 66 + 96 + 6 + 6))


def test_a_pattern_on_any_name_of_a_tied_parameter_counts():
    selection = select_parameters(Model(), include=("head.weight",))
    assert list(selection.tensors) == ["embed.weight"]
    assert [slot.name for slot in selection.slots] == ["embed.weight", "head.weight"]


def test_adapters_on_a_frozen_model():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.a, self.b = base, nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    model = Model()
    model.requires_grad_(False)
    model.reused = Adapter(model.reused)
    model, batch = double(model), batch_of()
    out, report, _, loss = rows_of(model, batch)
    assert list(out) == ["reused.a.weight", "reused.b.weight"]
    assert_equal(out, truth_of(model, batch, loss))
    assert report.coverage_parameters == 1.0


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.requires_grad_(False), "no trainable parameters"),
        (lambda m: m.to("meta"), "meta device"),
        (lambda m: m.register_parameter("c", nn.Parameter(torch.zeros(2, dtype=torch.complex64))), "complex"),
    ],
)
def test_models_that_cannot_be_captured_are_refused(change, message):
    model, batch = Model(), batch_of()
    loss = resolve_loss(model, batch)
    change(model)
    with pytest.raises(ModelError, match=message):
        GradientEngine(model, loss)


def test_integer_parameters_have_no_gradient():
    model = nn.Module()
    model.table = nn.Parameter(torch.arange(4), requires_grad=False)
    with pytest.raises(ModelError, match="no trainable parameters"):
        select_parameters(model)
    model.weight = nn.Parameter(torch.zeros(2))
    assert "integers" in select_parameters(model).excluded["table"]


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(ModelError, match=r"'hed\.\*' matches no parameter"):
        select_parameters(Model(), include=("hed.*",))
    with pytest.raises(ModelError, match="leave none of 6"):
        select_parameters(Model(), exclude=("*",))


# The probe


def test_a_wrong_rule_is_caught_and_replaced(monkeypatch):
    def wrong(module, x, d, names, sink):
        rules_module.write_linear(module, x, 1.001 * d, names, sink)

    linear = rules_module.Rule("linear", rules_module.RULES[0].matches, wrong)
    monkeypatch.setattr(rules_module, "RULES", [linear, *rules_module.RULES[1:]])
    model, batch = double(), batch_of()
    out, report, _, loss = rows_of(model, batch)
    assert_equal(out, truth_of(model, batch, loss))
    assert report.parameters["reused.weight"].rule == "generic"
    assert report.parameters["norm.weight"].rule == "layer_norm"


def test_what_no_rule_can_do_takes_a_pass_per_sample(monkeypatch):
    from streamfisher.gradients import capture

    def fails(*arguments):
        raise RuntimeError("no generic rule today")

    monkeypatch.setattr(capture, "per_sample_vjp", fails)
    monkeypatch.setattr(rules_module, "RULES", [r for r in rules_module.RULES if r.name != "linear"])
    model, batch = double(), batch_of()
    out, report, _, loss = rows_of(model, batch)
    assert_equal(out, truth_of(model, batch, loss))
    assert set(report.per_sample) == {"embed.weight", "reused.weight", "reused.bias"}
    assert "no generic rule today" in report.fallbacks["reused.weight"]
    assert "one pass per sample for 3" in report.summary()


def test_a_disagreement_on_every_path_stops_with_the_name(monkeypatch):
    model, batch = double(), batch_of()
    loss = resolve_loss(model, batch)
    one_by_one = PlainAutograd.one_by_one

    def wrong(self, batch, out, tensors, *projection):
        result = one_by_one(self, batch, out, tensors, *projection)
        for name in tensors:
            out[name].mul_(1.01)
        return result

    def scaled(module, x, d, names, sink):
        rules_module.write_linear(module, x, 2 * d, names, sink)

    monkeypatch.setattr(PlainAutograd, "one_by_one", wrong)
    monkeypatch.setattr("streamfisher.gradients.capture.per_sample_vjp", lambda *arguments: {})
    linear = rules_module.Rule("linear", rules_module.RULES[0].matches, scaled)
    monkeypatch.setattr(rules_module, "RULES", [linear, *rules_module.RULES[1:]])
    with GradientEngine(model, loss) as engine, pytest.raises(CaptureError, match=r"'embed\.weight'"):
        engine.probe(batch)


def test_the_guard_sees_rows_that_do_not_sum_to_the_batch_gradient():
    model, batch = double(), batch_of()
    with GradientEngine(model, resolve_loss(model, batch)) as engine:
        engine.probe(batch)
        out = engine.allocate(5)
        engine.rows(batch, out)
        assert max(engine.guard(batch, out).values()) < engine.tolerance
        out["reused.weight"][2] *= 1.001
        difference = engine.guard(batch, out)
    assert difference.pop("reused.weight") > engine.tolerance
    assert max(difference.values()) < engine.tolerance


def test_the_report_survives_json_and_gives_the_same_bits():
    model, batch = double(), batch_of()
    first, report, _, loss = rows_of(model, batch)
    stored = ProbeReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert stored == report
    with GradientEngine(model, loss) as engine:
        engine.apply_routes(stored)
        out = engine.allocate(5)
        engine.rows(batch, out)
    assert all(torch.equal(out[name], first[name]) for name in out)
    assert "100.00% of the trainable parameters" in report.summary()


def test_routes_of_another_model_are_refused():
    model, batch = double(), batch_of()
    _, report, _, _ = rows_of(model, batch)
    other = double(Model(tied=False))
    with (
        GradientEngine(other, resolve_loss(other, batch)) as engine,
        pytest.raises(CaptureError, match=r"head\.weight"),
    ):
        engine.apply_routes(report)


def test_rows_need_a_probe_and_a_context():
    model, batch = double(), batch_of()
    engine = GradientEngine(model, resolve_loss(model, batch))
    with pytest.raises(CaptureError, match="with statement"):
        engine.probe(batch)
    with engine, pytest.raises(CaptureError, match="Call probe"):
        engine.rows(batch, engine.allocate(5))


def test_a_zero_gradient_is_a_zero_row_and_said_so():
    class Dead(Model):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids) + 0 * self.norm(self.embed(input_ids)).sum(-1, keepdim=True)

    model, batch = double(Dead(tied=False)), batch_of()
    model.unused = nn.Linear(3, 3).double()
    with torch.no_grad():
        model.reused.weight.zero_(), model.reused.bias.zero_()
    out, report, _, loss = rows_of(model, batch)
    assert_equal(out, truth_of(model, batch, loss))
    assert report.parameters["unused.weight"].zero
    assert report.parameters["norm.weight"].rule == "layer_norm"
    assert bool((out["unused.weight"] == 0).all())
    assert "zero gradient: 4" in report.summary()


@pytest.mark.parametrize("batched", [True, False])
def test_a_tiny_gradient_is_not_mistaken_for_rounding(monkeypatch, batched):
    class Hidden(nn.Module):
        """Uses a layer's weight without calling the layer, and hardly."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return x + 1e-9 * torch.tanh(x @ self.layer.weight)

    if not batched:

        def fails(*arguments):
            raise RuntimeError("no generic rule today")

        monkeypatch.setattr("streamfisher.gradients.capture.per_sample_vjp", fails)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Hidden(), nn.Linear(6, 3))
    batch = {"input_ids": torch.randn(4, 6)}
    out, report, _, loss = rows_of(model, batch, squares)
    assert report.parameters["1.layer.weight"].rule == ("generic" if batched else "per_sample")
    assert_equal(out, truth_of(model, batch, loss), 1e-5)


# Losses that cannot be taken apart


@pytest.mark.parametrize("kind", ["contrastive", "batch mean", "batch norm without statistics"])
def test_a_loss_that_couples_samples_is_refused(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    if kind.startswith("batch norm"):
        model.insert(1, nn.BatchNorm1d(4, track_running_stats=False))

    def contrastive(model, batch):
        y = model(batch["input_ids"])
        return -(y @ y.T).log_softmax(-1).diagonal() + y.square().sum(1)

    def centered(model, batch):
        y = model(batch["input_ids"])
        return (y - 0.1 * y.mean(0)).square().sum(1)

    batch = {"input_ids": torch.randn(4, 6)}
    loss = {"contrastive": contrastive, "batch mean": centered}.get(kind, squares)
    if kind.startswith("batch norm"):  # alone, a sample has no variance at all, and torch itself refuses
        with pytest.raises((LossError, ValueError)):
            rows_of(model, batch, loss)
        return
    with pytest.raises(LossError, match="couples samples"):
        rows_of(model, batch, loss)


def test_a_random_loss_is_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    model = Noisy(6, 3)
    with pytest.raises(LossError, match="random even in eval mode"):
        rows_of(model, {"input_ids": torch.randn(4, 6)}, squares)


def test_a_forward_that_ignores_the_batch_axis_is_refused():
    class First(nn.Linear):
        def forward(self, x):
            return super().forward(x[:1])

    batch = {"input_ids": torch.randn(4, 6), "labels": torch.tensor([0, 1, 2, 0])}
    with pytest.raises(LossError, match="ignores the batch axis"):
        rows_of(First(6, 3), batch, "classification")


def test_a_model_with_only_a_scalar_loss_is_taken_one_at_a_time():
    class Scalar(Model):
        def forward(self, input_ids, labels):
            logits = super().forward(input_ids)
            return {"loss": nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:])}

    model, batch = double(Scalar()), batch_of()
    batch["labels"] = batch["input_ids"]
    out, report, result, loss = rows_of(model, batch)
    assert loss.name == "model"
    assert loss.metadata()["loss_reduction"] == "model"
    assert set(report.rules()) == {"per_sample"}
    assert_equal(out, truth_of(model, batch, loss))
    assert result.losses.shape == (5,)


# Factors


def test_factors_multiply_to_the_rows():
    model, batch = double(Model(tied=False)), batch_of()
    rows, _, _, loss = rows_of(model, batch)
    with GradientEngine(model, loss) as engine:
        engine.probe(batch)
        assert {"reused.weight", "head.weight", "embed.weight"} <= set(engine.factorable)
        others = {name: r for name, r in engine.allocate(5).items() if name not in engine.factorable}
        found = engine.rows(batch, others, engine.factorable).factors
        assert set(found) == set(engine.factorable)
        for name, pairs in found.items():
            product = factors.product(pairs, engine.parameters[name].shape, torch.float64)
            assert torch.allclose(product, rows[name], rtol=1e-12, atol=1e-14)
            assert torch.allclose(factors.squared_norms(pairs), rows[name].square().sum(1), rtol=1e-12)
            assert torch.allclose(
                factors.total(pairs, engine.parameters[name].shape, torch.float64), rows[name].sum(0), atol=1e-13
            )
        for name, values in others.items():
            assert torch.equal(values, rows[name])


def test_a_tied_weight_has_a_pair_for_each_use():
    model, batch = double(), batch_of()
    rows, _, _, loss = rows_of(model, batch)
    with GradientEngine(model, loss) as engine:
        engine.probe(batch)
        pairs = engine.rows(batch, {}, ["embed.weight"]).factors["embed.weight"]
        assert sorted(pair.by_index for pair in pairs) == [False, True]
        product = factors.product(pairs, engine.parameters["embed.weight"].shape, torch.float64)
        assert torch.allclose(product, rows["embed.weight"], rtol=1e-12, atol=1e-14)
        assert torch.allclose(factors.squared_norms(pairs), rows["embed.weight"].square().sum(1), rtol=1e-12)


def test_packed_factors_leave_out_padding_and_share_inputs():
    model, batch = double(Model(tied=False)), batch_of()
    lengths = [6, 3, 5, 2, 4]
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < torch.tensor(lengths)[:, None]).long()
    rows, _, _, loss = rows_of(model, batch)
    with GradientEngine(model, loss) as engine:
        engine.probe(batch)
        found = engine.rows(batch, {}, ["head.weight"]).factors
        packed = factors.pack({"head.weight": found["head.weight"], "again": found["head.weight"]}, dropped=[4])
    assert packed.pairs["again"] == packed.pairs["head.weight"]
    assert len(packed.tensors) == 2
    left, right = packed.pairs["head.weight"][0]
    assert packed.lengths[left] == packed.lengths[right] == (5, 2, 4, 1, 0)
    start = 0
    for i, length in enumerate(packed.lengths[left][:4]):
        row = packed.tensors[left][start : start + length].T @ packed.tensors[right][start : start + length]
        assert torch.allclose(row.flatten(), rows["head.weight"][i], rtol=1e-12, atol=1e-14)
        start += length


def test_what_counts_is_found_wherever_a_sample_ends():
    lengths = [40, 3, 24, 0, 25, 39]  # of 40, whose end is looked at first
    left, right = torch.zeros(6, 40, 2), torch.zeros(6, 40, 3)
    for sample, length in enumerate(lengths):
        left[sample, :length] = right[sample, :length] = -1.0
    empty = factors.FactorPair(left[:, :0], right[:, :0])
    packed = factors.pack({"a": [factors.FactorPair(left, right)], "b": [empty]})
    assert packed.lengths["a~L0"] == packed.lengths["a~R0"] == tuple(lengths)
    assert packed.lengths["b~L0"] == (0,) * 6
    assert torch.equal(packed.tensors["a~R0"], torch.full((sum(lengths), 3), -1.0))
    full = factors.FactorPair(left[[0, 5]], torch.ones(2, 40, 3))
    assert factors.pack({"a": [full]}).lengths["a~R0"] == (40, 40)  # all but a little: nothing is cut off


def test_a_pass_that_captures_only_the_top_stops_there():
    model, batch = double(Model(tied=False)), batch_of()
    rows, _, _, loss = rows_of(model, batch)
    with GradientEngine(model, loss) as engine:
        engine.probe(batch)
        out = {"head.weight": engine.allocate(5)["head.weight"]}
        seen = []
        handle = model.reused.register_full_backward_hook(lambda *_: seen.append("reused"))
        engine.rows(batch, out)
        handle.remove()
    assert torch.equal(out["head.weight"], rows["head.weight"])
    assert not seen


@pytest.mark.parametrize("tied", [True, False])
def test_a_probe_in_parts_finds_what_a_probe_at_once_finds(tied):
    model, batch = double(Model(tied=tied)), batch_of()
    loss = resolve_loss(model, batch)
    with GradientEngine(model, loss, exclude=["norm.bias"]) as engine:
        at_once = engine.probe(batch, memory=1 << 30).to_dict()
        in_parts = engine.probe(batch, memory=1).to_dict()  # a parameter at a time
    by_site = [sorted(found.pop("groups"), key=json.dumps) for found in (at_once, in_parts)]
    assert len(by_site[1]) >= len(by_site[0])
    assert at_once["parameters"].keys() == in_parts["parameters"].keys()
    for name, expected in at_once["parameters"].items():
        found = in_parts["parameters"][name]
        assert (found["rule"], found["share"]) == (expected["rule"], pytest.approx(expected["share"], rel=1e-12))
    assert in_parts["coverage_norm"] == pytest.approx(at_once["coverage_norm"], rel=1e-12)
