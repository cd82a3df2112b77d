"""Adapters on a frozen, quantised base: their gradients are those of autograd through the same quantised base."""

import importlib.util

import pytest
import torch
from torch.nn.functional import cross_entropy

import streamfisher as sf
from streamfisher.store import model_fingerprint

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def torchao(bits):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    if bits == 8:
        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    return transformers.TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


def bitsandbytes(bits):
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    return transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **four)


WAYS = {
    "torchao, 8 bits": ("torchao", lambda: torchao(8)),
    "torchao, 4 bits": ("torchao", lambda: torchao(4)),
    "bitsandbytes, 8 bits": ("bitsandbytes", lambda: bitsandbytes(8)),
    "bitsandbytes, 4 bits": ("bitsandbytes", lambda: bitsandbytes(4)),
    "quanto, 8 bits": ("optimum.quanto", lambda: transformers.QuantoConfig(weights="int8")),
}


def quantised_with_adapters(way, folder, seed=0):
    package, config = WAYS[way]
    if importlib.util.find_spec(package.split(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config(), device_map={"": "cpu"}
    )
    lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapters(model).values():  # B starts at zero, where A has no gradient
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapters(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def one_by_one(model, ids, way):
    """Return `{parameter: (N, P)}` by a plain loop."""
    model.train(way == "bitsandbytes, 4 bits")  # in eval mode it may pack weights and lose gradients
    rows = {name: [] for name in adapters(model)}
    for sequence in ids:
        model.zero_grad()
        cross_entropy(model(input_ids=sequence[None]).logits[0, :-1], sequence[1:], reduction="sum").backward()
        for name, parameter in adapters(model).items():
            rows[name].append(parameter.grad.double().reshape(-1))
    model.zero_grad()
    return {name: torch.stack(values) for name, values in rows.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_adapters_on_a_quantised_base_have_the_gradients_of_autograd(way, tmp_path):
    model = quantised_with_adapters(way, tmp_path / "hf")
    ids = torch.randint(1, 64, (6, 7), generator=torch.Generator().manual_seed(0))
    expected = one_by_one(model, ids, way)
    assert all(float(rows.norm()) > 0 for rows in expected.values())
    config = sf.SpectralConfig(chunk_size=3, n_workers=1, guard_every=1, dtype_model="float32")
    run = sf.collect(model, {"input_ids": ids}, tmp_path / "run.zarr", config=config)
    assert set(run.parameters) == set(adapters(model)) == set(expected)
    for name, rows in expected.items():
        found = torch.from_numpy(run.store.rows.columns(name, 0, run.parameters[name])).double()
        assert float((found - rows).norm() / rows.norm()) < 1e-5, name
    assert run.manifest.excluded["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"]
    (tmp_path / "run.zarr/done/rows-000001.json").unlink()
    assert sf.collect(model, {"input_ids": ids}, tmp_path / "run.zarr", config=config).info()["complete"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_the_fingerprint_sees_quantised_values(way, tmp_path):
    one, again, other = (quantised_with_adapters(way, tmp_path / str(n), seed=n // 2) for n in range(3))
    assert model_fingerprint(one) == model_fingerprint(again) != model_fingerprint(other)
