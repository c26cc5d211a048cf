"""Run tasks on one machine or many; the engine changes nothing in what they write."""

from explain2me.workers.engine import Engine
from explain2me.workers.local import report_progress
from explain2me.workers.schedule import Recovery, run_tasks

__all__ = ["Engine", "Recovery", "report_progress", "run_tasks"]
