"""Coarser Grams say which block structures remain, and refuse the others by name."""

import pytest

from streamfisher.blocks import assign_blocks, check_grouping, gram_groups, possible_structures
from streamfisher.blocks.gram_keys import gram_keys
from streamfisher.errors import ConfigError

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]
POSSIBLE = {
    "parameter": ["layer", "module", "parameter", "none"],
    "layer-module": ["layer", "module", "none"],
    "layer": ["layer", "none"],
    "all": ["none"],
}


@pytest.mark.parametrize("per", POSSIBLE)
def test_every_parameter_is_in_one_gram(per):
    keys = gram_keys(NAMES, per)
    assert sorted(name for members in keys.values() for name in members) == sorted(NAMES)
    assert possible_structures(keys) == POSSIBLE[per]


def test_keys_are_named_after_what_they_hold():
    assert list(gram_keys(NAMES, "layer")) == ["embedding", "layer_0", "layer_1", "other", "output"]
    assert gram_keys(NAMES, "layer-module")["layer_0.attention"] == NAMES[1:3]
    assert gram_keys(NAMES, "all") == {"all": NAMES}
    assert gram_keys(NAMES, "parameter") == {name: [name] for name in NAMES}


@pytest.mark.parametrize("per", POSSIBLE)
@pytest.mark.parametrize("structure", ["layer", "module", "parameter", "none"])
def test_a_grouping_is_given_where_it_is_possible_and_refused_where_not(per, structure):
    keys, assignment = gram_keys(NAMES, per), assign_blocks(NAMES, structure)
    if structure in POSSIBLE[per]:
        blocks = check_grouping(keys, assignment, per=per)
        assert all(assignment[name] == blocks[key] for key, members in keys.items() for name in members)
    else:
        with pytest.raises(ConfigError, match=f"Possible: {', '.join(POSSIBLE[per])}, or patterns"):
            check_grouping(keys, assignment, per=per)


def test_the_refusal_names_the_gram_and_its_blocks():
    with pytest.raises(
        ConfigError,
        match=r"one Gram per layer, and the Gram layer_0 \(and 1 more\) holds .* the blocks attention and mlp",
    ):
        check_grouping(gram_keys(NAMES, "layer"), assign_blocks(NAMES, "module"), per="layer")


def test_patterns_of_ones_own_may_join_whole_grams():
    patterns = {"model.layers.*": "layers", "*": "rest"}
    blocks = check_grouping(gram_keys(NAMES, "layer"), assign_blocks(NAMES, patterns))
    assert blocks["layer_1"] == "layers" and blocks["output"] == "rest"


def test_a_group_in_two_waves_has_a_gram_in_each():
    waves = [NAMES[6:], NAMES[3:6], NAMES[:3]]
    keys = gram_keys(NAMES, "layer", waves)
    assert keys["layer_0@1"] == NAMES[3:5] and keys["layer_0@2"] == NAMES[1:3]
    assert keys["layer_1@0"] == [NAMES[6]] and keys["embedding"] == [NAMES[0]]
    assert possible_structures(keys) == ["layer", "none"]


def test_a_wave_of_one_stack_does_not_hide_that_there_are_two():
    names = ["encoder.layers.0.fc1.weight", "decoder.layers.0.fc1.weight"]
    assert gram_groups(names, "layer") == {names[0]: "encoder_layer_0", names[1]: "decoder_layer_0"}
    assert list(gram_keys(names, "layer", [[names[0]], [names[1]]])) == ["encoder_layer_0", "decoder_layer_0"]


def test_an_unknown_granularity_is_refused():
    with pytest.raises(ConfigError, match="gram_per='head' is unknown; choose one of parameter, layer-module, layer"):
        gram_keys(NAMES, "head")
