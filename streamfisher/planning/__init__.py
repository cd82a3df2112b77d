"""What a run takes, before anything runs: shapes without weights, operations, bytes, and the ways to do it."""
