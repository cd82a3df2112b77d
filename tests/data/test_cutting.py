"""Cutting a text touches what lies along its tokens, and nothing that happens to be as long."""

import pytest
import torch

from streamfisher.data import Samples, TokenSamples
from streamfisher.errors import DataError


def texts(lengths, **others):
    return [
        {"input_ids": torch.arange(1, length + 1)} | {key: make(length) for key, make in others.items()}
        for length in lengths
    ]


def test_a_memory_as_long_as_the_text_is_whole():
    data = texts((10, 8, 12, 8), encoder_hidden_states=lambda _: torch.ones(8, 16))
    samples = Samples(data, max_length=6)
    assert [samples[i]["input_ids"].shape[0] for i in range(4)] == [6] * 4
    assert all(samples[i]["encoder_hidden_states"].shape == (8, 16) for i in range(4))
    tokens = TokenSamples(Samples(data), shifted=True)
    assert all(tokens[i]["encoder_hidden_states"].shape == (8, 16) for i in range(len(tokens)))


def test_an_unknown_name_is_judged_by_whether_it_follows_the_text():
    data = texts((10, 8), memory=lambda _: torch.ones(8, 3), weights=lambda length: torch.ones(length, 2))
    sample = Samples(data, max_length=6)[1]
    assert sample["memory"].shape == (8, 3) and sample["weights"].shape == (6, 2)


def test_what_cannot_be_told_is_refused():
    with pytest.raises(DataError, match=r"'memory' has shape \(8, 3\)"):
        Samples(texts((8, 8), memory=lambda _: torch.ones(8, 3)), max_length=6)[0]


def test_what_is_known_to_lie_along_the_text_is_cut():
    data = texts((8, 8), attention_mask=torch.ones, token_type_ids=torch.zeros, weight=torch.ones)
    assert {value.shape[0] for value in Samples(data, max_length=5)[0].values()} == {5}


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_the_first_token_after_left_padding_is_no_sample(pad):
    ids, mask = torch.arange(1, 8), torch.ones(7, dtype=torch.int64)
    mask[:pad] = 0
    tokens = TokenSamples(Samples([{"input_ids": ids, "attention_mask": mask}]), shifted=True)
    assert [position for _, position in tokens.targets] == list(range(pad + 1, 7))
