"""Find the images that kill the process that decodes them. Only the index calls this: it decodes every image first.

A task whose worker died twice is halved, and the halves are halved again, until single images remain. Each half runs as
a *probe*: a worker reads those images only to show whether it survives.
"""

import contextlib
import functools
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from explain2me.errors import Explain2MeError
from explain2me.workers import Engine, run_tasks

DEATHS = 2
"""Deaths over the same images before they are suspected; one death may be the machine's fault."""
MOST = 16
"""Crashing images that one task may have; more mean that the machine is at fault."""
MARK = "reading-"
"""Start of the name of a mark: the file of an attempt that a process works on."""


class Task(Protocol):
    """Images ``start`` to ``stop`` of a list; ``title`` is a file name that no other task has."""

    @property
    def start(self) -> int:
        """Its first image."""

    @property
    def stop(self) -> int:
        """The image after its last one."""

    @property
    def title(self) -> str:
        """Its file name."""


class Attempt(NamedTuple):
    """A task, or a probe of some of its images."""

    whole: Task
    start: int
    stop: int
    probe: bool = False

    @classmethod
    def at(cls, whole: Task) -> "Attempt":
        """The task itself."""
        return cls(whole, whole.start, whole.stop)


def run_despite_crashes(
    work: Callable[[Attempt], None],
    tasks: Sequence[Task],
    engine: Engine,
    *,
    marks: Path,
    record: Callable[[Task, int], None],
    on_progress: Callable[[int], None],
) -> None:
    """Do every task, and find the images that kill worker processes.

    Args:
        work: does one attempt, without the images that ``record`` was called with; commits nothing for a probe.
        tasks: ranges of images.
        engine: runs the attempts.
        marks: folder for the marks that survive a killed process.
        record: called with a task and an image that kills processes.
        on_progress: called with the number of images that a task has finished.

    Raises:
        Explain2MeError: workers die, but not because of single images.
    """
    search = CrashSearch(record)
    attempts = [Attempt.at(task) for task in tasks]
    finished = run_tasks(
        functools.partial(_work_marked, work, marks),
        attempts,
        engine,
        after_death=search.died,
        after_task=search.done,
        suspects={attempt for attempt in attempts if _mark(marks, attempt).exists()},
        on_progress=lambda _, count, seconds: on_progress(count),
    )
    for _ in finished:
        pass


class CrashSearch:
    """Chooses the next attempts after a worker died; calls ``record`` with a task and an image that kills processes."""

    def __init__(self, record: Callable[[Task, int], None]) -> None:
        self._record = record
        self._deaths: Counter[Attempt] = Counter()
        self._probes_left: Counter[Task] = Counter()
        self._has_new: set[Task] = set()
        self._fruitless: Counter[Task] = Counter()
        self._recorded: defaultdict[Task, set[int]] = defaultdict(set)

    def died(self, task: Attempt, was_killed: bool = False) -> Sequence[Attempt]:
        """Repeat the attempt after its first death; probe its halves after the second.

        An image is not to blame if its worker was killed by SIGKILL or SIGBUS: no decoder does that, but a machine without
        memory or disk.

        Raises:
            Explain2MeError: workers die, but not because of single images.
        """
        self._deaths[task] += 1
        if self._deaths[task] < DEATHS:
            return [task]
        self._deaths[task] = 0
        whole, start, stop, probe = task
        if start == stop:
            raise Explain2MeError(
                f"a worker process dies before it reads any of the images {whole.start} to {whole.stop - 1}: too little "
                f"memory, too few processes allowed, or a broken installation. What is committed stays; repair it and call the same command again"
            )
        if probe and stop - start == 1:
            if was_killed:
                raise Explain2MeError(
                    f"the process that reads image {start} of the list alone is killed (SIGKILL or SIGBUS): too little memory, or a lost disk? Nothing is "
                    f"quarantined; end what else needs memory, or lower data.max_pixels, and call the same command again"
                )
            self._add(whole, start)
            return self._probe_ended(whole)
        middle = (start + stop) // 2
        ranges = [(a, b) for a, b in ((start, middle), (middle, stop)) if a < b]
        if not probe:  # can a worker start at all?
            ranges.insert(0, (start, start))
        self._probes_left[whole] += len(ranges) - probe
        return [Attempt(whole, a, b, probe=True) for a, b in ranges]

    def done(self, task: Attempt) -> Sequence[Attempt]:
        """After the last probe of a task, the task itself."""
        return self._probe_ended(task.whole) if task.probe else []

    def _add(self, whole: Task, image: int) -> None:
        recorded = self._recorded[whole]
        if image in recorded or len(recorded) == MOST:
            raise Explain2MeError(
                f"worker processes die at more than {MOST} single images among {whole.start} to {whole.stop - 1}, or at one "
                f"that is left out already: the machine is at fault, not the images. What is committed stays; repair the "
                f"machine and call the same command again"
            )
        self._record(whole, image)
        recorded.add(image)
        self._has_new.add(whole)

    def _probe_ended(self, whole: Task) -> Sequence[Attempt]:
        self._probes_left[whole] -= 1
        if self._probes_left[whole]:
            return []
        if whole in self._has_new:
            self._has_new.remove(whole)
        else:  # something else may have killed the workers
            self._fruitless[whole] += 1
        if self._fruitless[whole] == DEATHS:
            raise Explain2MeError(
                f"the images {whole.start} to {whole.stop - 1} killed their worker process several times, but no single image "
                f"does: the memory was probably too small for all of them. What is committed stays; lower compute.workers "
                f"and call the same command again"
            )
        return [Attempt.at(whole)]


def _work_marked(work: Callable[[Attempt], None], folder: Path, attempt: Attempt) -> None:
    """Work on an attempt, and keep a mark in ``folder`` meanwhile.

    A killed process leaves its mark. The next call then gives this task to a worker process, whose death it survives.
    A local worker writes no mark, because the process that started it sees it die.
    """
    mark = _mark(folder, attempt)
    in_worker = multiprocessing.parent_process() is not None
    if not in_worker:
        with contextlib.suppress(FileNotFoundError):  # another machine has removed the folder: nobody needs the task
            mark.touch()
    try:
        work(attempt)
    finally:
        if not in_worker or not attempt.probe:
            mark.unlink(missing_ok=True)


def _mark(folder: Path, attempt: Attempt) -> Path:
    return folder / (MARK + attempt.whole.title)
