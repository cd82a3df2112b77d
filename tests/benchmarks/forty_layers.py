"""A picture and a report of a model of 40 layers: `python tests/benchmarks/forty_layers.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import streamfisher as sf
from streamfisher.reports import html_report, picture


def main(folder: Path) -> None:
    """Collect the gradients of a small random Llama, and draw them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 97}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=40, max_position_embeddings=32, **sizes))
    samples = [{"input_ids": torch.randint(97, (24,))} for _ in range(96)]
    run = sf.collect(model, samples, folder / "forty.zarr", progress=True)
    spectra = [run.spectrum(structure) for structure in ("layer", "module")]
    print(picture(spectra, folder / "layers-40.png"))
    print(html_report(run, spectra, folder / "layers-40.html", progress=True).path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
