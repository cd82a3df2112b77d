"""A training loop of one's own under DistributedDataParallel, with a collector; prints the weights it ends with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from tiny_models import TinyCausal
from torch import distributed, nn

import streamfisher as sf


def main(folder: Path, every: int) -> None:
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    generator = torch.Generator().manual_seed(3)
    data = torch.randint(0, 256, (8, 6), generator=generator)
    model = nn.parallel.DistributedDataParallel(TinyCausal(seed=0))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    config = sf.SpectralConfig(chunk_size=2, n_workers=1, use_deterministic=True, rank_timeout=60)
    logged: list[int] = []
    collector = sf.Collector(
        folder, {"input_ids": data}, every=every, config=config, log=lambda metrics, step: logged.append(step)
    )
    own = data[rank::2]
    for _ in range(4):
        optimiser.zero_grad()
        logits = model(own)
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), own[:, 1:].flatten()).backward()
        optimiser.step()
        collector.step(model)
    total = sum(float(parameter.detach().double().sum()) for parameter in model.parameters())
    sys.stdout.write(f"rank {rank}: {total.hex()} logged {logged}\n")  # in one piece: the ranks share the pipe
    sys.stdout.flush()
    distributed.barrier()  # a rank that leaves while another still talks to it can be aborted by gloo's threads
    os._exit(0)  # and so can one that takes DDP and its process group apart: now and then torch ends it with SIGABRT


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
