"""Write a checkpoint of the shape of Llama 2 7B with random weights, tensor by tensor, in bf16.

    python make_checkpoint.py llama-7b-random
    python make_checkpoint.py tiny --layers 2 --hidden 256

Each tensor is drawn from a generator of its own, seeded by `--seed` and the tensor's name, so that any part can be made
again. Only one shard is in memory at a time. Weights are scaled as in an initialised model: normal with a standard
deviation of 0.02, ones for norms.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def shapes(layers, hidden, vocabulary):
    """Return tensor name -> shape, in the order of the shards."""
    wide = hidden * 43 // 16 if hidden % 16 == 0 else 4 * hidden  # 11008 for 4096
    found = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{layer}.self_attn.{name}.weight"] = (hidden, hidden)
        found[f"{layer}.mlp.gate_proj.weight"] = (wide, hidden)
        found[f"{layer}.mlp.up_proj.weight"] = (wide, hidden)
        found[f"{layer}.mlp.down_proj.weight"] = (hidden, wide)
        found[f"{layer}.input_layernorm.weight"] = (hidden,)
        found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    found["model.norm.weight"] = (hidden,)
    found["lm_head.weight"] = (vocabulary, hidden)
    return found


def drawn(name, shape, seed):
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for rows in weight.split(4096):  # the float32 of a whole embedding need not be in memory
        rows.copy_(torch.randn(rows.shape, generator=generator) * 0.02)
    return weight


def config(layers, hidden, vocabulary):
    heads = max(hidden // 128, 2)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": shapes(1, hidden, 8)["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def main(options=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=float, default=1e9, help="bytes of a file")
    arguments = parser.parse_args(options)
    arguments.folder.mkdir(parents=True)
    shards = [{}]
    sizes = [0]
    for name, shape in shapes(arguments.layers, arguments.hidden, arguments.vocabulary).items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and sizes[-1] + size > arguments.shard:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = shape
        sizes[-1] += size
    weight_map = {}
    for number, members in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: drawn(name, shape, arguments.seed) for name, shape in members.items()}
        save_file(tensors, arguments.folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(members, file)
        print(f"{file}: {sizes[number - 1] / 1e9:.2f} GB", flush=True)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (arguments.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    values = config(arguments.layers, arguments.hidden, arguments.vocabulary)
    (arguments.folder / "config.json").write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
