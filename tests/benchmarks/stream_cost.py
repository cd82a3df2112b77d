"""What streaming a model layer by layer costs, beside the plain forward and backward pass of the same batches.

`python tests/benchmarks/stream_cost.py [--layers 8] [--hidden 512] [--length 128] [--batches 4] [--checkpoint]`

A Llama-shaped model, float32, CPU; all batches go through both in the same process, and they take turns. Printed are
ratios to the plain pass (forward, loss, backward with weight gradients): the forward stream, the backward stream that
takes the factors of every parameter that has any and rows of the others, the same without taking any, and their sum.
With `--checkpoint`, weights are read from safetensors files segment by segment instead of being in memory.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from streamfisher import load_skeleton
from streamfisher.models import resolve_loss
from streamfisher.stream import LayerStream


def build_model(layers: int, hidden: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def streamed(model, loss, batches, weights, report, capture: bool) -> tuple[float, float]:
    """Return the seconds of the forward and of the backward stream."""
    with LayerStream(model, loss, weights=weights) as stream:
        stream.study(batches[0], report)
        factorable = {name for name, found in report.parameters.items() if found.rule in ("linear", "embedding")}
        start = time.perf_counter()
        stream.forward(batches)
        middle = time.perf_counter()
        for segment in stream.segments:
            stream.begin(segment, batches)
            names = segment.parameters if capture else ()
            n = batches[0]["input_ids"].shape[0]
            rows = {x: torch.empty(n, stream.selection.infos[x].numel) for x in names if x not in factorable}
            for index in batches:
                stream.gradients(segment, index, batches, rows, [x for x in names if x in factorable])
            stream.finish(segment, batches)
        return middle - start, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = build_model(options.layers, options.hidden, options.vocabulary)
    generator = torch.Generator().manual_seed(1)
    shape = (options.samples, options.length)
    batches = {
        index: {"input_ids": torch.randint(0, options.vocabulary, shape, generator=generator)}
        for index in range(options.batches)
    }
    loss = resolve_loss(model, batches[0])
    with tempfile.TemporaryDirectory() as folder:
        streamed_model, weights = model, None
        if options.checkpoint:
            model.save_pretrained(folder, save_original_format=False)
            streamed_model, weights = load_skeleton(folder)
        with LayerStream(streamed_model, loss, weights=weights) as stream:
            report = stream.study(batches[0])

        def plain() -> float:
            start = time.perf_counter()
            for batch in batches.values():
                model.zero_grad(set_to_none=False)
                loss(model, batch).sum().backward()
            return time.perf_counter() - start

        times: dict[str, list[float]] = {name: [] for name in ("plain", "forward", "backward", "without rows")}
        plain()
        for _ in range(options.repeats):
            times["plain"].append(plain())
            forward, backward = streamed(streamed_model, loss, batches, weights, report, True)
            times["forward"].append(forward)
            times["backward"].append(backward)
            times["without rows"].append(streamed(streamed_model, loss, batches, weights, report, False)[1])
    best = {name: min(values) for name, values in times.items()}
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{options.layers} layers, {n_parameters / 1e6:.1f} million parameters, {shape[0]} x {shape[1]} tokens a batch"
    )
    print(f"plain pass over {options.batches} batches: {best['plain']:.2f} s")
    print(f"forward stream  {best['forward'] / best['plain']:.2f}")
    print(
        f"backward stream {best['backward'] / best['plain']:.2f} ({best['without rows'] / best['plain']:.2f} without)"
    )
    print(f"in all          {(best['forward'] + best['backward']) / best['plain']:.2f}")


if __name__ == "__main__":
    main()
