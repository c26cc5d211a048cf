"""The search for images of which processes die: exactly those are found."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from explain2me.errors import Explain2MeError
from explain2me.workers import Engine
from explain2me.workers.crash_search import Attempt, CrashSearch, run_despite_crashes


class Task(NamedTuple):
    title: str
    start: int
    stop: int


def simulate(tasks: Sequence[Task], deadly: set[int], *, memory: int = 1_000) -> tuple[dict[str, set[int]], int]:
    """Run the search on a machine whose workers die of some images, or of more than ``memory`` at once."""
    recorded: dict[str, set[int]] = {task.title: set() for task in tasks}
    search = CrashSearch(lambda task, image: recorded[task.title].add(image))
    queue = [Attempt.at(task) for task in tasks]
    done: Counter[Attempt] = Counter()
    tries = 0
    while queue:
        attempt = queue.pop(0)
        tries += 1
        left = set(range(attempt.start, attempt.stop)) - recorded[attempt.whole.title]
        if left & deadly or len(left) > memory:
            queue = [*search.died(attempt), *queue]
        else:
            done[attempt] += 1
            queue = [*search.done(attempt), *queue]
    assert all(done[Attempt.at(task)] == 1 for task in tasks)
    return recorded, tries


@given(st.sets(st.integers(0, 63), max_size=5))
def test_exactly_the_deadly_images_are_found(deadly: set[int]) -> None:
    tasks = [Task("a", 0, 16), Task("b", 16, 17), Task("c", 17, 64)]
    recorded, _ = simulate(tasks, deadly)
    assert set().union(*recorded.values()) == deadly


def test_one_among_256_is_found_in_few_tries() -> None:
    recorded, tries = simulate([Task("a", 0, 256)], {77})
    assert recorded == {"a": {77}}
    once, control, halvings, rest = 2, 1, 8 * 3, 1  # of two halves one dies twice and one does not
    assert tries == once + control + halvings + rest


def test_a_machine_on_which_every_worker_dies_blames_no_image() -> None:
    recorded: list[int] = []
    search = CrashSearch(lambda _, image: recorded.append(image))
    queue = [Attempt.at(Task("a", 0, 256))]
    with pytest.raises(Explain2MeError, match="dies before it reads any"):
        for _ in range(100):
            queue = [*search.died(queue.pop(0)), *queue]
    assert recorded == []


def test_a_machine_that_dies_of_too_many_images_is_at_fault_itself() -> None:
    with pytest.raises(Explain2MeError, match="die at more than 16 single images among 0 to 255"):
        simulate([Task("a", 0, 256)], set(range(0, 256, 8)))


def test_a_task_that_is_too_large_blames_no_image() -> None:
    with pytest.raises(Explain2MeError, match=r"0 to 15 killed their worker process several times.*memory"):
        simulate([Task("a", 0, 16)], set(), memory=10)


def test_any_mark_makes_its_task_a_suspect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever process has the number now of the one that was killed."""
    (tmp_path / "reading-a").write_text(str(os.getpid()))
    suspects: list[set[Attempt]] = []

    def note(*_: object, **options: Any) -> Iterator[Attempt]:
        suspects.append(options["suspects"])
        return iter(())

    monkeypatch.setattr("explain2me.workers.crash_search.run_tasks", note)
    tasks = [Task("a", 0, 2), Task("b", 2, 4)]
    run_despite_crashes(print, tasks, Engine(), marks=tmp_path, record=print, on_progress=print)
    assert suspects == [{Attempt.at(tasks[0])}]
