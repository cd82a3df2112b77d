"""Imports what most commands import; a process that forks them loads this first.

What is frozen here no collection of a fork looks through, so its pages stay shared with the process that forked it.
"""

import gc

import accelerate  # noqa: F401
import dask.threaded  # noqa: F401
import distributed  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp
import transformers.models.llama.modeling_llama  # noqa: F401

import streamfisher.cli.main
import streamfisher.demo
import streamfisher.verification  # noqa: F401

torch.set_num_threads(1)
gc.collect()
gc.freeze()
