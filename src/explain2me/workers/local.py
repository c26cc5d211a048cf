"""A worker process of this machine that does one task at a time, so that it is known which task it died of."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

Work = Callable[[Any], None]


OnProgress = Callable[[int, float], None]


_listener: OnProgress | None = None


class WorkerDied(Exception):
    """The process of a worker ended in the middle of a task."""


def report_progress(count: int, seconds: float) -> None:
    """Called by a task: so many units more of it are done, and took so long; whoever runs it may listen."""
    if _listener is not None:
        _listener(count, seconds)


@contextlib.contextmanager
def listening(on_progress: OnProgress | None) -> Iterator[None]:
    """Hear the progress of a task that runs in this process."""
    global _listener
    before, _listener = _listener, on_progress
    try:
        yield
    finally:
        _listener = before


class LocalWorker:
    """A process, started anew after it died. Not thread-safe: one task at a time."""

    def __init__(self, index: int, threads: int) -> None:
        self._index = index
        self._threads = threads
        self._process: Any = None
        self._pipe: Connection | None = None
        self._killed = False
        self._lock = threading.Lock()

    def run(self, work: Work, task: object, on_progress: OnProgress) -> None:
        """Do one task and wait for it.

        Raises:
            WorkerDied: the process ended; the next call starts another.
            Exception: whatever the task raised.
        """
        try:
            if self._process is None or not self._process.is_alive():
                self._start(work)
            assert self._pipe is not None
            self._pipe.send((work, task))
            error = self._wait(on_progress)
        except (EOFError, ConnectionError):
            self.close()
            raise WorkerDied from None
        if error is not None:  # which may be one of these two, of a disk
            raise error

    def _wait(self, on_progress: OnProgress) -> Exception | None:
        """What the task raised, if it did; EOFError or ConnectionError where the process ended."""
        assert self._pipe is not None
        while True:
            if self._pipe not in wait([self._pipe, self._process.sentinel]) and not self._pipe.poll():
                raise EOFError
            kind, value = self._pipe.recv()
            if kind == "progress":
                on_progress(*value)
            elif kind == "error":
                return value
            else:
                return None

    def kill(self) -> None:
        """End the process at once and for good, whatever it does; may be called from another thread."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def _start(self, work: Work) -> None:
        self.close()
        context = _context(work)
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._index, self._threads))
        process.start()  # may take seconds, while the server from which it is forked imports
        theirs.close()  # ours is then told when the process ends
        with self._lock:
            self._process = process
            if self._killed:
                process.kill()

    def close(self) -> None:
        """End the process and clean up after it."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()


def _context(work: Work) -> Any:
    """How processes begin. A fork of this one would inherit torch's threads and locks.

    On Linux they are forks of a server that has imported what they need and done nothing else: importing takes seconds,
    and a worker that died is soon replaced.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(name for name in _modules_of(work) if name.startswith("explain2me."))])
    return context


def _modules_of(work: object) -> Iterator[str]:
    """Modules of a function, and of the functions that a partial is made of."""
    if isinstance(work, functools.partial):
        for part in (work.func, *work.args):
            yield from _modules_of(part)
    elif callable(work):
        yield str(getattr(work, "__module__", ""))


def _serve(pipe: Connection, index: int, threads: int) -> None:
    """What the process does: tasks from the pipe, until the pipe is closed."""
    # Ctrl-C is for the driver, which then ends its workers; SIG_IGN would be inherited by what a worker starts
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
    while True:
        try:
            work, task = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            with listening(lambda count, seconds: pipe.send(("progress", (count, seconds)))):
                work(task)
            message: tuple[str, object] = ("done", None)
        except Exception as error:
            message = ("error", _sendable(error))
        pipe.send(message)


def _sendable(error: Exception) -> Exception:
    """The exception with its trace; one that does not survive the way through a pipe is replaced."""
    trace = traceback.format_exc()
    error.add_note(trace)
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:
        return RuntimeError(trace)
    return error


def _end_with_parent() -> None:
    """A driver that is killed takes its workers with it: nobody would hear them."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
