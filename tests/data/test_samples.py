"""Samples are numbered, cut, batched and padded the same way every time."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from streamfisher.data import Samples, TokenSamples, collate, make_batches, make_units
from streamfisher.errors import DataError


def sequences(*lengths):
    return [{"input_ids": torch.arange(1, length + 1)} for length in lengths]


def test_units_cover_every_sample_once():
    units = make_units(10, 4)
    assert [(unit.start, unit.stop) for unit in units] == [(0, 4), (4, 8), (8, 10)]


def test_units_of_a_longer_run_start_with_those_of_a_shorter_one():
    assert make_units(12, 4)[:2] == make_units(8, 4)


def test_batches_respect_the_padded_token_budget():
    assert make_batches([10, 10, 10, 10], 20) == [range(0, 2), range(2, 4)]
    assert make_batches([2, 2, 50, 2], 60) == [range(0, 2), range(2, 3), range(3, 4)]


def test_a_sequence_longer_than_the_budget_is_a_batch_of_its_own():
    assert make_batches([100, 100], 10) == [range(0, 1), range(1, 2)]


def test_collate_pads_on_the_right_and_masks():
    batch = collate([{"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8])}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_collate_pads_labels_with_the_ignored_label():
    samples = [
        {"input_ids": torch.ones(n, dtype=torch.long), "labels": torch.ones(n, dtype=torch.long)} for n in (2, 1)
    ]
    assert collate(samples)["labels"].tolist() == [[1, 1], [1, -100]]


def test_collate_adds_no_mask_where_nothing_is_padded():
    assert "attention_mask" not in collate(sequences(4, 4))


def test_collate_refuses_shapes_that_differ_beyond_the_first_axis():
    with pytest.raises(DataError, match=r"'x' cannot be batched.*\(2, 3\).*\(2, 4\)"):
        collate([{"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4)}])


def test_collate_refuses_different_keys():
    with pytest.raises(DataError, match="different keys"):
        collate([{"x": torch.zeros(2)}, {"y": torch.zeros(2)}])


def test_samples_accept_a_dict_of_batched_tensors():
    samples = Samples({"input_ids": torch.arange(6).reshape(3, 2)})
    assert len(samples) == 3
    assert samples[1]["input_ids"].tolist() == [2, 3]


def test_samples_are_cut_to_max_length_together_with_their_labels():
    sample = {"input_ids": torch.arange(9), "labels": torch.arange(9), "weight": torch.tensor(1.0)}
    cut = Samples([sample, sample], max_length=4)[0]
    assert cut["input_ids"].shape == cut["labels"].shape == (4,)
    assert cut["weight"] == 1.0


@pytest.mark.parametrize(
    ("source", "n_samples", "message"),
    [
        ([], None, "holds no samples"),
        (sequences(3, 3), 0, "--samples 0"),
        (sequences(3, 3), 5, "5 samples were asked for and the data holds 2"),
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, None, "must share their first axis"),
        ("text", None, "samples are a str"),
    ],
)
def test_bad_sources_are_refused_with_the_value(source, n_samples, message):
    with pytest.raises(DataError, match=message):
        Samples(source, n_samples)


def test_a_sample_that_is_no_dict_is_named():
    with pytest.raises(DataError, match="sample 1 is a list"):
        Samples([{"x": torch.zeros(1)}, [1, 2]])[1]


def test_digest_changes_with_contents_and_not_with_the_container():
    unit = make_units(2, 2)[0]
    batched = Samples({"input_ids": torch.tensor([[1, 2], [3, 4]])})
    listed = Samples([{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3, 4])}])
    other = Samples([{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3, 5])}])
    assert batched.digest(unit) == listed.digest(unit) != other.digest(unit)


def test_token_samples_keep_one_label_each_and_cut_what_follows():
    tokens = TokenSamples(Samples(sequences(3, 2)), shifted=True)
    assert tokens.targets == [(0, 1), (0, 2), (1, 1)]
    assert tokens[0]["input_ids"].tolist() == [1, 2]
    assert tokens[0]["labels"].tolist() == [-100, 2]


def test_token_samples_of_an_aligned_model_keep_the_whole_sequence():
    sample = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, 7, -100])}
    tokens = TokenSamples(Samples([sample]), shifted=False)
    assert tokens.targets == [(0, 1)]
    assert tokens[0]["input_ids"].tolist() == [1, 2, 3]


def test_token_samples_without_a_target_are_refused():
    with pytest.raises(DataError, match="no sequence has a target token"):
        TokenSamples(Samples(sequences(1, 1)), shifted=True)


def test_a_seeded_draw_of_tokens_depends_on_the_sequence_only():
    def drawn(lengths, seed):
        return TokenSamples(Samples(sequences(*lengths)), shifted=True, per_sequence=3, seed=seed).targets

    few = drawn((20, 20, 3), 1)
    assert [sum(target[0] == index for target in few) for index in range(3)] == [3, 3, 2]
    assert drawn((20, 20, 3, 9), 1)[: len(few)] == few
    assert drawn((20, 20, 3), 2) != few
    assert all(position > 0 for _, position in few)


def test_packed_sequences_get_no_mask_and_their_padding_is_no_target():
    packed = {"input_ids": torch.arange(1, 6), "position_ids": torch.tensor([0, 1, 0, 1, 2])}
    short = {"input_ids": torch.arange(1, 4), "position_ids": torch.tensor([0, 1, 2])}
    batch = collate([packed, short])
    assert "attention_mask" not in batch
    assert batch["labels"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]
    assert "attention_mask" in collate([short, {key: value[:2] for key, value in short.items()}])


class Endless:
    """Counts what was taken of it."""

    def __init__(self):
        self.taken = 0

    def __iter__(self):
        while True:
            self.taken += 1
            yield {"x": torch.tensor([float(self.taken)]), "labels": torch.tensor(0)}


def test_of_an_endless_iterator_no_more_is_read_than_is_asked_for():
    source = Endless()
    samples = Samples(source, 8)
    assert len(samples) == 8 and source.taken == 8
    assert samples[7]["x"].item() == 8


class Vectors(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"x": torch.full((3,), float(index)), "labels": torch.tensor(index % 3)}


class Streamed(IterableDataset):
    def __iter__(self):
        return (Vectors()[index] for index in range(16))

    def __len__(self):
        return 16


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Vectors(), batch_size=4),
        DataLoader(Vectors(), batch_size=5),
        DataLoader(Vectors(), batch_size=None),
        DataLoader(Streamed(), batch_size=4),
        Streamed(),
    ],
)
def test_the_samples_of_a_data_loader_are_those_of_its_batches(loader):
    samples, expected = Samples(loader), Vectors()
    assert len(samples) == 16 and len(Samples(loader, 6)) == 6
    for index in range(16):
        assert samples[index].keys() == {"x", "labels"}
        assert torch.equal(samples[index]["x"], expected[index]["x"])
        assert samples[index]["labels"].shape == () and samples[index]["labels"] == index % 3


def test_a_data_loader_that_shuffles_or_gives_no_dicts_is_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"shuffles.*loader\.dataset.*shuffle=False"):
        Samples(DataLoader(Vectors(), batch_size=4, shuffle=True))
    with pytest.raises(DataError, match=r"type list.*collate_fn"):
        Samples(DataLoader([(torch.ones(3), 1, 2)] * 4, batch_size=2))


def test_rows_of_unequal_lengths_in_one_dict_are_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"'input_ids' of the batch is no tensor.*list of dicts"):
        Samples({"input_ids": [[1, 2, 3], [4, 5]]})
