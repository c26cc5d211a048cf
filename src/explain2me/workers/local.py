"""A worker process of this machine. It does one task at a time, so a death belongs to one task."""

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

KILLS = [-getattr(signal, name) for name in ("SIGKILL", "SIGBUS") if hasattr(signal, name)]
"""Exit codes of a process that the memory killer ended, or that a disk failed under a file mapped into memory."""
_listener: OnProgress | None = None


class WorkerDied(Exception):
    """A worker process ended in the middle of a task; ``was_killed``: by the machine, with one of :data:`KILLS`."""

    def __init__(self, *, was_killed: bool = False) -> None:
        super().__init__()
        self.was_killed = was_killed


def report_progress(count: int, seconds: float) -> None:
    """Called by a task that has done ``count`` more units, which took ``seconds``; see :func:`listening`."""
    if _listener is not None:
        _listener(count, seconds)


@contextlib.contextmanager
def listening(on_progress: OnProgress) -> Iterator[None]:
    """Call ``on_progress`` when a task in this process reports progress, inside the block."""
    global _listener
    before, _listener = _listener, on_progress
    try:
        yield
    finally:
        _listener = before


class LocalWorker:
    """A process, started again after it died. Not thread-safe: one task at a time."""

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
            Exception: of the task.
        """
        try:
            if self._process is None or not self._process.is_alive():
                self._start(work)
            assert self._pipe is not None
            self._pipe.send((work, task))
            error = self._wait(on_progress)
        except (EOFError, ConnectionError):
            was_killed = self._process is not None and self._was_killed()
            self.close()
            raise WorkerDied(was_killed=was_killed) from None
        if error is not None:  # it may be one of these two as well, from a disk
            raise error

    def _wait(self, on_progress: OnProgress) -> Exception | None:
        """What the task raised, or None; raises EOFError or ConnectionError if the process ended."""
        assert self._pipe is not None
        while True:
            if self._pipe not in wait([self._pipe, self._process.sentinel]) and not self._pipe.poll():
                raise EOFError
            message = self._pipe.recv()
            if not isinstance(message, tuple):
                return message
            on_progress(*message)

    def _was_killed(self) -> bool:
        self._process.join(1)  # then it has an exit code
        return self._process.exitcode in KILLS

    def kill(self) -> None:
        """End the process at once, and start no other; may be called from another thread."""
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
        theirs.close()  # then ours sees the process end
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
    """How to start processes. A fork of this process would inherit torch's threads and locks.

    On Linux a server imports what the workers need, which takes seconds, and does nothing else; each worker is a fork
    of it, so a dead worker is replaced at once.
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
    """Main function of the process: do tasks from the pipe until it is closed."""
    # Ctrl-C is for the driver, which ends its workers; processes that a worker starts would inherit SIG_IGN
    signal.signal(signal.SIGINT, lambda *_: None)
    while True:
        try:
            work, task = pipe.recv()
        except (EOFError, ConnectionError):
            return
        try:
            _prepare(index, threads)
            with listening(lambda *progress: pipe.send(progress)):
                work(task)
            pipe.send(None)
        except Exception as error:
            pipe.send(_sendable(error))


@functools.cache
def _prepare(index: int, threads: int) -> None:
    """Set up the process before its first task, where the driver is told if it fails."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())


def _sendable(error: Exception) -> Exception:
    """The exception with its traceback; a RuntimeError with the traceback if it cannot be pickled."""
    trace = traceback.format_exc()
    error.add_note(trace)
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:
        return RuntimeError(trace)
    return error


def _end_with_parent() -> None:
    """End this process when its driver ends, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
