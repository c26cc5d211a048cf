"""Run tasks on one machine or many; the engine changes nothing in what they write."""

from explain2me.workers.engine import Engine
from explain2me.workers.local import report_progress
from explain2me.workers.schedule import repeating, run_tasks

__all__ = ["Engine", "repeating", "report_progress", "run_tasks"]
