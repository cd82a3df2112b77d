"""Per-sample losses: choice, sums, masks, shifts, and what is refused."""

import float64_loop
import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from streamfisher.errors import DataError, LossError
from streamfisher.models import call_model, draw_labels, find_logits, resolve_loss, sample_of, sample_seed


class Tokens(nn.Module):
    def __init__(self, vocabulary=7, width=5):
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embed(input_ids).cumsum(1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tokens().double()


def tokens(n=3, length=6):
    return {"input_ids": torch.randint(0, 7, (n, length), generator=torch.Generator().manual_seed(1))}


def test_a_causal_loss_is_the_masked_sum_and_never_the_mean(model):
    batch = tokens()
    batch["attention_mask"] = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    loss = resolve_loss(model, batch)
    assert loss.name == "causal"
    assert torch.allclose(loss(model, batch), float64_loop.causal_token_loss(model, batch), rtol=1e-14)
    assert loss.n_targets(batch).tolist() == [5, 3, 1]
    assert loss.metadata()["loss_reduction"].startswith("sum over target tokens")


def test_left_padding_changes_nothing(model):
    batch = {**tokens(1), "attention_mask": torch.ones(1, 6, dtype=torch.int64)}

    class Ignoring(Tokens):
        def forward(self, input_ids, attention_mask=None):
            return self.head(self.embed(input_ids))

    model = Ignoring().double()
    loss = resolve_loss(model, batch)
    padded = {key: torch.cat([torch.zeros(1, 2, dtype=torch.int64), value], 1) for key, value in batch.items()}
    assert torch.allclose(loss(model, padded), loss(model, batch))
    assert loss.n_targets(padded).tolist() == [5]


def test_labels_of_minus_100_are_no_targets(model):
    batch = tokens()
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    batch["labels"] = labels
    loss = resolve_loss(model, batch)
    assert loss.name == "causal"  # labels equal the inputs wherever they count
    logits = model(batch["input_ids"])
    truth = nn.functional.cross_entropy(logits[:, 3:5].transpose(1, 2), labels[:, 4:], reduction="none").sum(1)
    assert torch.allclose(loss(model, batch), truth)


def test_labels_other_than_the_inputs_are_aligned(model):
    batch = {**tokens(), "labels": (tokens()["input_ids"] + 1) % 7}
    loss = resolve_loss(model, batch)
    assert loss.name == "token"
    truth = nn.functional.cross_entropy(
        model(batch["input_ids"]).transpose(1, 2), batch["labels"], reduction="none"
    ).sum(1)
    assert torch.allclose(loss(model, batch), truth)
    model.is_causal = True
    assert resolve_loss(model, batch).name == "causal"
    assert resolve_loss(model, batch, "token").name == "token"


def test_class_names_decide():
    for name, expected in (("TinyForCausalLM", "causal"), ("TinyForMaskedLM", "token")):
        model = type(name, (Tokens,), {})()
        assert resolve_loss(model, {**tokens(), "labels": tokens()["input_ids"]}).name == expected


def test_the_mode_is_restored_by_the_choice(model):
    model.train()
    model.head.eval()
    resolve_loss(model, tokens())
    assert model.training and not model.head.training


def test_classification_and_regression():
    model = nn.Linear(4, 3).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    batch = {"input_ids": x, "labels": torch.tensor([0, 1, 2, 0, 1])}
    loss = resolve_loss(model, batch)
    assert loss.name == "classification"
    assert torch.allclose(loss(model, batch), nn.functional.cross_entropy(model(x), batch["labels"], reduction="none"))
    assert loss.n_targets(batch).tolist() == [1] * 5
    y = torch.randn(5, 3, dtype=torch.float64)
    loss = resolve_loss(model, {"input_ids": x, "labels": y})
    assert loss.name == "regression"
    assert torch.allclose(loss(model, {"input_ids": x, "labels": y}), 0.5 * (y - model(x)).square().sum(1))
    single = nn.Linear(4, 1).double()
    batch = {"input_ids": x, "labels": y[:, 0]}
    assert torch.allclose(resolve_loss(single, batch)(single, batch), 0.5 * (y[:, 0] - single(x)[:, 0]).square())


def test_float_inputs_are_their_own_labels_where_shapes_allow():
    batch = {"input_ids": torch.randn(3, 4)}
    assert resolve_loss(nn.Linear(4, 4), batch).name == "regression"
    with pytest.raises(LossError, match="Add labels"):
        resolve_loss(nn.Linear(4, 2), batch)


def test_a_users_own_loss():
    model, batch = nn.Linear(4, 2), {"input_ids": torch.randn(3, 4)}

    def good(model, batch):
        return model(batch["input_ids"]).square().sum(1)

    loss = resolve_loss(model, batch, good)
    assert loss.name.startswith("user:") and loss.name.endswith("good")
    assert loss(model, batch).shape == (3,)
    with pytest.raises(LossError, match="reduction='none'"):
        resolve_loss(model, batch, lambda model, batch: good(model, batch).mean())(model, batch)
    with pytest.raises(LossError, match=r"shape \(3, 2\)"):
        resolve_loss(model, batch, lambda model, batch: model(batch["input_ids"]))(model, batch)
    with pytest.raises(LossError, match="must return a tensor"):
        resolve_loss(model, batch, lambda model, batch: [1.0])(model, batch)
    with pytest.raises(LossError, match="'mse' is unknown"):
        resolve_loss(model, batch, "mse")


def test_samples_without_targets_are_named(model):
    batch = tokens()
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][1] = -100
    loss = resolve_loss(model, batch, "causal")
    with pytest.raises(LossError, match="no target") as caught:
        loss(model, batch)
    assert caught.value.samples == [1]


def test_labels_out_of_range_are_named(model):
    batch = tokens()
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][2, 3] = 9
    with pytest.raises(LossError, match=r"Label 9 in sample 2 .* 7 classes") as caught:
        resolve_loss(model, batch, "causal")(model, batch)
    assert caught.value.samples == [2]


def test_cross_entropy_is_at_least_float32():
    model = Tokens().bfloat16()
    assert resolve_loss(model, tokens())(model, tokens()).dtype == torch.float32


def test_logits_are_found_wherever_they_are():
    logits = torch.zeros(2, 3)

    class Output:
        pass

    output = Output()
    output.logits = logits
    for found in (logits, output, {"logits": logits}, (logits, 1)):
        assert find_logits(found) is logits
    assert find_logits(torch.zeros(())) is None


def test_call_model_gives_what_the_forward_takes(model):
    seen = {}

    class Takes(nn.Module):
        def forward(self, x, mask=None, *, attention_mask=None):
            seen.update(x=x, mask=mask, attention_mask=attention_mask)
            return x

    batch = {**tokens(), "attention_mask": 1, "labels": 2, "index": 3}
    call_model(Takes(), batch)
    assert torch.equal(seen["x"], batch["input_ids"]) and seen["attention_mask"] == 1 and seen["mask"] is None

    class TakesAll(nn.Module):
        def forward(self, **everything):
            return everything

    assert set(call_model(TakesAll(), batch)) == {"input_ids", "attention_mask", "index"}
    assert torch.equal(call_model(nn.Identity(), {"pixels": batch["input_ids"]}), batch["input_ids"])
    with pytest.raises(LossError, match="takes nothing"):
        call_model(nn.Identity(), {"labels": 1})


def test_user_dicts_and_wrong_batch_axes(model):
    batch = BatchEncoding(tokens())
    assert resolve_loss(model, batch)(model, batch).shape == (3,)
    with pytest.raises(DataError, match=r"mask has shape \(2, 6\)"):
        sample_of({**tokens(), "mask": torch.ones(2, 6)}, 0)


def test_a_model_without_a_head_is_refused():
    class Headless(nn.Module):
        def forward(self, input_ids):
            return {"last_hidden_state": input_ids}

    with pytest.raises(LossError, match="neither logits nor a loss"):
        resolve_loss(Headless(), tokens())


# labels='model'


def test_drawn_labels_do_not_depend_on_the_batch_or_its_padding(model):
    batch = {**tokens(), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    loss = resolve_loss(model, batch)
    seeds = [sample_seed(42, i) for i in range(3)]
    together = draw_labels(model, batch, loss, seeds)["labels"]
    for i in range(3):
        alone = draw_labels(model, sample_of(batch, i), loss, seeds[i : i + 1])["labels"]
        assert torch.equal(alone[0], together[i])
    padded = {key: torch.cat([value, torch.zeros_like(value)[:, :2]], 1) for key, value in batch.items()}
    assert torch.equal(draw_labels(model, padded, loss, seeds)["labels"][:, :6], together)
    assert bool((together[:, 0] == -100).all() and (together[:, 1:] >= 0).all())
    assert loss.n_targets({**batch, "labels": together}).tolist() == [5, 5, 5]
    assert sample_seed(42, 1) != sample_seed(43, 1) != sample_seed(43, 2)


def test_drawn_labels_follow_the_models_distribution():
    model = nn.Linear(2, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
    batch = {"input_ids": torch.zeros(4000, 2), "labels": torch.zeros(4000, dtype=torch.int64)}
    drawn = draw_labels(model, batch, resolve_loss(model, batch), [sample_seed(0, i) for i in range(4000)])["labels"]
    frequency = drawn.bincount(minlength=3) / 4000
    assert torch.allclose(frequency, torch.tensor([0.2, 0.3, 0.5]), atol=0.03)
    targets = {"input_ids": torch.zeros(2000, 2), "labels": torch.zeros(2000, 3)}
    noise = draw_labels(model, targets, resolve_loss(model, targets), [sample_seed(1, i) for i in range(2000)])
    residual = noise["labels"] - model(targets["input_ids"]).detach()
    assert abs(float(residual.mean())) < 0.05 and abs(float(residual.std()) - 1) < 0.05


def test_a_loss_without_a_distribution_draws_no_labels():
    model, batch = nn.Linear(4, 2), {"input_ids": torch.randn(3, 4)}
    loss = resolve_loss(model, batch, lambda model, batch: model(batch["input_ids"]).sum(1))
    with pytest.raises(LossError, match="predictive distribution"):
        draw_labels(model, batch, loss, [0, 1, 2])


def test_an_encoder_decoder_is_given_its_labels_and_its_mean_loss_is_not_used():
    from gradients import model_zoo

    entry = next(e for e in model_zoo.ZOO if e.name == "T5")
    model, batch = model_zoo.build(entry).eval(), entry.batch(3)
    loss = resolve_loss(model, batch)
    assert loss.name == "token" and loss.labels_to_model
    batch["labels"] = batch["labels"].contiguous()
    logits = model(**batch).logits
    truth = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none")
    assert torch.allclose(loss(model, batch), truth.sum(1), rtol=1e-5)
    assert loss.n_targets(batch).tolist() == (batch["labels"] != -100).sum(1).tolist()
