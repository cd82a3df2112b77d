"""Sections hold every option once, check it alone, and together make the flat config."""

import dataclasses
import pickle

import pytest
import torch

from streamfisher import SpectralConfig
from streamfisher.config import (
    SECTIONS,
    GradientOptions,
    ReductionOptions,
    ResourceOptions,
    SampleOptions,
    SolvingOptions,
    StorageOptions,
)
from streamfisher.config.option import options_of
from streamfisher.errors import ConfigError

NAMES = {
    "samples": SampleOptions,
    "gradients": GradientOptions,
    "storage": StorageOptions,
    "reduction": ReductionOptions,
    "solving": SolvingOptions,
    "resources": ResourceOptions,
}
# What manifests of format 2 hold, in their order.
FLAT = [
    *(
        "block_structure",
        "center_gradients",
        "sample_unit",
        "tokens_per_sequence",
        "labels",
        "loss",
        "include",
        "exclude",
        "max_length",
    ),
    *(
        "max_params_per_block",
        "seed",
        "chunk_size",
        "batch_tokens",
        "guard_every",
        "on_nonfinite",
        "dtype_model",
        "dtype_compute",
        "dtype_store",
    ),
    *(
        "bitround",
        "dtype_gram",
        "dtype_eigensolve",
        "eps",
        "top_k_eigenvalues",
        "solver",
        "regularization",
        "eigensolve_device",
        "storage_mode",
    ),
    *(
        "store_path",
        "store_centered",
        "representation",
        "project",
        "keep_gradients",
        "gram_per",
        "codec",
        "device",
        "gram_device",
        "n_workers",
    ),
    *("memory_budget", "disk_budget", "stream", "rank_timeout", "fsync", "use_deterministic"),
    *("classes_per_sample", "hold", "store_text", "direct_io", "device_memory_budget"),
]
OTHER = SpectralConfig(
    chunk_size=8, dtype_model="bfloat16", codec="zstd", gram_per="layer", solver="dense", memory_budget="2GB"
)


def test_sections_share_out_all_fields():
    shared = [field.name for section in SECTIONS for field in dataclasses.fields(section)]
    assert sorted(shared) == sorted(FLAT) == sorted(field.name for field in dataclasses.fields(SpectralConfig))


@pytest.mark.parametrize("name", NAMES)
def test_section_holds_what_the_config_holds(name):
    section = getattr(OTHER, name)
    assert type(section) is NAMES[name]
    assert isinstance(OTHER, NAMES[name])
    for field in dataclasses.fields(section):
        assert getattr(section, field.name) == getattr(OTHER, field.name)


def test_sections_make_the_config():
    flat = {name: value for section in NAMES for name, value in vars(getattr(OTHER, section)).items()}
    assert SpectralConfig(**flat) == OTHER


def test_plain_values_keep_the_order_of_manifests():
    assert list(OTHER.to_dict()) == FLAT == list(SpectralConfig.names())
    assert repr(SpectralConfig()).startswith("SpectralConfig(block_structure='layer', center_gradients=False, ")


def test_config_is_a_value():
    again = pickle.loads(pickle.dumps(OTHER))
    assert again == OTHER and hash(again) == hash(OTHER)
    assert OTHER.samples == SampleOptions(chunk_size=8) and OTHER != SpectralConfig()
    assert OTHER.replace(chunk_size=32).samples == SampleOptions()


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (SampleOptions, {"chunk_size": 0}, "chunk_size=0 must be a whole number of at least 1"),
        (SampleOptions, {"tokens_per_sequence": 2}, "set sample_unit='token'"),
        (SampleOptions, {"classes_per_sample": 2}, "set labels='expected'"),
        (GradientOptions, {"dtype_compute": "bfloat16"}, "dtype_compute=bfloat16 is unknown; choose one of float32"),
        (GradientOptions, {"loss": "mse"}, "loss='mse' is unknown; choose one of None, causal"),
        (StorageOptions, {"project": 3, "representation": "factors"}, "project=3 makes rows of at most 3 numbers"),
        (StorageOptions, {"bitround": 9, "dtype_store": "bfloat16"}, "bitround=9 needs float32 rows"),
        (ReductionOptions, {"gram_device": "gpu"}, "gram_device='gpu' is unknown; choose one of auto, cpu, cuda"),
        (SolvingOptions, {"regularization": None}, "regularization=None must be a number and not negative"),
        (SolvingOptions, {"eps": 1}, r"eps=1.0 is relative to the largest eigenvalue and must lie in \[0, 1\)"),
        (ResourceOptions, {"disk_budget": "much"}, "disk_budget='much' is not a size"),
    ],
)
def test_section_and_config_refuse_alike(section, values, message):
    for kind in (section, SpectralConfig):
        with pytest.raises(ConfigError, match=message):
            kind(**values)


def test_section_reads_values_as_the_config_does():
    assert GradientOptions(include="a.*", dtype_model="float16") == GradientOptions(
        include=("a.*",), dtype_model=torch.float16
    )
    assert ResourceOptions(memory_budget="1GB").memory_budget == 10**9


@pytest.mark.parametrize("cls", [SpectralConfig, *SECTIONS])
def test_every_field_is_documented(cls):
    options = options_of(cls)
    assert options.keys() == {field.name for field in dataclasses.fields(cls)}
    for name, item in options.items():
        line = next(line for line in cls.__doc__.splitlines() if line.startswith(f"    {name}: "))
        assert item.help in line and item.unit in line and (item.unset or "(default: ") in line
        for choice in item.kind.choices:
            named = str(choice).removeprefix("torch.")
            assert choice is None or named in item.description, f"{name}: {named}"


def test_default_is_a_value_that_its_own_check_keeps():
    for name, item in options_of(SpectralConfig).items():
        assert item.kind.check(name, item.default) == item.default
