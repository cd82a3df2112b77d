"""Checkpoints and device maps of another make: refused in a sentence, and names in them shown as text or not at all."""

import json
import shutil
from itertools import pairwise

import pytest

from streamfisher import load_model
from streamfisher.errors import ConfigError, ModelError
from streamfisher.models.device_map import read_device_map
from streamfisher.models.skeleton import build_skeleton

pytest.importorskip("transformers")

CONFIGS = {
    "a size that is a mapping": {"intermediate_size": {"a": []}},
    "a size that is text": {"hidden_size": "../../outside"},
    "no heads": {"num_attention_heads": 0},
    "an activation that is none": {"hidden_act": []},
    "a model type that is none": {"model_type": ["llama"]},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from factored_models import llama

    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CONFIGS)
def test_config_json_of_wrong_types_is_refused_in_a_sentence(case, saved, tmp_path):
    content = json.loads((saved / "config.json").read_text()) | CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    for load in (load_model, build_skeleton):
        with pytest.raises(ModelError, match=r"cannot be (loaded|built)") as refused:
            load(str(tmp_path))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("names", [[7], ["pipeline"], ["torch"], [[]], "x", {"a": 1}])
def test_architectures_that_are_no_models_are_refused(names, saved, tmp_path):
    content = json.loads((saved / "config.json").read_text()) | {"architectures": names}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError):
        build_skeleton(str(tmp_path))


def test_names_of_tensors_are_not_printed_as_they_are(saved, tmp_path, capfd):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(saved, tmp_path / "model")
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors | {"\x1b[2Jmore": torch.ones(1)}, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="have no place in a LlamaForCausalLM"):
        load_model(str(tmp_path / "model"))
    shown = capfd.readouterr()
    assert "more" not in shown.out + shown.err and "\x1b" not in shown.out + shown.err


ALIASES = (
    "[&a [x, x, x, x], " + ", ".join(f"&{b} [*{a}, *{a}, *{a}, *{a}]" for a, b in pairwise("abcdefghijklmn")) + "]"
)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", f"inner: {ALIASES}"),
        ("a.yaml", f"inner: 0x{'f' * 20_000}"),
        ("a.yaml", f"0x{'f' * 20_000}: cpu"),
        ("a.yaml", "? [a, b]\n: cpu"),
        ("a.yaml", "inner: 2001-99-99"),
        ("a.yaml", "[" * 5_000),
        ("a.json", "[" * 100_000),
    ],
    ids=["aliases", "device of 24,000 digits", "name of 24,000 digits", "pair", "date", "deep YAML", "deep JSON"],
)
def test_device_maps_that_cannot_be_shown_are_refused_at_once(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as refused:
        read_device_map(str(tmp_path / name))
    assert len(str(refused.value)) < 2_000
