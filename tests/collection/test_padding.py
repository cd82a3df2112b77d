"""Padding that we add changes no sample: where a model would let it, samples of unequal length share no batch."""

import float64_loop
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import streamfisher as sf
from streamfisher.errors import DataError

LENGTHS = (9, 8, 7, 5, 7, 12)


def vectors(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [
        {"x": torch.randn(t, 4, generator=generator).double(), "labels": torch.tensor(i % 3)}
        for i, t in enumerate(lengths)
    ]


def tokens(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(1, 11, (t,), generator=generator)} for t in lengths]


def classified(model, batch):
    return cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


class Recurrent(nn.Module):
    def __init__(self, of="mean"):
        super().__init__()
        self.rnn, self.head, self.of = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3), of

    def forward(self, x):
        y = self.rnn(x)[0]
        return self.head(y.mean(1) if self.of == "mean" else y[:, 1])


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)).mean(1))


class Convolved(nn.Module):
    """Of images whose heights differ."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.conv(x[:, None])).mean((2, 3)))


class Attending(nn.Module):
    """A model of tokens, causal or not, that heeds its mask or does not, or counts what its batch holds."""

    def __init__(self, causal=True, heeds=True, counts=False):
        super().__init__()
        self.causal, self.heeds, self.counts, self.masks = causal, heeds, counts, 0
        self.embed, self.mix, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        n = x.shape[1]
        scores = x @ x.mT
        if self.causal:
            scores = scores + torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
        if self.heeds and attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -1e9)
        y = x + torch.tanh(self.mix(scores.softmax(-1) @ x))
        return self.head(y * (1 + n / 10) if self.counts else y)


def collected(path, model, samples, loss, **options):
    """Return a run, how many samples its batches hold, and the worst error of its rows."""
    torch.manual_seed(0)
    model = model.double()
    sizes = []
    watch = model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len([*args, *kwargs.values()][0])), with_kwargs=True
    )
    run = sf.collect(model, samples, path / "run.zarr", loss=loss, config=sf.SpectralConfig(**options))
    watch.remove()
    truth = float64_loop.gradient_rows(model, samples, loss)
    errors = [
        np.linalg.norm(run.store.rows.columns(name, 0, run.parameters[name]) - rows) / np.linalg.norm(rows)
        for name, rows in truth.items()
    ]
    return run, max(sizes), max(errors)


MIXED = {
    "recurrent, averaged": (lambda: Recurrent(), vectors, classified),
    "averaged": (lambda: Pooled(), vectors, classified),
    "convolution": (lambda: Convolved(), vectors, classified),
    "attention without mask": (lambda: Attending(False, False), tokens, float64_loop.causal_token_loss),
    "positions by the longest": (lambda: Attending(counts=True), tokens, float64_loop.causal_token_loss),
}


@pytest.mark.parametrize("kind", MIXED)
def test_a_sample_has_the_gradient_that_it_has_unpadded(kind, tmp_path):
    make, samples, loss = MIXED[kind]
    torch.manual_seed(0)
    run, _, error = collected(tmp_path, make(), samples(), loss)
    assert run.manifest.layout["kept_apart"] is True
    assert error < 1e-10


def test_samples_of_equal_length_still_share_batches(tmp_path):
    torch.manual_seed(0)
    _, largest, error = collected(tmp_path, Recurrent(), vectors((5, 5, 5, 7, 7, 5)), classified)
    assert largest == 3 and error < 1e-10


HARMLESS = {
    "causal": (lambda: Attending(), tokens, float64_loop.causal_token_loss),
    "causal, without mask": (lambda: Attending(heeds=False), tokens, float64_loop.causal_token_loss),
    "masked": (lambda: Attending(False), tokens, float64_loop.causal_token_loss),
    "recurrent, at a place": (lambda: Recurrent("a place"), vectors, classified),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_where_padding_is_harmless_all_lengths_share_batches(kind, tmp_path):
    make, samples, loss = HARMLESS[kind]
    torch.manual_seed(0)
    run, largest, error = collected(tmp_path, make(), samples(), loss)
    assert run.manifest.layout["kept_apart"] is False
    assert largest == len(LENGTHS) and error < 1e-10


def test_samples_of_one_length_are_not_asked_about(tmp_path):
    torch.manual_seed(0)
    run, _, error = collected(tmp_path, Pooled(), vectors((6,) * 4), classified)
    assert run.manifest.layout["kept_apart"] is None and error < 1e-10


def test_a_run_that_is_resumed_keeps_its_batches(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = Pooled().double()
    config = sf.SpectralConfig(chunk_size=2)
    first = sf.collect(model, vectors(), tmp_path / "run.zarr", loss=classified, config=config)
    before = first.store.rows.columns("head.weight", 0, 15)
    first.store.forget_unit(first.store.units[-1])
    monkeypatch.setattr("streamfisher.collection.survey.padding_changes", None)
    again = sf.collect(model, vectors(), tmp_path / "run.zarr", loss=classified, config=config)
    assert np.array_equal(again.store.rows.columns("head.weight", 0, 15), before)


# Padding and masks that the samples bring


class Placed(nn.Module):
    """A causal model with absolute positions, which tells packed documents apart where there is no mask."""

    def __init__(self):
        super().__init__()
        self.embed, self.place, self.head = nn.Embedding(11, 6), nn.Embedding(16, 6), nn.Linear(6, 11)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        n = input_ids.shape[1]
        places = torch.arange(n)[None] if position_ids is None else position_ids
        x = self.embed(input_ids) + self.place(places)
        scores = x @ x.mT + torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1)
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -1e9)
        elif position_ids is not None:
            document = (position_ids == 0).cumsum(1)
            scores = scores.masked_fill(document[:, :, None] != document[:, None, :], -1e9)
        return self.head(x + scores.softmax(-1) @ x)


def padded(left, extra=3):
    samples = []
    for sample in tokens((6, 4, 5)):
        ids = sample["input_ids"]
        pad, ones = torch.zeros(6 + extra - len(ids), dtype=torch.int64), torch.ones_like(ids)
        order = [(pad, ids), (pad, ones)] if left else [(ids, pad), (ones, pad)]
        samples.append(dict(zip(("input_ids", "attention_mask"), map(torch.cat, order), strict=True)))
    return samples


def test_left_padding_that_moves_positions_is_said(tmp_path):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"sample 0 has the loss .* 3 samples are padded on the left\. .*position_ids"):
        sf.collect(Placed().double(), padded(left=True), tmp_path / "run.zarr", config=sf.SpectralConfig(loss="causal"))


@pytest.mark.parametrize("case", ["right", "left with positions", "left without places"])
def test_padding_that_changes_nothing_is_not(case, tmp_path, recwarn):
    torch.manual_seed(0)
    model, samples = Placed().double(), padded(left=case != "right")
    if case == "left with positions":
        samples = [s | {"position_ids": (s["attention_mask"].cumsum(0) - 1).clamp(min=0)} for s in samples]
    if case == "left without places":
        nn.init.zeros_(model.place.weight)
    sf.collect(model, samples, tmp_path / "run.zarr", config=sf.SpectralConfig(loss="causal"))
    assert not [w for w in recwarn if "padded on the" in str(w.message)]


def packed(masked):
    sample = {"input_ids": torch.arange(1, 8), "position_ids": torch.tensor([0, 1, 2, 0, 1, 2, 3])}
    sample["labels"] = sample["input_ids"].clone()
    sample["labels"][3] = -100
    return [sample | ({"attention_mask": torch.ones(7, dtype=torch.int64)} if masked else {})] * 3


def test_documents_that_a_mask_lets_see_each_other_are_refused(tmp_path):
    torch.manual_seed(0)
    config = sf.SpectralConfig(loss="causal")
    with pytest.raises(DataError, match=r"sample 0 holds several documents .* Leave attention_mask out"):
        sf.collect(Placed().double(), packed(True), tmp_path / "no.zarr", config=config)
    assert sf.collect(Placed().double(), packed(False), tmp_path / "run.zarr", config=config).info()["complete"]


def test_a_mask_over_documents_that_changes_nothing_is_taken(tmp_path):
    class Blind(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return self.head(self.embed(input_ids))

    config = sf.SpectralConfig(loss="causal")
    assert sf.collect(Blind().double(), packed(True), tmp_path / "run.zarr", config=config).info()["complete"]
