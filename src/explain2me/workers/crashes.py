"""Which image ends the process that reads it? A shard that has killed its worker twice is halved until it is known."""

import contextlib
import multiprocessing
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from explain2me.errors import Explain2MeError
from explain2me.run.files import atomic_path
from explain2me.run.leftovers import is_at_work, this_process
from explain2me.workers import Recovery

DEATHS = 2
"""So often a worker must die of the same images before they are suspected: once may have been the machine."""
MOST = 16
"""Images of one shard that may be found; more are no accident of the images."""
RUNNING = ".running-"


class Whole(Protocol):
    """A contiguous range of images that is one task."""

    @property
    def start(self) -> int:
        """First image."""

    @property
    def stop(self) -> int:
        """One more than the last image."""

    @property
    def title(self) -> str:
        """A file name that no other task of the run has."""


class Attempt(NamedTuple):
    """A task, or a probe: some images of it, done for nothing but to see whether the process survives."""

    whole: Whole
    start: int
    stop: int
    probe: bool = False

    @classmethod
    def at(cls, whole: Whole) -> "Attempt":
        """The task itself."""
        return cls(whole, whole.start, whole.stop)


class CrashSearch(Recovery[Attempt]):
    """After two deaths the halves are probed, then their halves; the images found are recorded, and the task is tried
    again without them.

    Args:
        record: called with a task and an image of which processes die.
    """

    def __init__(self, record: Callable[[Whole, int], None]) -> None:
        super().__init__()
        self.num_deaths = 0
        self._record = record
        self._open: Counter[Whole] = Counter()
        self._found: set[Whole] = set()
        self._fruitless: Counter[Whole] = Counter()
        self._recorded: defaultdict[Whole, set[int]] = defaultdict(set)

    def died(self, task: Attempt) -> Sequence[Attempt]:
        """Try again, or look into the halves.

        Raises:
            Explain2MeError: no image alone ends a process, but the task as a whole does.
        """
        self.num_deaths += 1
        self._deaths[task] += 1
        if self._deaths[task] < DEATHS:
            return [task]
        self._deaths[task] = 0
        whole, start, stop, probe = task
        if start == stop:
            raise Explain2MeError(
                f"a worker process ends without any image, only by loading what it needs for the images {whole.start} to "
                f"{whole.stop - 1}: too little memory, or a broken device or installation. What is committed stays; mend "
                f"it and call the same command again"
            )
        if probe and stop - start == 1:
            if start in self._recorded[whole] or len(self._recorded[whole]) == MOST:
                raise Explain2MeError(
                    f"worker processes die of more than {MOST} single images among {whole.start} to {whole.stop - 1}, or of one that "
                    f"is left out already: the machine is at fault, not the images. What is committed stays; look into "
                    f"quarantine/ and call the same command again"
                )
            self._record(whole, start)
            self._recorded[whole].add(start)
            self._found.add(whole)
            return self._close(whole)
        middle = (start + stop) // 2
        halves = [Attempt(whole, a, b, probe=True) for a, b in ((start, middle), (middle, stop)) if a < b]
        if not probe:  # does it take an image at all?
            halves = [Attempt(whole, start, start, probe=True), *halves]
        self._open[whole] += len(halves) - (1 if probe else 0)
        return halves

    def done(self, task: Attempt) -> Sequence[Attempt]:
        """The whole task again, once its last probe is over."""
        return self._close(task.whole) if task.probe else []

    def _close(self, whole: Whole) -> Sequence[Attempt]:
        self._open[whole] -= 1
        if self._open[whole]:
            return []
        if whole not in self._found:
            self._fruitless[whole] += 1
            if self._fruitless[whole] < DEATHS:  # somebody else may have ended the workers
                return [Attempt.at(whole)]
            raise Explain2MeError(
                f"the images {whole.start} to {whole.stop - 1} ended their worker process again and again, but none does so alone: the "
                f"memory was probably too small for all of them. What is committed stays; lower compute.batch_size or "
                f"compute.workers (a lower batch_size needs a new folder) and call the same command again"
            )
        self._found.remove(whole)
        return [Attempt.at(whole)]


@contextlib.contextmanager
def marked(folder: Path, attempt: Attempt) -> Iterator[None]:
    """Leave a mark while a task runs in the driver itself: if the process ends there, the mark tells the next call.

    A worker process leaves none, since its driver sees it end; it removes the mark when the task is done.
    """
    mark = folder / (RUNNING + attempt.whole.title)
    driver = multiprocessing.parent_process() is None
    if driver:
        with atomic_path(mark) as temporary:  # an empty one would be taken for one left over
            temporary.write_text(this_process())
    try:
        yield
    finally:
        if driver or not attempt.probe:
            mark.unlink(missing_ok=True)


def suspected(folder: Path, attempts: Sequence[Attempt]) -> set[Attempt]:
    """Tasks in the middle of which a driver ended; they get a worker process of their own."""
    marks = {path.name for path in _left_over(folder)}
    return {attempt for attempt in attempts if RUNNING + attempt.whole.title in marks}


def remove_marks(folder: Path, titles: str) -> None:
    """Remove the marks of processes that ended at what others have done since, at tasks with such titles (a pattern)."""
    for path in _left_over(folder, titles):
        path.unlink(missing_ok=True)


def _left_over(folder: Path, titles: str = "*") -> list[Path]:
    """Marks of drivers that are not there any more, or of another machine."""
    return [path for path in folder.glob(f"{RUNNING}{titles}") if not is_at_work(_read(path))]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:  # done in the meantime
        return this_process()
