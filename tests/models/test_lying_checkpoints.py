"""A checkpoint whose config.json is of another make: refused in a sentence, whatever transformers raises."""

import json

import pytest

from streamfisher import load_model
from streamfisher.errors import ModelError
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


@pytest.mark.parametrize("names", [[7], ["pipeline"], ["torch"], [[]]])
def test_an_architecture_that_is_no_model_is_passed_over(names, saved, tmp_path):
    content = json.loads((saved / "config.json").read_text()) | {"architectures": names}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert type(build_skeleton(str(tmp_path))).__name__ == "LlamaForCausalLM"
