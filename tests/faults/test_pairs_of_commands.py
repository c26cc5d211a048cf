"""Two commands on one run folder at the same moment: each succeeds, or says one line; no state is mixed."""

import itertools
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_killed_stages import files, with_one_image, with_pearson

from explain2me.errors import Explain2MeError
from explain2me.report.summary import Tables
from explain2me.run.folder import Run, open_run
from explain2me.run.packs import committed_in
from explain2me.stages.compact import compact_run
from explain2me.stages.summarise import summarise_run
from explain2me.statistics.scores import MEASURES

FORK = multiprocessing.get_context("fork")


def show(run: Run) -> None:
    tables = Tables(run)
    of_runs = set(tables.matrix(MEASURES["stability"]).similarity)
    assert set(tables.measures.similarity.dropna()) == of_runs
    for table in (tables.performance, tables.precision, tables.quarantine):
        assert table is not None


COMMANDS: dict[str, Callable[[Run], object]] = {
    "measure": with_pearson,
    "summarise": lambda run: summarise_run(run, run.config),
    "compact": compact_run,
    "show": show,
    "report": with_one_image,
}


def attempt(name: str, folder: Path, ready: Any, errors: Any) -> None:
    run = open_run(folder)
    ready.wait()
    try:
        COMMANDS[name](run)
    except Explain2MeError as error:
        errors.put(str(error))
    except BaseException as error:
        errors.put(f"traceback: {error!r}")
        raise


def together(names: tuple[str, str], folder: Path) -> list[str]:
    """Run two commands at the same moment; gives the lines of those that did not succeed."""
    ready, errors = FORK.Barrier(2), FORK.SimpleQueue()
    processes = [FORK.Process(target=attempt, args=(name, folder, ready, errors)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode is not None
    lines = []
    while not errors.empty():
        lines.append(errors.get())
    return lines


PAIRS = list(itertools.combinations_with_replacement(COMMANDS, 2))
QUICK = [("measure", "summarise"), ("compact", "measure")]


@pytest.mark.usefixtures("no_pdf")
@pytest.mark.parametrize(
    ("names", "times"),
    [*((names, 1) for names in QUICK), *(pytest.param(names, 10, marks=pytest.mark.slow) for names in PAIRS)],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else str(value),
)
def test_two_commands_at_once(finished_run: Run, tmp_path: Path, names: tuple[str, str], times: int) -> None:
    states: dict[frozenset[str], dict[str, bytes]] = {}
    quiet = open_run(shutil.copytree(finished_run.folder, tmp_path / "quiet"))
    for prepare in (lambda run: None, with_pearson):
        prepare(quiet)
        summarise_run(quiet, quiet.config)
        states[frozenset(committed_in(quiet.folder / "scores"))] = files(quiet.folder / "summary")
    assert len(states) == 2
    for number in range(times):
        folder = shutil.copytree(finished_run.folder, tmp_path / str(number))
        for line in together(names, folder):
            assert "another process" in line or "made from other scores" in line or "is missing" in line, line
        assert frozenset(committed_in(folder / "scores")) in states
        assert files(folder / "summary") in states.values()
        run = open_run(folder)
        summarise_run(run, run.config)
        assert files(folder / "summary") == states[frozenset(committed_in(folder / "scores"))]
