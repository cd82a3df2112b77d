"""Checkpointing, compilation, precision, hooks and modes: what a model may bring along, and what is given back."""

import float64_loop
import numpy as np
import pytest
import torch
from gradients import model_zoo, zoo_check
from gradients.token_model import Model, assert_equal, batch_of, double, rows_of, squares, truth_of
from torch import nn

from streamfisher.gradients import FLOOR, TOLERANCE, GradientEngine
from streamfisher.models import resolve_loss

# Checkpointing, compilation, precision


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("exclude", [(), ("embed*",)])
def test_gradient_checkpointing(reentrant, exclude):
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Model):
        gradient_checkpointing = True

        def forward(self, input_ids, attention_mask=None):
            def block(x):
                return x + torch.tanh(self.reused(self.norm(x)))

            x = self.embed(input_ids)
            for _ in range(2):
                x = checkpoint(block, x, use_reentrant=reentrant) if self.checkpointing else block(x)
            return self.head(x)

    model, batch = double(Checkpointed(tied=False)), batch_of()
    model.checkpointing = False
    truth = truth_of(model, batch, resolve_loss(model, batch))
    model.checkpointing = True
    out, report, _, _ = rows_of(model, batch, exclude=exclude)
    assert report.parameters["reused.weight"].rule == "linear"
    assert_equal(out, truth)


def test_checkpointing_drops_the_saved_inputs():
    from torch.utils.checkpoint import checkpoint

    held = []

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, input_ids):
            def block(x):
                hidden = torch.relu(self.first(x))
                held.append(hidden.untyped_storage()._weak_ref())
                return self.second(hidden)

            return checkpoint(block, input_ids, use_reentrant=False)

    model = Deep()
    batch = {"input_ids": torch.randn(4, 6)}

    def loss(model, batch):
        values = squares(model, batch)
        alive.append(torch.UntypedStorage._new_with_weak_ptr(held[-1]) is not None)
        return values

    alive = []
    with GradientEngine(model, resolve_loss(model, batch, loss)) as engine:
        engine.probe(batch)
        engine.rows(batch, engine.allocate(4))
    assert alive[-1] is False


def test_a_compiled_model_is_run_eagerly():
    model, batch = double(), batch_of()
    compiled = torch.compile(model, backend="eager")
    out, report, _, loss = rows_of(compiled, batch)
    assert_equal(out, truth_of(model, batch, loss))
    assert "embed.weight" in out
    assert "run eagerly" in report.summary()


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_module_is_run_eagerly(how):
    model, batch = double(), batch_of()
    truth = truth_of(model, batch, resolve_loss(model, batch))
    if how == "wrapped":
        model.reused = torch.compile(model.reused, backend="eager")
        truth = {name.replace("reused.", "reused._orig_mod."): rows for name, rows in truth.items()}
    else:
        model.reused.compile(backend="eager")
    out, report, _, _ = rows_of(model, batch)
    assert_equal(out, truth)
    assert report.per_sample == ()
    assert "compiled modules are run eagerly" in report.summary()
    assert torch.compiler.is_compiling() is False


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 6e-2), (torch.float16, 2e-2)])
def test_half_precision_models_have_float32_rows(dtype, limit):
    torch.manual_seed(0)
    model, batch = Model().to(dtype), batch_of()
    out, report, _, loss = rows_of(model, batch)
    truth = truth_of(model, batch, loss)
    for name, rows in out.items():
        assert rows.dtype == torch.float32
        assert np.linalg.norm(rows.double().numpy() - truth[name]) < limit * np.linalg.norm(truth[name]), name
    assert "per_sample" not in report.rules()


def test_autocast():
    torch.manual_seed(0)
    model, batch = Model(), batch_of()
    loss = resolve_loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        out, _, _, _ = rows_of(model, batch, loss)
    truth = truth_of(model, batch, loss)
    for name, rows in out.items():
        assert np.linalg.norm(rows.double().numpy() - truth[name]) < 6e-2 * np.linalg.norm(truth[name]), name


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_low_precision_rows_agree_with_autograd_of_the_same_dtype(how):
    entry = next(e for e in model_zoo.ZOO if e.name == "Llama")
    model, batch = model_zoo.build(entry), entry.batch(5)
    dtype = torch.bfloat16 if how == "autocast" else getattr(torch, how)
    model = model if how == "autocast" else model.to(dtype)
    loss = resolve_loss(model, batch)
    with torch.autocast("cpu", dtype, enabled=how == "autocast"):
        out, report, _, _ = rows_of(model, batch, loss)
        alone = model.eval()
        truth = {name: [] for name in out}
        for i in range(5):
            sample = {key: value[i : i + 1] for key, value in batch.items()}
            grads = torch.autograd.grad(loss(alone, sample).sum(), list(alone.parameters()))
            for (name, _), grad in zip(alone.named_parameters(), grads, strict=True):
                truth[name].append(grad.flatten())
    assert report.per_sample == ()
    assert report.tolerance == TOLERANCE[dtype]
    whole = torch.cat([torch.cat(grads) for grads in truth.values()]).double().norm()
    for name, rows in out.items():
        expected = torch.stack(truth[name]).double()
        assert rows.dtype == torch.float32
        error = (rows.double() - expected).norm()
        assert error <= report.tolerance * expected.norm() or error <= FLOOR[dtype] * whole, name


def test_float64_rows_of_a_float32_model():
    torch.manual_seed(0)
    model, batch = Model(), batch_of()
    out, _, _, _ = rows_of(model, batch, dtype_compute=torch.float64)
    assert {rows.dtype for rows in out.values()} == {torch.float64}


def test_deterministic_rows_are_bit_identical():
    entry = next(e for e in model_zoo.ZOO if e.name == "Llama")
    model, batch = model_zoo.build(entry), entry.batch(4)
    first, _, _, _ = rows_of(model, batch, deterministic=True)
    second, _, _, _ = rows_of(model, batch, deterministic=True)
    assert all(torch.equal(first[name], second[name]) for name in first)


# Nothing of the user's model changes


def state_of(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_same_state(before, after):
    assert before[:-1] == after[:-1]
    assert all(torch.equal(value, after[-1][name]) for name, value in before[-1].items())


def test_the_model_is_restored():
    model, batch = double(), batch_of()
    model.train()
    model.norm.eval()
    model.position.weight.requires_grad_(False)
    before = state_of(model)
    rows_of(model, batch, deterministic=True)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("when", ["probe", "rows", "body"])
def test_the_model_is_restored_after_an_exception(when):
    model, batch = double().train(), batch_of()
    model.position.weight.requires_grad_(False)
    before = state_of(model)
    armed = []

    def loss(model, batch):
        values = float64_loop.causal_token_loss(model, batch)
        if armed:
            raise KeyboardInterrupt
        return values

    engine = GradientEngine(model, resolve_loss(model, batch, loss), deterministic=True)
    with pytest.raises(KeyboardInterrupt), engine:
        if when == "probe":
            armed.append(True)
        engine.probe(batch)
        armed.append(True)
        if when == "body":
            raise KeyboardInterrupt
        engine.rows(batch, engine.allocate(5))
    assert_same_state(before, state_of(model))
    armed.clear()
    with engine:  # and the engine can be used again
        engine.probe(batch)


def test_a_user_dict_is_a_batch():
    from transformers import BatchEncoding

    model, batch = double(), batch_of()
    out, _, _, loss = rows_of(model, BatchEncoding(batch))
    assert_equal(out, truth_of(model, batch, loss))


def test_a_model_in_train_mode_is_evaluated_in_eval_and_this_is_said():
    model, batch = double().train(), batch_of()
    out, report, _, loss = rows_of(model, batch)
    assert_equal(out, truth_of(model, batch, loss))  # the truth is taken in eval mode
    (note,) = report.notes
    assert note == "the model is in train mode and is evaluated in eval mode: dropout is off in 1 modules"
    assert note in report.summary()
    assert note in report.to_dict()["notes"]
    assert model.training and model.dropout.training
    _, report, _, _ = rows_of(model.eval(), batch)
    assert report.notes == ()


def test_batch_norm_in_train_mode_uses_its_running_statistics():
    entry = next(e for e in model_zoo.ZOO if e.name == "ResNet")
    model = model_zoo.build(entry)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    _, report, _, _ = rows_of(model, entry.batch(4))
    assert "running statistics are used in 2 batch norms" in report.summary()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_users_own_hooks_stay_and_count():
    """A forward hook that changes an output belongs to the model; one that only looks goes on looking."""
    model, batch = double(), batch_of()
    seen = []
    model.reused.register_forward_hook(lambda module, args, output: 1.5 * output)
    model.norm.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    model.reused.register_forward_hook(lambda module, args, output: seen.append("forward"))
    model.reused.register_full_backward_hook(lambda module, into, out: seen.append("backward"))
    hooks = [dict(m._forward_hooks) | dict(m._forward_pre_hooks) | dict(m._backward_hooks) for m in model.modules()]
    out, _, _, loss = rows_of(model, batch)
    assert {"forward", "backward"} <= set(seen)
    assert hooks == [
        dict(m._forward_hooks) | dict(m._forward_pre_hooks) | dict(m._backward_hooks) for m in model.modules()
    ]
    assert_equal(out, truth_of(model, batch, loss))


def test_hooks_on_gradients_of_parameters_rest_meanwhile():
    model, batch = double(), batch_of()
    truth = truth_of(model, batch, resolve_loss(model, batch))
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.reused.weight.register_hook(lambda grad: 3 * grad)

    def step(parameter):  # an optimiser that steps inside the backward pass
        with torch.no_grad():
            parameter.sub_(0.1 * parameter.grad)

    handle = model.reused.bias.register_post_accumulate_grad_hook(step)
    out, report, _, _ = rows_of(model, batch)
    assert_equal(out, truth)
    assert report.per_sample == ()
    assert "hooks on parameters' gradients are switched off" in report.summary()
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
    model.eval()(batch["input_ids"]).sum().backward()  # and they are back
    plain = double().eval()
    plain(batch["input_ids"]).sum().backward()
    assert torch.allclose(model.reused.weight.grad, 3 * plain.reused.weight.grad)
    assert not torch.equal(model.reused.bias, values["reused.bias"])
    handle.remove()


# Packed sequences


def test_packed_sequences_have_the_sum_of_their_documents_gradients():
    entry = next(e for e in model_zoo.ZOO if e.name == "Llama")
    model = model_zoo.build(entry).double()
    lengths = [[3, 4], [2, 5], [7], [4, 3]]
    ids = torch.randint(3, model_zoo.V, (4, 7), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
    with zoo_check.double_throughout():
        out, report, result, loss = rows_of(model, batch)
        assert loss.name == "causal"
        assert report.per_sample == ()
        assert_equal(out, truth_of(model, batch, loss))
        assert result.n_targets.tolist() == [7 - len(row) for row in lengths]
        for i, row in enumerate(lengths):
            documents = torch.split(ids[i], row)
            alone = float64_loop.gradient_rows(
                model, [{"input_ids": document} for document in documents], float64_loop.causal_token_loss
            )
            for name, rows in out.items():
                total = alone[name].sum(0)
                assert np.linalg.norm(rows[i].numpy() - total) <= 1e-10 * max(np.linalg.norm(total), 1e-6), name
