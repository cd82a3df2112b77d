"""The demo model and its text: what the weights promise, and that the script under `examples/` makes them again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import streamfisher.demo as demo
from streamfisher.demo import demo_samples, source_files, split_of, split_text
from streamfisher.errors import DataError

REPOSITORY = Path(__file__).parents[2]

# Of the largest logit, which is above 20 in these weights. Shapes change the order of sums, so float32 logits move by
# some 1e-6 of it; in float64 nothing but a real dependence is left.
RELATIVE_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture(scope="module")
def model():
    return demo.load_demo_model()


def _bytes_of(samples):
    return torch.stack([sample["input_ids"] for sample in samples])


def _assert_same_logits(actual, expected):
    tolerance = RELATIVE_TOLERANCE[expected.dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_size(model):
    assert 500_000 <= sum(p.numel() for p in model.parameters()) <= 1_000_000
    assert demo.WEIGHTS.stat().st_size < 4_000_000
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_names(model):
    names = set(model.state_dict())
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        assert f"layers.0.{part}.weight" in names
    for part in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
        assert f"layers.3.{part}.weight" in names
    assert {"embed_tokens.weight", "embed_positions.weight", "norm.weight", "lm_head.weight"} <= names
    assert model.is_causal
    assert not model.training


@torch.no_grad()
def test_float64_is_the_same_model(model):
    ids = _bytes_of(demo_samples(4))
    exact = demo.load_demo_model(torch.float64)(ids)
    assert exact.dtype == torch.float64
    assert exact.shape == (4, 128, 256)
    torch.testing.assert_close(model(ids).double(), exact, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", RELATIVE_TOLERANCE)
def test_a_later_byte_changes_no_earlier_logits(dtype):
    model = demo.load_demo_model(dtype)
    ids = _bytes_of(demo_samples(3))
    changed = ids.clone()
    changed[:, 70] = (changed[:, 70] + 1) % 256
    before, after = model(ids), model(changed)
    _assert_same_logits(after[:, :70], before[:, :70])
    assert (after[:, 70:] - before[:, 70:]).abs().amax(dim=(1, 2)).min() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("dtype", RELATIVE_TOLERANCE)
def test_padding_changes_no_real_logits(dtype):
    model = demo.load_demo_model(dtype)
    ids = _bytes_of(demo_samples(3))
    lengths = (128, 90, 5)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    padded = model(ids.where(mask.bool(), 0), attention_mask=mask)
    assert padded.isfinite().all()
    for row, length in enumerate(lengths):
        _assert_same_logits(padded[row, :length], model(ids[row : row + 1, :length])[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", RELATIVE_TOLERANCE)
def test_a_mask_hides_what_it_covers(dtype):
    """A masked byte in the middle is not looked at: its value does not matter to later positions."""
    model = demo.load_demo_model(dtype)
    ids = _bytes_of(demo_samples(1))
    mask = torch.ones_like(ids)
    mask[:, 10] = 0
    changed = ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 256
    _assert_same_logits(model(ids, mask)[:, 11:], model(changed, mask)[:, 11:])
    assert (model(ids)[:, 11:] - model(changed)[:, 11:]).abs().max() > 1e-2


def test_every_parameter_has_a_gradient(model):
    ids = _bytes_of(demo_samples(2))
    loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in gradients)


def test_longer_than_the_position_table(model):
    with pytest.raises(DataError, match=r"129 bytes.*128 positions"):
        model(torch.zeros(1, 129, dtype=torch.int64))


@torch.no_grad()
def test_validation_loss_is_far_below_the_unigram_entropy(model):
    ids = _bytes_of(demo_samples(64))
    loss = torch.nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    frequencies = np.bincount(np.frombuffer(split_text("train"), dtype=np.uint8), minlength=256) + 1.0
    unigram = -np.log(frequencies / frequencies.sum())[ids[:, 1:].numpy()].mean()
    assert 2.5 < unigram < 4.0
    assert loss < 0.6 * unigram


def test_samples_are_deterministic_and_shaped():
    samples = demo.demo_dataset()
    assert len(samples) == 256
    assert all(set(sample) == {"input_ids"} for sample in samples)
    assert all(sample["input_ids"].shape == (128,) and sample["input_ids"].dtype == torch.int64 for sample in samples)
    ids = _bytes_of(samples)
    assert 0 <= ids.min()
    assert ids.max() <= 255
    assert torch.equal(ids, _bytes_of(demo.demo_dataset()))
    assert torch.equal(ids[:64], _bytes_of(demo_samples(64)))
    assert len(set(map(bytes, ids.tolist()))) > 250
    assert _bytes_of(demo_samples(5, length=32)).shape == (5, 32)


def test_train_and_validation_share_no_file():
    train = {path for path, _ in source_files("train")}
    validation = {path for path, _ in source_files("validation")}
    assert train
    assert validation
    assert train.isdisjoint(validation)
    folders = {folder for path in train | validation for folder in path.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idlelib", "site-packages", "__pycache__"})


def test_windows_are_cut_from_whole_files(tmp_path):
    """What is taken can be counted by hand: whole windows, no overlap, only wanted files, only one split."""
    wanted = {"alpha.py": 35, "beta.py": 9, "package/__init__.py": 10, "package/inner/deep.py": 21}
    unwanted = ("test/__init__.py", "site-packages/x.py", "plain_folder/x.py", "_sysconfigdata_x.py", "package/x.txt")
    for number, (name, size) in enumerate([*wanted.items(), *((name, 100) for name in unwanted)]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(10 * number + offset // 10 for offset in range(size)))
    found = []
    for split in ("train", "validation"):
        assert all(split_of(path) == split for path, _ in source_files(split, tmp_path))
        expected = sum(wanted[path] // 10 for path, _ in source_files(split, tmp_path))
        if expected:
            found += map(bytes, _bytes_of(demo_samples(expected, 10, split, tmp_path)).tolist())
    assert sorted(found) == [bytes([value]) * 10 for value in (0, 1, 2, 20, 30, 31)]


def test_too_many_samples_names_both_numbers():
    with pytest.raises(DataError, match=r"10000000 sequences of 128 bytes were asked for.*give [1-9]\d{2,}\. Ask for"):
        demo_samples(10_000_000)


def test_no_sources(tmp_path):
    with pytest.raises(DataError, match=r"holds 0 of them.*your own text"):
        demo_samples(1, root=tmp_path)
    with pytest.raises(DataError, match=r"holds 0 of them"):
        demo_samples(1, root=tmp_path / "python311.zip")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n": 0}, "n=0"), ({"n": 1, "length": 1}, "length=1"), ({"n": 1, "split": "test"}, "split='test' is unknown")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        demo_samples(**arguments)


@pytest.mark.slow
def test_training_script_gives_the_same_bits_twice(tmp_path):
    hashes = []
    for name in ("first", "second"):
        weights = tmp_path / f"{name}.safetensors"
        script = REPOSITORY / "examples" / "train_demo_model" / "train.py"
        subprocess.run(
            [sys.executable, script, "--steps", "3", "--max-eval", "64", "--out", weights],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            check=True,
            capture_output=True,
        )
        report = json.loads(weights.with_suffix(".json").read_text())
        assert report["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert report["steps"] == 3
        hashes.append(report["weights_sha256"])
    assert hashes[0] == hashes[1]
