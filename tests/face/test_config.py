"""Every setting is validated once, with its name and value in the message."""

import dataclasses

import pytest
import torch

from streamfisher import SpectralConfig
from streamfisher.byte_sizes import format_bytes, parse_bytes
from streamfisher.cli.config_file import read_config_file
from streamfisher.config import IDENTITY_FIELDS, check_keys, parse_dtype
from streamfisher.errors import ConfigError

SIZES = {
    2_000_000: 2_000_000,
    "2000000": 2_000_000,
    "1": 1,
    "7b": 7,
    "2k": 2_000,
    "2kB": 2_000,
    "2KiB": 2_048,
    "500MB": 500_000_000,
    "1MiB": 2**20,
    "1.5GB": 1_500_000_000,
    "2 GB": 2_000_000_000,
    "1GiB": 2**30,
    "1TB": 10**12,
    "1 TiB": 2**40,
    "3PB": 3 * 10**15,
    "1_000": 1_000,
    " 3g ": 3_000_000_000,
    2.5e9: 2_500_000_000,
    "1e9": 10**9,
}


@pytest.mark.parametrize("text", SIZES)
def test_size_in_bytes(text):
    assert parse_bytes(text) == SIZES[text]


@pytest.mark.parametrize("text", ["", "GB", "lots", "2XB", "1..5GB", "0", "-1GB", "inf", "nan", None, "0.1b", True])
def test_bad_size_is_named(text):
    with pytest.raises(ConfigError, match=r"memory_budget=") as caught:
        parse_bytes(text, "memory_budget")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e6, "2.5 MB"), (13.5e12, "13.5 TB"), (1e9, "1 GB")],
)
def test_size_for_people(size, text):
    assert format_bytes(size) == text


@pytest.mark.parametrize("value", ["float64", "torch.float64", torch.float64])
def test_dtype_by_name_or_itself(value):
    assert parse_dtype(value) is torch.float64


@pytest.mark.parametrize("value", ["int8", torch.int64, "double precision", 64, ""])
def test_dtype_that_is_not_floating_is_refused(value):
    with pytest.raises(ConfigError, match=r"dtype_store=.*float64, float32, bfloat16, float16"):
        parse_dtype(value, "dtype_store")


# field -> values that cannot be used
BAD = {
    "block_structure": ["layers", None, 3],
    "center_gradients": ["maybe", 1, None],
    "sample_unit": ["word", None],
    "tokens_per_sequence": [0, 2.5, "all", 3],
    "labels": ["true"],
    "classes_per_sample": [0, 2.5, "all", 3],
    "loss": ["mse"],
    "include": [3, None, [1], {"a": 1}],
    "exclude": [3, (None,)],
    "max_length": [0, -1, 1.5, "8", True],
    "max_params_per_block": [0, "many"],
    "seed": [-1, 1.5, "x", None, True],
    "chunk_size": [0, -4, 2.0, "4", None, True],
    "batch_tokens": [0, 1e3],
    "guard_every": [-1, 1.5, None],
    "on_nonfinite": ["ignore", None],
    "dtype_model": ["int32", 8],
    "dtype_compute": ["bfloat16", "float16", None],
    "dtype_store": ["int8", "e4m3"],
    "bitround": [0, 24, 7.5, True],
    "dtype_gram": ["bfloat16", None],
    "gram_device": ["gpu", None],
    "dtype_eigensolve": ["float16", None],
    "eps": [-1e-9, 1, 2.0, "small", True, float("nan")],
    "top_k_eigenvalues": [0, None, 2.5],
    "solver": ["lanczos", None, True],
    "regularization": [-1e-8, None, "none", float("inf"), float("nan")],
    "eigensolve_device": ["gpu", None],
    "storage_mode": ["disk", None],
    "store_path": [3, True],
    "store_centered": ["yes", 0],
    "representation": ["rows", None],
    "project": [0, -4, 2.5, "many", True],
    "store_text": [0, -1, 2.5, True],
    "keep_gradients": [3, [1], {"a": 1}],
    "gram_per": ["block", None],
    "stream": ["all", None, True],
    "codec": ["gzip", None],
    "device": [None, 0, ""],
    "n_workers": [0, -1, "two", 1.5],
    "rank_timeout": [0, -1, "soon"],
    "memory_budget": ["lots", 0, -5],
    "disk_budget": ["much", 0, -5],
    "device_memory_budget": ["lots", 0, -5],
    "use_deterministic": ["yes", 1],
    "fsync": ["yes", 1],
    "direct_io": ["off", True, None],
    "hold": ["cloud", 3, None],
}


def test_every_field_is_checked():
    assert set(BAD) == {field.name for field in dataclasses.fields(SpectralConfig)}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_bad_value_is_named(field, value):
    with pytest.raises(ConfigError) as caught:
        SpectralConfig(**{field: value})
    shown = str(value).removeprefix("torch.")
    assert field in str(caught.value) and shown in str(caught.value)


def test_identity_fields_exist_and_are_part_of_the_identity():
    names = {field.name for field in dataclasses.fields(SpectralConfig)}
    assert set(IDENTITY_FIELDS) <= names
    assert len(set(IDENTITY_FIELDS)) == len(IDENTITY_FIELDS)
    assert set(SpectralConfig().identity()) == set(IDENTITY_FIELDS)


def test_where_and_how_fast_is_no_part_of_the_identity():
    elsewhere = SpectralConfig(n_workers=3, memory_budget="1GB", device="cpu", codec="zstd", storage_mode="streaming")
    assert elsewhere.identity() == SpectralConfig().identity()
    assert SpectralConfig(seed=1).identity() != SpectralConfig().identity()


def test_config_survives_json():
    import json

    config = SpectralConfig(
        dtype_model="bfloat16", include=["a.*", "b"], eps=1e-6, memory_budget="2GB", max_length=9, store_centered=True
    )
    assert SpectralConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_option_names_near_ones():
    with pytest.raises(ConfigError, match=r"'chunk_sise' is not a known option. Did you mean chunk_size\?"):
        SpectralConfig.from_dict({"chunk_sise": 3})
    with pytest.raises(ConfigError, match="Known: a, b"):
        check_keys({"zzz": 1}, ["a", "b"], "option")


def test_one_pattern_is_a_list_of_one():
    assert SpectralConfig(include="head.*").include == ("head.*",)


def test_number_written_as_text_counts():
    assert SpectralConfig(eps="1e-6", regularization="1e-9") == SpectralConfig(eps=1e-6, regularization=1e-9)


def test_replace_validates_again():
    assert SpectralConfig().replace(seed=3).seed == 3
    with pytest.raises(ConfigError, match="chunk_size=0"):
        SpectralConfig().replace(chunk_size=0)


def test_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SpectralConfig().seed = 3


def test_positional_settings_are_refused():
    with pytest.raises(TypeError):
        SpectralConfig("layer")


@pytest.mark.parametrize("suffix", ["toml", "yaml", "yml", "json"])
def test_files_of_every_kind_give_the_same(suffix, tmp_path):
    text = {"toml": "chunk-size = 3\nseed = 1", "json": '{"chunk-size": 3, "seed": 1}'}
    path = tmp_path / f"a.{suffix}"
    path.write_text(text.get(suffix, "chunk-size: 3\nseed: 1\n"))
    assert read_config_file(path) == {"chunk_size": 3, "seed": 1}


def test_empty_yaml_file_is_no_mapping(tmp_path):
    (tmp_path / "a.yaml").write_text("")
    with pytest.raises(ConfigError, match="mapping"):
        read_config_file(tmp_path / "a.yaml")
