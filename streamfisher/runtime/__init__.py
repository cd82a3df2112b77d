"""The machine a run works on: ranks, memory, disk, threads, signals, durable files."""
