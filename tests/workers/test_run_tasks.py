"""Tasks in worker processes: each is done, whatever dies."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from explain2me.errors import ConfigError, Explain2MeError
from explain2me.workers import Engine, local, run_tasks
from explain2me.workers.ray import open_workers

WORK = """
import os, pathlib, signal, time
from explain2me.errors import ConfigError
from explain2me.workers import report_progress

def write(task):
    pathlib.Path(task).write_text(str(os.getpid()))
    report_progress(3, 0.5)

def die_once(task):
    path = pathlib.Path(task)
    with path.open("a") as file:
        file.write("tried ")
    if path.name == "deadly" and path.read_text() == "tried ":
        os.kill(os.getpid(), signal.SIGKILL)

def die(task):
    with open(task, "a") as file:
        file.write("tried ")
    os.kill(os.getpid(), signal.SIGKILL)

def fail(task):
    raise ConfigError(f"wrong: {pathlib.Path(task).name}")

def bug(task):
    return {}["no such key"]

class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(a)

def odd(task):
    raise Odd(1, 2)

def end_of_file(task):
    raise EOFError("of a file")

def aborted(task):
    raise ConnectionAbortedError("of a network disk")

def sleep(task):
    pathlib.Path(task).write_text(str(os.getpid()))
    time.sleep(600)
"""
ENGINES = {
    "one": Engine(),
    "two": Engine(workers=2),
    "ray": Engine("ray", workers=2),
}


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that worker processes can import, as they cannot import a test."""
    (tmp_path / "worker_functions.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    import worker_functions

    return worker_functions


@pytest.fixture(params=["one", "two", pytest.param("ray", marks=pytest.mark.slow)])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "ray":
        pytest.importorskip("ray", reason="the extra ray is not installed")
        yield ENGINES["ray"]
        import ray

        ray.shutdown()
    else:
        yield ENGINES[request.param]


@pytest.mark.parametrize(("name", "error"), [("end_of_file", EOFError), ("aborted", ConnectionAbortedError)])
@pytest.mark.parametrize("engine", ["one", "two"], indirect=True)
def test_an_exception_of_a_task_is_not_the_death_of_its_worker(
    work: ModuleType, engine: Engine, name: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match="of a"):
        list(run_tasks(getattr(work, name), ["a", "b"], engine))


@pytest.mark.parametrize(
    ("workers", "gpus", "there", "message"),
    [
        (4, 0.0, {"CPU": 4.0}, None),
        (4, 0.5, {"CPU": 4.0, "GPU": 2.0}, None),
        (3, 1 / 3, {"CPU": 4.0, "GPU": 1.0}, None),
        (
            16,
            1.0,
            {"CPU": 64.0, "GPU": 1.0},
            "workers = 16 need 16 GPUs of the Ray cluster, which has 1; use at most 1 wor",
        ),
        (2, 0.5, {"CPU": 4.0}, "which has 0; .* or a smaller compute.gpus_per_worker"),
        (5, 0.0, {"CPU": 4.0}, "workers = 5 need 5 CPUs .* at most 4 workers"),
    ],
)
def test_more_workers_than_a_ray_cluster_has_room_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, workers: int, gpus: float, there: dict[str, float], message: str | None
) -> None:
    class Ray:
        """A cluster of this size."""

        is_initialized = staticmethod(lambda: True)
        cluster_resources = staticmethod(lambda: there)

    monkeypatch.setitem(sys.modules, "ray", Ray)
    engine = Engine("ray", workers=workers, gpus=gpus)
    if message is None:
        assert len(open_workers(engine)) == workers
    else:
        with pytest.raises(ConfigError, match=message):
            open_workers(engine)


def paths_in(folder: Path, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_task_is_done_and_reports_its_progress(tmp_path: Path, work: ModuleType, engine: Engine) -> None:
    tasks = paths_in(tmp_path, *"abcde")
    begun, told = [], []
    done = run_tasks(work.write, tasks, engine, on_start=begun.append, on_progress=lambda *heard: told.append(heard))
    assert sorted(done) == sorted(begun) == tasks
    assert sorted(told) == [(task, 3, 0.5) for task in tasks]
    pids = {int(Path(task).read_text()) for task in tasks}
    assert (pids == {os.getpid()}) == (engine == Engine())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("engine", ["two", pytest.param("ray", marks=pytest.mark.slow)], indirect=True)
def test_a_worker_that_dies_once_loses_nothing(tmp_path: Path, work: ModuleType, engine: Engine) -> None:
    tasks = paths_in(tmp_path, "a", "deadly", "b", "c")
    assert sorted(run_tasks(work.die_once, tasks, engine)) == sorted(tasks)
    assert Path(tasks[1]).read_text() == "tried tried "
    assert {Path(task).read_text() for task in tasks if "deadly" not in task} == {"tried "}


def test_a_task_of_which_workers_always_die_ends_in_one_clear_error(tmp_path: Path, work: ModuleType) -> None:
    tasks = paths_in(tmp_path, "a", "b")
    with pytest.raises(Explain2MeError, match="a worker process died 3 times at the same task"):
        list(run_tasks(work.die, tasks, Engine(workers=2)))
    assert max(len(Path(task).read_text().split()) for task in tasks) == 3


def test_a_suspect_gets_a_process_of_its_own(tmp_path: Path, work: ModuleType) -> None:
    tasks = paths_in(tmp_path, *"abc")
    assert list(run_tasks(work.write, tasks, Engine(), suspects={tasks[1]})) == [tasks[0], tasks[2], tasks[1]]
    own = {Path(task).name for task in tasks if Path(task).read_text() == str(os.getpid())}
    assert own == {"a", "c"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exception_of_a_task_reaches_the_caller(tmp_path: Path, work: ModuleType, engine: Engine) -> None:
    with pytest.raises(ConfigError, match=r"wrong: [ab]"):
        list(run_tasks(work.fail, paths_in(tmp_path, "a", "b"), engine))


def test_the_trace_of_a_bug_names_the_line_in_the_worker(tmp_path: Path, work: ModuleType) -> None:
    with pytest.raises(KeyError, match="no such key") as caught:
        list(run_tasks(work.bug, paths_in(tmp_path, "a", "b"), Engine(workers=2)))
    assert 'return {}["no such key"]' in "".join(caught.value.__notes__)


def test_an_exception_that_cannot_be_sent_is_still_reported(tmp_path: Path, work: ModuleType) -> None:
    with pytest.raises(Exception, match=r"worker_functions.Odd: 1"):
        list(run_tasks(work.odd, paths_in(tmp_path, "a", "b"), Engine(workers=2)))


def test_closing_ends_the_workers(tmp_path: Path, work: ModuleType) -> None:
    tasks = paths_in(tmp_path, *"ab")
    tasks_iterator = run_tasks(work.die_once, [*tasks, str(tmp_path / "deadly")], Engine(workers=2))
    next(tasks_iterator)
    started = time.monotonic()
    tasks_iterator.close()
    assert time.monotonic() - started < 20
    assert multiprocessing.active_children() == []


DRIVER = """
import sys
from explain2me.workers import Engine, local, run_tasks
import worker_functions
if __name__ == "__main__":
    list(run_tasks(worker_functions.sleep, sys.argv[1:], Engine(workers=2)))
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_driver(tmp_path: Path, work: ModuleType, end: signal.Signals) -> None:
    (tmp_path / "driver.py").write_text(DRIVER)
    tasks = paths_in(tmp_path, "a", "b")
    driver = subprocess.Popen([sys.executable, tmp_path / "driver.py", *tasks], stderr=subprocess.DEVNULL)
    pids = [wait_for_pid(Path(task)) for task in tasks]
    driver.send_signal(end)
    driver.wait(20)
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_alive(pid) for pid in pids)


def wait_for_pid(path: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path.name} was never begun")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_can_be_ended_while_it_starts(tmp_path: Path, work: ModuleType) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from explain2me.workers.local import LocalWorker, WorkerDied

    for delay in (0.0, 0.01, 0.1, 0.5):
        worker = LocalWorker(0, 1)
        with ThreadPoolExecutor(1) as threads:
            future = threads.submit(worker.run, work.sleep, str(tmp_path / "a"), lambda *_: None)
            time.sleep(delay)
            worker.kill()
            with pytest.raises(WorkerDied):
                future.result(60)
        worker.close()
    assert multiprocessing.active_children() == []


def test_a_worker_that_may_start_no_thread_says_so(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("can't start new thread")

    driver, worker = multiprocessing.Pipe()
    driver.send((print, "a task"))
    monkeypatch.setattr(local.threading, "Thread", fail)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    answers = []

    class Pipe:
        """The worker's end, closed after the first answer."""

        recv = worker.recv

        def send(self, answer):
            answers.append(answer)
            driver.close()

    try:
        local._serve(Pipe(), 0, 1)
    finally:
        signal.signal(signal.SIGINT, before)
    (error,) = answers
    assert isinstance(error, RuntimeError)
    assert str(error) == "can't start new thread"
