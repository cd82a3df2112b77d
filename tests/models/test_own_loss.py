"""The per-sample loss must be the one that the model computes itself, whatever its class is called."""

import pytest
import torch
import transformers
from torch import nn

import streamfisher as sf
from streamfisher.errors import LossError
from streamfisher.models import resolve_loss
from streamfisher.models.own_loss import reproducing


def masked(n=3, length=12, n_masked=3):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (n, length), generator=generator)
    labels = torch.full_like(ids, -100)
    for row in range(n):
        places = torch.randperm(length, generator=generator)[:n_masked]
        labels[row, places] = ids[row, places]
        ids[row, places] = 4
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def own_sums(model, batch):
    losses = []
    for row in range(len(batch["labels"])):
        sample = {key: value[row : row + 1] for key, value in batch.items()}
        with torch.no_grad():
            losses.append(model(**sample).loss * int((sample["labels"] != -100).sum()))
    return torch.stack(losses)


def xlm():
    return transformers.XLMWithLMHeadModel(
        transformers.XLMConfig(vocab_size=60, emb_dim=16, n_layers=1, n_heads=2, n_langs=1)
    )


def flaubert():
    return transformers.FlaubertWithLMHeadModel(
        transformers.FlaubertConfig(vocab_size=60, emb_dim=16, n_layers=1, n_heads=2, n_langs=1)
    )


def xlnet():
    return transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=60, d_model=16, n_layer=1, n_head=2, d_inner=24)
    )


@pytest.mark.parametrize("make", [xlm, flaubert, xlnet])
def test_an_aligned_model_is_not_shifted_because_of_its_name(make):
    torch.manual_seed(0)
    model, batch = make().eval(), masked()
    loss = reproducing(model, batch, resolve_loss(model, batch))
    assert loss.name == "token" and "computes itself" in loss.reason
    assert torch.allclose(loss(model, batch), own_sums(model, batch), rtol=1e-4)


def test_a_causal_model_stays_causal_whatever_its_padding():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    batch = {"input_ids": torch.randint(5, 60, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    batch["attention_mask"][0, 5:] = 0
    batch["attention_mask"][1, :3] = 0
    model.train()
    chosen = resolve_loss(model, batch)
    assert reproducing(model, batch, chosen) is chosen and chosen.name == "causal"
    assert model.training


def bert(**options):
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **options
        )
    )


def test_labels_of_several_classes_at_once_are_no_regression(tmp_path):
    model = bert(num_labels=4, problem_type="multi_label_classification")
    data = {"input_ids": torch.randint(5, 60, (8, 9)), "labels": torch.randint(0, 2, (8, 4)).float()}
    with pytest.raises(LossError, match=r"computes a loss of 0\.\d+ .* gives \d\.\d+ as a sum.*loss='model'"):
        sf.collect(model, data, tmp_path / "run.zarr")
    run = sf.collect(model, data, tmp_path / "run.zarr", config=sf.SpectralConfig(loss="model"))
    with torch.no_grad():
        own = model.eval()(input_ids=data["input_ids"][:1], labels=data["labels"][:1]).loss
    assert run.losses[0] == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("n_labels", [1, 3])
def test_a_regression_of_the_model_s_own_is_taken(n_labels):
    model = bert(num_labels=n_labels, problem_type="regression")
    batch = {"input_ids": torch.randint(5, 60, (3, 9)), "labels": torch.randn(3, n_labels).squeeze(1)}
    chosen = resolve_loss(model, batch)
    assert reproducing(model, batch, chosen) is chosen and chosen.name == "regression"


def test_a_loss_named_by_the_user_is_theirs():
    torch.manual_seed(0)
    model, batch = xlm().eval(), masked()
    named = resolve_loss(model, batch, "causal")
    assert reproducing(model, batch, named) is named


def test_one_logit_with_labels_of_zero_and_one_is_asked_about():
    model, batch = nn.Linear(5, 1), {"x": torch.randn(4, 5), "labels": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    with pytest.raises(LossError, match="loss='regression'"):
        resolve_loss(model, batch)
    assert resolve_loss(model, batch, "regression").name == "regression"
    assert resolve_loss(model, {**batch, "labels": torch.tensor([0.0, 1.5, 0.0, 1.0])}).name == "regression"


class WithLabels(nn.Module):
    """Computes a loss of its own by what it is given."""

    def __init__(self, compute):
        super().__init__()
        self.body, self.compute = nn.Linear(6, 3), compute

    def forward(self, input, labels=None):
        logits = self.body(input)
        return {"loss": self.compute(logits, labels), "logits": logits} if labels is not None else logits


def fails(error):
    def compute(logits, labels):
        raise error

    return compute


BATCH = {"input": torch.ones(2, 6), "labels": torch.tensor([0, 2])}


def test_labels_that_the_models_own_loss_cannot_take_are_warned_of():
    model = WithLabels(fails(ValueError("labels must be one-hot\nand more")))
    chosen = resolve_loss(model, BATCH)
    assert chosen.name == "classification"
    with pytest.warns(UserWarning, match=r"WithLabels computes no loss .*ValueError: labels must be one-hot\), so the"):
        assert reproducing(model, BATCH, chosen) is chosen


def test_memory_that_runs_out_in_the_models_own_loss_is_not_taken_for_a_loss_that_it_lacks():
    model = WithLabels(fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")))
    with pytest.raises(torch.OutOfMemoryError):
        reproducing(model, BATCH, resolve_loss(model, BATCH))
