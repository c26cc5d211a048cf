"""Shards on one machine: in this process, or in several."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

from explain2me.errors import Explain2MeError

Task = TypeVar("Task")
MAX_TRIES = 3


def run_tasks(
    work: Callable[[Task], None], tasks: Sequence[Task], *, workers: int, threads: int | None = None
) -> Iterator[Task]:
    """Call ``work`` on every task and yield each task when it is done, in order of completion.

    Args:
        work: picklable where ``workers`` > 1; safe to repeat.
        tasks: what to do.
        workers: processes; 1 works in this process.
        threads: of torch in each process; None: as many as there are in this one, or cores / workers.

    Raises:
        Explain2MeError: workers died MAX_TRIES times. What other tasks have committed stays.
    """
    if workers == 1 or len(tasks) < 2:
        before = torch.get_num_threads()
        for task in tasks:
            torch.set_num_threads(threads or before)
            try:
                work(task)
            finally:
                torch.set_num_threads(before)
            yield task
        return
    left = list(tasks)
    for _ in range(MAX_TRIES):
        for task in _run_pool(work, left, workers=min(workers, len(left)), threads=threads):
            left.remove(task)
            yield task
        if not left:
            return
    raise Explain2MeError(
        f"a worker process died {MAX_TRIES} times (out of memory?); {len(tasks) - len(left)} of {len(tasks)} shards are "
        f"committed. Lower compute.workers or compute.batch_size and call the same command again"
    )


def _run_pool(work: Callable[[Task], None], tasks: list[Task], *, workers: int, threads: int | None) -> Iterator[Task]:
    """Yield tasks as they are done; stops early, without an error, when a worker dies."""
    context = multiprocessing.get_context("spawn")  # fork would inherit torch's threads and locks
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(threads,)
    ) as pool:
        futures = {pool.submit(work, task): task for task in tasks}
        try:
            while futures:
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    future.result()
                    yield futures.pop(future)
        except BrokenProcessPool:
            return
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
