"""Block keys from parameter names of the model families people use."""

import pytest

from streamfisher.blocks import assign_blocks, group_blocks, layer_key, module_key
from streamfisher.errors import ConfigError

LAYERS = {
    "model.layers.3.self_attn.q_proj.weight": "layer_3",
    "transformer.h.11.mlp.c_fc.weight": "layer_11",
    "h.0.ln_1.bias": "layer_0",
    "bert.encoder.layer.7.attention.self.query.weight": "layer_7",
    "vit.encoder.layer.2.output.dense.weight": "layer_2",
    "encoder.block.4.layer.0.SelfAttention.q.weight": "layer_4",
    "transformer.blocks.5.attn.Wqkv.weight": "layer_5",
    "gpt_neox.layers.1.mlp.dense_h_to_4h.weight": "layer_1",
    "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": "layer_0",
    "layer1.0.conv1.weight": "layer_1",
    "2.weight": "layer_2",
    "model.embed_tokens.weight": "embedding",
    "transformer.wpe.weight": "embedding",
    "shared.weight": "embedding",
    "bert.embeddings.LayerNorm.weight": "embedding",
    "lm_head.weight": "output",
    "classifier.bias": "output",
    "score.weight": "output",
    "cls.predictions.transform.dense.weight": "output",
    "model.norm.weight": "other",
    "transformer.ln_f.weight": "other",
}

MODULES = {
    "model.layers.3.self_attn.q_proj.weight": "attention",
    "model.layers.3.mlp.gate_proj.weight": "mlp",
    "model.layers.3.mlp.up_proj.weight": "mlp",
    "model.layers.3.mlp.down_proj.weight": "mlp",
    "model.layers.0.block_sparse_moe.experts.3.w1.weight": "mlp",
    "transformer.h.1.mlp.c_proj.weight": "mlp",
    "transformer.h.1.attn.c_proj.weight": "attention",
    "layers.0.feed_forward.w2.weight": "mlp",
    "model.decoder.layers.0.fc1.weight": "mlp",
    "bert.encoder.layer.7.attention.output.dense.weight": "attention",
    "bert.encoder.layer.7.attention.output.LayerNorm.weight": "normalization",
    "bert.encoder.layer.7.intermediate.dense.weight": "mlp",
    "bert.encoder.layer.7.output.dense.weight": "mlp",
    "encoder.block.4.layer.1.DenseReluDense.wi_0.weight": "mlp",
    "decoder.block.4.layer.1.EncDecAttention.q.weight": "attention",
    "model.layers.3.input_layernorm.weight": "normalization",
    "transformer.ln_f.weight": "normalization",
    "model.norm.weight": "normalization",
    "model.embed_tokens.weight": "embedding",
    "lm_head.weight": "output",
    "classifier.weight": "output",
}


@pytest.mark.parametrize(("name", "key"), LAYERS.items())
def test_layer_keys(name, key):
    assert layer_key(name) == key


@pytest.mark.parametrize(("name", "key"), MODULES.items())
def test_module_keys(name, key):
    assert module_key(name) == key


def test_two_stacks_do_not_share_a_layer():
    names = ["encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"]
    assert list(assign_blocks(names, "layer").values()) == ["encoder_layer_0", "decoder_layer_0"]


def test_parameter_and_none_structures():
    names = ["a.weight", "b.bias"]
    assert assign_blocks(names, "parameter") == {"a.weight": "a.weight", "b.bias": "b.bias"}
    assert group_blocks(assign_blocks(names, "none")) == {"global": names}


def test_own_patterns_must_account_for_every_parameter():
    names = ["a.weight", "b.bias"]
    assert assign_blocks(names, {"a.*": "first", "*": "rest"}) == {"a.weight": "first", "b.bias": "rest"}
    with pytest.raises(ConfigError, match=r"'b.bias' matches none"):
        assign_blocks(names, {"a.*": "first"})


def test_unknown_structure_names_the_choices():
    with pytest.raises(ConfigError, match="'rows' is unknown; choose one of layer, module, parameter, none"):
        assign_blocks(["a"], "rows")
