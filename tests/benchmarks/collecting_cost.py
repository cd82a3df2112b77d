"""What per-sample gradients cost, beside the plain forward and backward pass of the same batches in the same process.

`python tests/benchmarks/collecting_cost.py [--threads 1] [--repeats 5] [--lengths 32 128 512] [--token] [--json FILE]`

A Llama-shaped model with about 5 million parameters, float32, CPU. Columns are ratios to the plain pass (forward, loss,
backward with weight gradients): all rows formed in memory; factors only; a loop over samples; `vmap(grad)`. Memory is
the peak of the resident set over the plain pass's own peak, in units of the batch's rows, each measured in a process of
its own.

`--token` measures `sample_unit='token'` instead: the rows of every target token of one sequence, batched as a run does
it, beside one forward of the sequence and one plain backward (with weight gradients) per target token.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.func import functional_call, grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM

from streamfisher.data import Samples, TokenSamples, collate, make_batches, make_units, sequence_length
from streamfisher.gradients import GradientEngine
from streamfisher.models import call_model, resolve_loss

VOCABULARY = 512
CHUNK_SIZE = 32  # rows of a unit, as by default in a run


def build_model() -> torch.nn.Module:
    """A decoder of 6 layers of width 256."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def build_batch(n_samples: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, VOCABULARY, (n_samples, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seconds(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Best time of each function; they take turns, so that a change of the machine's speed hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def plain_pass(model: torch.nn.Module, loss, batch) -> None:
    """Forward, loss and backward with weight gradients, which are dropped again as an optimiser would."""
    model.zero_grad(set_to_none=False)
    loss(model, batch).sum().backward()


def measure(length: int, tokens: int, repeats: int, with_slow: bool) -> dict[str, float]:
    """Return ratios to the plain pass at one sequence length."""
    model, n_samples = build_model(), max(2, tokens // length)
    batch = build_batch(n_samples, length)
    loss = resolve_loss(model, batch)
    plain_model = build_model()
    loop_model, vmap_model = build_model(), build_model()
    vmap_model.set_attn_implementation("eager")  # the fused kernel has no batching rule
    parameters = dict(loop_model.named_parameters())
    out = None

    def loop() -> None:
        for i in range(n_samples):
            sample = {key: value[i : i + 1] for key, value in batch.items()}
            grads = torch.autograd.grad(loss(loop_model, sample).sum(), list(parameters.values()))
            for rows, value in zip(out.values(), grads, strict=True):
                rows[i].copy_(value.reshape(-1))

    def sample_loss(parameters, ids) -> torch.Tensor:
        logits = functional_call(vmap_model, parameters, (), {"input_ids": ids[None], "use_cache": False}).logits[0]
        return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum")

    def by_vmap() -> None:
        detached = {name: value.detach() for name, value in vmap_model.named_parameters()}
        rows = vmap(grad(sample_loss), in_dims=(None, 0))(detached, batch["input_ids"])
        for name, value in rows.items():
            out[name][:n_samples].copy_(value.flatten(1))

    with GradientEngine(model, loss) as engine:
        engine.probe(batch)
        out = engine.allocate(n_samples)
        functions: dict[str, Callable[[], object]] = {
            "plain": lambda: plain_pass(plain_model, loss, batch),
            "rows": lambda: engine.rows(batch, out),
            "factors": lambda: engine.rows(batch, {}, engine.factorable),
        }
        if with_slow:
            functions["loop"] = loop
            try:
                by_vmap()
                functions["vmap(grad)"] = by_vmap
            except RuntimeError as error:
                print(f"    vmap(grad) does not run on this model: {str(error).splitlines()[0]}")
        took = seconds(functions, repeats)
    ratios = {name: value / took["plain"] for name, value in took.items() if name != "plain"}
    return {"length": length, "samples": n_samples, "plain_seconds": took["plain"], **ratios}


def measure_tokens(length: int, batch_tokens: int, repeats: int) -> dict[str, float]:
    """Return the cost of a sequence's token rows as a ratio to one plain backward per token."""
    model, plain_model = build_model(), build_model()
    sequence = build_batch(1, length)
    tokens = Samples(TokenSamples(Samples({"input_ids": sequence["input_ids"]}), shifted=True))
    loss = resolve_loss(model, sequence)
    parameters = list(plain_model.parameters())

    def plain() -> None:
        logits = call_model(plain_model, sequence).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, sequence["input_ids"][0, 1:], reduction="none")
        for value in losses:
            torch.autograd.grad(value, parameters, retain_graph=True)

    with GradientEngine(model, loss) as engine:
        engine.probe(collate([tokens[0], tokens[1], tokens[2]]))
        out = engine.allocate(CHUNK_SIZE)

        def rows() -> None:
            for unit in make_units(len(tokens), CHUNK_SIZE):
                lengths = [sequence_length(tokens[i]) for i in range(unit.start, unit.stop)]
                for where in make_batches(lengths, batch_tokens):
                    batch = collate([tokens[unit.start + offset] for offset in where])
                    engine.rows(batch, {name: values[where.start : where.stop] for name, values in out.items()})

        took = seconds({"plain": plain, "rows": rows}, repeats)
    return {
        "length": length,
        "tokens": len(tokens),
        "plain_seconds": took["plain"],
        "rows": took["rows"] / took["plain"],
    }


def _peak_bytes() -> int:
    """Peak resident set of this process; `ru_maxrss` will not do, because a child starts with its parent's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _peak(kind: str, length: int, tokens: int, threads: int, results) -> None:
    torch.set_num_threads(threads)
    model, n_samples = build_model(), max(2, tokens // length)
    batch = build_batch(n_samples, length)
    loss = resolve_loss(model, batch)
    if kind == "plain":
        for _ in range(3):
            plain_pass(model, loss, batch)
        results.put((_peak_bytes(), 0))
        return
    with GradientEngine(model, loss) as engine:
        two = {key: value[:2] for key, value in batch.items()}
        engine.probe(two)
        gc.collect()
        out = engine.allocate(n_samples)
        for _ in range(3):
            engine.rows(batch, out)
        results.put(
            (
                _peak_bytes(),
                sum(rows.nbytes for rows in out.values()),
            )
        )


def memory(length: int, tokens: int, threads: int) -> float:
    """Peak over the plain pass's peak, divided by the size of the batch's rows."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for kind in ("plain", "rows"):
        results = context.Queue()
        process = context.Process(target=_peak, args=(kind, length, tokens, threads, results))
        process.start()
        peaks[kind] = results.get()
        process.join()
    return (peaks["rows"][0] - peaks["plain"][0]) / peaks["rows"][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--token", action="store_true", help="measure sample_unit='token' instead")
    parser.add_argument("--fast", action="store_true", help="without the loop, vmap(grad) and memory")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    numel = sum(p.numel() for p in build_model().parameters())
    print(f"{numel:,} parameters, float32, {arguments.threads} threads, {arguments.tokens} tokens in a batch")
    if arguments.token:
        print("length  tokens  plain s   rows")
        table = []
        for length in arguments.lengths:
            row = measure_tokens(length, arguments.tokens, arguments.repeats)
            table.append(row)
            print(f"{length:6d} {row['tokens']:7d} {row['plain_seconds']:8.3f} {row['rows']:6.2f}", flush=True)
        _write(arguments.json, table)
        return
    print("length  samples  plain s   rows  factors   loop  vmap(grad)  memory over plain / rows")
    table = []
    for length in arguments.lengths:
        row = measure(length, arguments.tokens, arguments.repeats, with_slow=not arguments.fast)
        if not arguments.fast:
            row["memory"] = memory(length, arguments.tokens, arguments.threads)
        table.append(row)
        print(
            f"{length:6d} {row['samples']:8d} {row['plain_seconds']:8.3f} {row['rows']:6.2f} {row['factors']:8.2f} "
            f"{row.get('loop', float('nan')):6.2f} {row.get('vmap(grad)', float('nan')):11.2f} "
            f"{row.get('memory', float('nan')):8.2f}",
            flush=True,
        )
    _write(arguments.json, table)


def _write(path: Path | None, table: list[dict[str, float]]) -> None:
    if path:
        path.write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
