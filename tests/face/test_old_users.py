"""What scripts written for the old module do: keys they read, options they set, batches and gradients they give."""

import dataclasses
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import streamfisher as sf
from streamfisher import FisherSpectral, SpectralConfig
from streamfisher.errors import ConfigError, DataError

MIGRATION = Path(__file__).parents[2] / "docs" / "migration.md"


class Bag(nn.Module):
    """A causal bag of embeddings, named as no causal model is; `scale` may be NaN for some first tokens."""

    is_causal = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, 6)
        self.lm_head = nn.Linear(6, 11, bias=False)

    def forward(self, input_ids):
        x = self.embed_tokens(input_ids).cumsum(dim=1)
        bad = torch.where(input_ids[:, :1, None] == 10, torch.nan, 1.0)
        return self.lm_head(x) * bad


def ids(n=6, bad=()):
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(1, 10, (n, 7), generator=generator)
    values[list(bad), 0] = 10
    return {"input_ids": values}


def compute(batch, *, n_samples=None, block_structure=None, **options):
    spectral = FisherSpectral(SpectralConfig(eigensolve_device="cpu", **options))
    return spectral.compute_fisher_spectrum(Bag(), batch, n_samples, block_structure)


def of_gradients(gradients, **options):
    config = SpectralConfig(eigensolve_device="cpu", **options)
    return FisherSpectral(config).compute_fisher_spectrum(None, None, precomputed_gradients=gradients)


# keys


def test_an_empty_result_has_the_keys_of_a_full_one():
    generator = torch.Generator().manual_seed(0)
    full = of_gradients([{"w": torch.randn(4, generator=generator)} for _ in range(3)])
    with pytest.warns(UserWarning, match="empty Fisher spectrum"):
        empty = of_gradients([])
    assert full["global"].keys() - {"intervals"} <= empty["global"].keys()
    assert full["metadata"].keys() <= empty["metadata"].keys()
    assert empty["per_block"] == {}
    assert empty["global"]["spectral_gap"] == 0.0 and empty["global"]["n_eigenvalues"] == 0
    assert f"{empty['global']['condition_number']:.2e}" == "inf"


def test_keys_of_blocks_and_of_what_was_asked_for():
    found = compute(ids(), n_samples=4, eps=1e-9, regularization=1e-10, use_deterministic=True)
    for name, metrics in found["per_block"].items():
        assert metrics["block_name"] == name
        ratio = metrics["largest_eigenvalue"] / metrics["smallest_eigenvalue"]
        assert metrics["condition_number"] == ratio
    facts = found["metadata"]
    assert (facts["n_samples_requested"], facts["eps"]) == (4, 1e-9)
    assert (facts["regularization"], facts["use_deterministic"]) == (1e-10, True)


def test_more_samples_may_be_asked_for_than_there_are():
    facts = compute(ids(), n_samples=9)["metadata"]
    assert (facts["n_samples_requested"], facts["n_samples"]) == (9, 6)


def test_an_unused_module_does_not_break_a_table_of_condition_numbers():
    model = Bag()
    model.unused = nn.Linear(3, 3)
    results = FisherSpectral(SpectralConfig()).compute_fisher_spectrum(model, ids(), block_structure="parameter")
    assert list(results["per_block"]) == ["embed_tokens.weight", "lm_head.weight"]
    assert all(f"{m['condition_number']:.2e}" for m in results["per_block"].values())
    assert results["metadata"]["parameters_without_gradient"] == ["unused.weight", "unused.bias"]


# the table of what changed


def test_the_migration_table_names_every_key_that_changed_with_its_new_meaning():
    text = MIGRATION.read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", text, flags=re.M)
    assert {"n_eigenvalues", "n_params", "top_eigenvalues", "storage_mode", "eps", "condition_number"} <= set(rows)
    # n_eigenvalues: those listed, min(N, P), not those above eps; numerical_rank counts these
    G = np.outer(np.arange(1.0, 5.0), np.ones(9))
    gradients = [{"w": torch.from_numpy(row)} for row in G]
    metrics = of_gradients(gradients)["per_block"]["other"]
    assert (metrics["n_eigenvalues"], metrics["numerical_rank"]) == (4, 1)
    # n_params: those of the block, drawn or not
    generator = torch.Generator().manual_seed(0)
    many = [{"w": torch.randn(90, generator=generator)} for _ in range(4)]
    assert of_gradients(many, max_params_per_block=10)["per_block"]["other"]["n_params"] == 90
    # top_eigenvalues: 100, not 10
    wide = [{"w": torch.randn(40, generator=generator)} for _ in range(12)]
    assert len(of_gradients(wide)["per_block"]["other"]["top_eigenvalues"]) == 12
    assert len(of_gradients(wide, top_k_eigenvalues=10)["per_block"]["other"]["top_eigenvalues"]) == 10
    assert SpectralConfig().top_k_eigenvalues == 100
    assert f"`{SpectralConfig().storage_mode}`" in next(
        line for line in text.splitlines() if line.startswith("| `storage_mode`")
    )


# the config


def test_an_assignment_says_what_to_write_instead():
    config = SpectralConfig()
    with pytest.raises(dataclasses.FrozenInstanceError, match=re.escape("config = config.replace(seed=1)")):
        config.seed = 1
    with pytest.raises(ConfigError, match="Did you mean seed"):
        config.sed = 1
    assert config.seed == SpectralConfig().seed


def test_numpy_numbers_and_devices_of_torch_are_taken():
    config = SpectralConfig(seed=np.int64(3), chunk_size=np.int32(4), use_deterministic=np.bool_(True))
    assert (config.seed, config.chunk_size, config.use_deterministic) == (3, 4, True)
    assert type(config.seed) is int and type(config.use_deterministic) is bool
    for device in (torch.device("cpu"), torch.device("cuda", 0), "cuda:0", "mps", "auto"):
        assert SpectralConfig(eigensolve_device=device).eigensolve_device == str(device)
    found = compute(ids(), n_samples=np.int64(4), storage_mode="full")
    assert found["metadata"]["n_samples"] == 4


@pytest.mark.parametrize("device", ["mps", "cuda:0"])
def test_a_device_without_a_solver_or_that_is_not_there_solves_on_the_cpu(device):
    found = FisherSpectral(SpectralConfig(eigensolve_device=device)).compute_fisher_spectrum(Bag(), ids())
    expected = "torch-cuda" if device == "cuda:0" and torch.cuda.is_available() else "lapack-syevd"
    assert found["per_block"]["embedding"]["solver"] == expected


@pytest.mark.parametrize("wrong", [2.5, "four", -1, True])
def test_an_error_names_the_argument_that_was_given(wrong):
    with pytest.raises(ConfigError, match=f"n_samples={wrong!r}"):
        compute(ids(), n_samples=wrong)


# batches


def test_entries_that_are_no_tensors_are_left_out_with_a_notice():
    batch = ids() | {"task": "copy", "names": list("abcdef"), "use_cache": False, "temperature": 1.0, "labels": None}
    with pytest.warns(UserWarning, match=r"task \(str\), names \(list\), use_cache \(bool\), temperature \(float\)"):
        found = compute(batch)
    assert found["global"]["eigenvalues"] == compute(ids())["global"]["eigenvalues"]


def test_lists_and_arrays_of_numbers_are_tensors():
    expected = compute(ids())["global"]["eigenvalues"]
    for make in (torch.Tensor.tolist, torch.Tensor.numpy):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert compute({"input_ids": make(ids()["input_ids"])})["global"]["eigenvalues"] == expected


@pytest.mark.parametrize("storage_mode", ["full", "chunked", "streaming"])
def test_bad_samples_are_skipped_however_many_come_first(storage_mode):
    batch = ids(70, bad=range(66))
    found = compute(batch, on_nonfinite="skip", storage_mode=storage_mode, chunk_size=8)
    assert found["metadata"]["n_samples"] == 4
    assert len(found["metadata"]["skipped_samples"]) == 66
    good = compute({"input_ids": batch["input_ids"][66:]})
    np.testing.assert_allclose(found["global"]["eigenvalues"][:4], good["global"]["eigenvalues"][:4], rtol=1e-5)


@pytest.mark.parametrize("storage_mode", ["full", "streaming"])
@pytest.mark.parametrize("good", [0, 1])
def test_all_samples_bad_is_an_empty_result(storage_mode, good):
    with pytest.warns(UserWarning, match="empty Fisher spectrum"):
        found = compute(ids(5, bad=range(5 - good)), on_nonfinite="skip", storage_mode=storage_mode)
    assert found["per_block"] == {} and "not finite" in found["metadata"]["error"]
    assert found["global"]["trace"] == 0.0 and found["metadata"]["n_samples_requested"] == 5


# precomputed gradients


def test_samples_may_lack_whole_blocks():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    second = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    gradients = [
        {"layers.0.w": first[i]} | ({"layers.1.w": second[i], "layers.1.b": second[i, :1]} if i % 2 else {})
        for i in range(6)
    ]
    found = of_gradients(gradients)
    assert found["metadata"]["n_samples_per_block"] == {"layer_0": 6, "layer_1": 3}
    assert found["metadata"]["block_diagonal_error"] is None
    whole = of_gradients([{"layers.0.w": row} for row in first])
    assert found["per_block"]["layer_0"]["eigenvalues"] == whole["per_block"]["layer_0"]["eigenvalues"]
    rows = torch.cat([second[1::2], second[1::2, :1]], dim=1)
    expected = torch.linalg.svdvals(rows) ** 2 / 3
    np.testing.assert_allclose(found["per_block"]["layer_1"]["eigenvalues"], expected.numpy(), rtol=1e-12)
    assert found["per_block"]["layer_1"]["n_samples"] == 3
    union = found["per_block"]["layer_0"]["trace"] + found["per_block"]["layer_1"]["trace"]
    assert found["global"]["trace"] == pytest.approx(union) and found["global"]["n_samples"] == 6


def test_part_of_a_block_or_a_block_of_one_sample_is_refused():
    w = torch.ones(3)
    with pytest.raises(
        DataError, match=r"gradient 1 has other parameters of the block layer_0 than gradient 0: layers.0.b"
    ):
        of_gradients([{"layers.0.w": w, "layers.0.b": w}, {"layers.0.w": w}])
    with pytest.raises(DataError, match=r"1 of 3 gradients have the block layer_1"):
        of_gradients([{"layers.0.w": w}] * 2 + [{"layers.0.w": w, "layers.1.w": w}])


# labels that are shifted already


def test_labels_that_are_moved_already_are_noticed():
    values = ids()["input_ids"]
    moved = torch.cat([values[:, 1:], torch.full((6, 1), -100)], dim=1)
    with pytest.warns(UserWarning, match="moved by one.*loss='token'"):
        compute({"input_ids": values, "labels": moved})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = compute({"input_ids": values, "labels": moved}, loss="token")
        compute({"input_ids": values, "labels": values.clone()})
        masked = values.clone()
        masked[:, :3] = -100
        compute({"input_ids": values, "labels": masked})
    assert right["metadata"]["n_target_tokens"] == 6 * 6
    same = compute({"input_ids": values})
    np.testing.assert_allclose(right["global"]["eigenvalues"], same["global"]["eigenvalues"], rtol=1e-4)


def test_a_collected_run_notices_moved_labels_too(tmp_path):
    values = ids()["input_ids"]
    moved = torch.cat([values[:, 1:], values[:, :1]], dim=1)
    with pytest.warns(UserWarning, match="moved by one"):
        sf.collect(Bag(), {"input_ids": values, "labels": moved}, tmp_path / "run.zarr")
