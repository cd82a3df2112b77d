"""Hold a streamed run's Grams of its last layer against that layer's rows, computed directly in float64.

    python check_layer.py RUN CHECKPOINT DATA

The layer's inputs and output gradients are recorded once more. From them plain autograd in float64 gives each sample's
gradient by itself; nothing of streamfisher's rules, factors or products takes part. Printed is the relative difference
of each Gram (Frobenius), and that of the trace of the whole spectrum from the mean squared gradient norm.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils import _pytree as pytree

import streamfisher as sf
from streamfisher.data import Samples, collate
from streamfisher.gradients import ProbeReport
from streamfisher.models import resolve_loss
from streamfisher.stream import LayerStream, grad_at, value_name


def layer_gradients(stream, batches, checked):
    """Return parameter -> (N, P) rows of the last layer, float64 autograd on each sample alone, and its name."""
    stream.forward(batches)
    tail, last = stream.segments[:2]
    stream.begin(tail, batches)
    for index in batches:
        stream.gradients(tail, index, batches, {})
    stack = stream.forward_stream.stack
    call = stack.trace.calls[last.calls[0]]
    kept = {}
    for index in batches:
        values = [stream.boundaries.get(index, value_name(key)) for key in call.sources]
        kept[index] = values, stream.boundaries.get(index, grad_at(last.outputs[0], 0))
    rows = {}
    with stream.weights.held(*last.modules):
        layer = stream.shell.layers[call.module].double()
        parameters = {name: p for name, p in layer.named_parameters() if name in checked}
        for parameter in layer.parameters():
            parameter.requires_grad_(any(parameter is one for one in parameters.values()))
        for values, dy in kept.values():
            for i in range(len(dy)):
                one = [_of_sample(value, i, len(dy)) for value in values]
                args, kwargs = pytree.tree_unflatten(one, call.spec)
                y = pytree.tree_leaves(layer(*args, **kwargs))[0]
                grads = torch.autograd.grad((y * dy[i : i + 1].double()).sum(), list(parameters.values()))
                for name, grad in zip(parameters, grads, strict=True):
                    rows.setdefault(f"{call.module}.{name}", []).append(grad.reshape(-1).float())
    return {name: torch.stack(found) for name, found in rows.items()}


def _of_sample(value, i, n):
    if not isinstance(value, torch.Tensor):
        return value
    value = value.double() if value.is_floating_point() else value
    return value[i : i + 1] if value.dim() and value.shape[0] == n else value


def gram(rows):
    """Return the (N, N) inner products, each column slab multiplied in float64."""
    found = np.zeros((len(rows), len(rows)))
    for slab in rows.split(1 << 20, dim=1):
        slab = slab.double().numpy()
        found += slab @ slab.T
    return found


def main(options=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data")
    parser.add_argument(
        "--parameters",
        nargs="+",
        default=["input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.o_proj.weight"],
    )
    arguments = parser.parse_args(options)
    run = sf.open_run(arguments.run)
    length = run.config.max_length
    source = sf.load_samples(arguments.data, max_length=length)
    samples = Samples(source, run.store.n_samples, length)
    batches = {0: collate([samples[i] for i in range(len(samples))])}
    model, weights = sf.load_skeleton(arguments.checkpoint, dtype=torch.float32)
    loss = resolve_loss(model, batches[0], "causal")
    with LayerStream(model, loss, weights=weights) as stream:
        stream.study(batches[0], ProbeReport.from_dict(run.store.manifest.probe))
        rows = layer_gradients(stream, batches, arguments.parameters)
    differences = {}
    for name, values in rows.items():
        direct, stored = gram(values), np.asarray(run.gram(name))
        differences[name] = float(np.linalg.norm(direct - stored) / np.linalg.norm(direct))
        print(f"{name}: {differences[name]:.1e}")
    spectrum = json.loads((arguments.run / "spectrum.json").read_text())
    trace, squared = spectrum["global"]["trace"], run.store.samples.per_sample("squared_norm")
    differences["trace"] = abs(trace - squared.sum() / len(samples)) / trace
    print(f"trace against the mean squared norm: {differences['trace']:.1e}")
    weights.close()
    return differences


if __name__ == "__main__":
    main()
