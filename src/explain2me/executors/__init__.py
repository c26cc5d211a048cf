"""Carry shards to workers."""

from explain2me.executors.local import run_tasks

__all__ = ["run_tasks"]
