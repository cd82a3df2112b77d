"""The whole job, gradients to all eigenvalues, beside what one would do without: ratios to a plain pass.

    python tests/benchmarks/whole_job.py            # 3.1M parameters, 256 x 128 tokens
    python tests/benchmarks/whole_job.py --small    # 0.8M parameters, 128 x 64 tokens

Plain is forward and backward of the same batches with weight gradients. The loop takes one sample's gradients by
autograd at a time and multiplies in float64; `vmap` takes a batch's by `torch.func.vmap(grad)` and multiplies in
float32; both hold all rows in memory and solve the whole model's Gram. Ours gives the spectra of `none`, `layer` and
`module`. Ratios of wall time and of processor time, each the least of some repetitions; on an idle machine they agree.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

import streamfisher as sf

SIZES = {
    "large": (256, 128, {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 1024}),
    "small": (128, 64, {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "vocab_size": 256}),
}


def timed(call: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=None, help="loop, vmap, memory, run, kept")
    arguments = parser.parse_args()
    n, length, sizes = SIZES["small" if arguments.small else "large"]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=4, max_position_embeddings=length, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, sizes["vocab_size"], (n, length), generator=torch.Generator().manual_seed(1))
    per_batch = 4096 // length
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, {n} x {length} tokens, {torch.get_num_threads()} threads")

    def losses(batch: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")

    def plain() -> None:
        for batch in ids.split(per_batch):
            losses(batch, model(input_ids=batch).logits).backward()
            model.zero_grad()

    def loop() -> np.ndarray:
        rows = torch.zeros(n, n_parameters)
        for number, sample in enumerate(ids.split(1)):
            grads = torch.autograd.grad(losses(sample, model(input_ids=sample).logits), list(model.parameters()))
            torch.cat([grad.flatten() for grad in grads], out=rows[number])
        gram = sum(part.double() @ part.double().T for part in rows.split(1 << 16, dim=1))
        return np.linalg.eigvalsh(gram.numpy() / n)

    def vmap() -> np.ndarray:
        eager = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
        eager.load_state_dict(model.state_dict())
        parameters = {name: p.detach() for name, p in eager.named_parameters()}
        mask = torch.zeros(1, 1, length, length).masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))

        def one(values: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
            inputs = {"input_ids": sample[None], "attention_mask": mask}
            return losses(sample[None], torch.func.functional_call(eager, values, (), inputs).logits)

        each = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))
        rows = torch.zeros(n, n_parameters)
        for first in range(0, n, per_batch):
            grads = each(parameters, ids[first : first + per_batch])
            torch.cat([grad.flatten(1) for grad in grads.values()], dim=1, out=rows[first : first + per_batch])
        gram = sum((part @ part.T).double() for part in rows.split(1 << 16, dim=1))
        return np.linalg.eigvalsh(gram.numpy() / n)

    def memory() -> None:
        sf.FisherSpectral(sf.SpectralConfig()).compute_fisher_spectrum(
            model, {"input_ids": ids}, block_structure="layer"
        )

    def run(keep: str, folder: str) -> None:
        options = sf.SpectralConfig(keep_gradients=keep)
        made = sf.collect(model, {"input_ids": ids}, Path(folder) / "run", config=options)
        for structure in ("none", "layer", "module"):
            made.spectrum(structure)

    ways = {"loop": loop, "vmap": vmap, "memory": memory, "run": partial(run, "none"), "kept": partial(run, "all")}
    plain()
    best = [min(seconds) for seconds in zip(*(timed(plain) for _ in range(3)), strict=True)]
    print(f"{'plain':8s} {best[0]:7.2f} s")
    for name, call in ways.items():
        if arguments.only and name not in arguments.only:
            continue
        times = []
        for _ in range(arguments.repeat):
            with tempfile.TemporaryDirectory() as folder:  # whose deletion is no part of the job
                times.append(timed(partial(call, folder) if name in ("run", "kept") else call))
        seconds = [min(pair) for pair in zip(*times, strict=True)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        ratios = {"wall": round(seconds[0] / best[0], 2), "processor": round(seconds[1] / best[1], 2)}
        print(f"{name:8s} {seconds[0]:7.2f} s  {json.dumps(ratios)}  peak so far {peak:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
