"""Give tasks to workers, and repeat a task whose worker died."""

import contextlib
import functools
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

import torch

from explain2me.errors import Explain2MeError
from explain2me.workers.engine import Engine
from explain2me.workers.local import LocalWorker, WorkerDied, listening

Task = TypeVar("Task", bound=Hashable)
MAX_TRIES = 3
OnProgress = Callable[[Task, int, float], None]
NextTasks = Callable[[Task], Sequence[Task]]
AfterDeath = Callable[[Task, bool], Sequence[Task]]
"""(task, whether the machine killed its worker) -> tasks to do next."""


class Worker(Protocol):
    """A process that does one task at a time."""

    def run(self, work: Callable[[Task], None], task: Task, on_progress: Callable[[int, float], None]) -> None:
        """Do a task and wait; raises WorkerDied if the process ended."""

    def kill(self) -> None:
        """End the process now, even while another thread waits for it."""

    def close(self) -> None:
        """Clean up after the last task."""


def repeating(
    to_lower: str = "compute.workers, or give a new folder with a smaller compute.batch_size",
) -> AfterDeath[Task]:
    """A function for ``after_death`` that repeats a task, and raises when its workers have died MAX_TRIES times.

    Args:
        to_lower: fields to lower, for the message.
    """
    deaths: Counter[Task] = Counter()

    def repeat(task: Task, was_killed: bool = False) -> Sequence[Task]:
        deaths[task] += 1
        if deaths[task] >= MAX_TRIES:
            raise Explain2MeError(
                f"a worker process died {MAX_TRIES} times at the same task (too little memory, or too few processes allowed?); what is committed stays. Lower "
                f"{to_lower} and call the same command again"
            )
        return [task]

    return repeat


def run_tasks(
    work: Callable[[Task], None],
    tasks: Sequence[Task],
    engine: Engine,
    *,
    after_death: AfterDeath[Task] | None = None,
    after_task: NextTasks[Task] = lambda _: (),
    suspects: Collection[Task] = (),
    on_start: Callable[[Task], None] = lambda _: None,
    on_progress: OnProgress[Task] = lambda *_: None,
) -> Iterator[Task]:
    """Call ``work`` on every task and yield each task when it is done, in order of completion.

    A worker holds one task at a time, so a death costs at most one task. Closing the iterator, Ctrl-C and an error end
    all workers at once.

    Args:
        work: safe to repeat; picklable unless it runs in this process.
        tasks: what to do.
        engine: where.
        after_death: tasks to do next after the worker of a task died; None tries each task MAX_TRIES times.
        after_task: tasks to do next after a task is done by a worker.
        suspects: tasks that have killed a process before; they get a worker process even if the engine is this process.
        on_start: called in the caller's thread with each task that starts.
        on_progress: called with a task, and the units and seconds that it reports, from any thread.

    Raises:
        Explain2MeError: of ``after_death``.
        Exception: of a task; the running tasks are ended.
    """
    alone = engine.executor == "local" and (engine.workers == 1 or len(tasks) < 2)
    if alone:
        for task in tasks:
            if task not in suspects:
                on_start(task)
                with (
                    torch_threads(engine.threads or torch.get_num_threads()),
                    listening(functools.partial(on_progress, task)),
                ):
                    work(task)
                yield task
        tasks = [task for task in tasks if task in suspects]
    if tasks:
        after_death = after_death or repeating()
        yield from _run_in_workers(work, tasks, engine, after_death, after_task, on_start, on_progress)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set the number of threads of torch inside the block; the last bits of a sum depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run_in_workers(
    work: Callable[[Task], None],
    tasks: Sequence[Task],
    engine: Engine,
    after_death: AfterDeath[Task],
    after_task: NextTasks[Task],
    on_start: Callable[[Task], None],
    on_progress: OnProgress[Task],
) -> Iterator[Task]:
    queue = deque(tasks)
    with _open_workers(engine) as (workers, threads):
        idle = list(workers)
        running: dict[Future[None], tuple[Worker, Task]] = {}
        while queue or running:
            while queue and idle:
                worker, task = idle.pop(), queue.popleft()
                on_start(task)
                progress = functools.partial(on_progress, task)
                running[threads.submit(worker.run, work, task, progress)] = worker, task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                worker, task = running.pop(future)
                idle.append(worker)
                try:
                    future.result()
                except WorkerDied as death:
                    queue.extendleft(reversed(after_death(task, death.was_killed)))
                else:
                    queue.extendleft(reversed(after_task(task)))
                    yield task


@contextlib.contextmanager
def _open_workers(engine: Engine) -> Iterator[tuple[list[Worker], ThreadPoolExecutor]]:
    """Workers, and a thread for each that waits for it; all of them end with the block."""
    workers = _make_workers(engine)
    threads = ThreadPoolExecutor(len(workers), thread_name_prefix="explain2me-worker")
    try:
        yield workers, threads
    finally:
        try:
            for worker in workers:
                worker.kill()
        finally:
            threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()


def _make_workers(engine: Engine) -> list[Worker]:
    if engine.executor == "ray":
        from explain2me.workers.ray import open_workers

        return list(open_workers(engine))
    threads = engine.threads or max(1, (os.cpu_count() or 1) // engine.workers)
    return [LocalWorker(index, threads) for index in range(engine.workers)]
