"""The machine a run works on: ranks, memory, disk, threads, signals, durable files."""

from streamfisher.runtime.dask_pool import dask_client
from streamfisher.runtime.determinism import deterministic, one_thread
from streamfisher.runtime.disk import check_disk, disk_limit, free_disk
from streamfisher.runtime.durable import read_json, replacing, write_json, write_marker
from streamfisher.runtime.memory import of_one_rank, working_memory
from streamfisher.runtime.ranks import Ranks, start_ranks
from streamfisher.runtime.run_log import RunLog, read_log
from streamfisher.runtime.signals import StopRequest, finishing_first
from streamfisher.runtime.threads import chunks_at_a_time, worker_count

__all__ = [
    # Processes
    "Ranks",
    "start_ranks",
    "dask_client",
    "worker_count",
    "chunks_at_a_time",
    # What may stop or change a computation
    "StopRequest",
    "finishing_first",
    "deterministic",
    "one_thread",
    # Memory and disk
    "working_memory",
    "of_one_rank",
    "free_disk",
    "check_disk",
    "disk_limit",
    # Files that survive a crash, and the log
    "read_json",
    "write_json",
    "write_marker",
    "replacing",
    "RunLog",
    "read_log",
]
