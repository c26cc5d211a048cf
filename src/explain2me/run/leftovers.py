"""Temporary files, and which of them a killed process left behind.

A process that writes files holds a lock while it lives. The lock lies in the temporary folder of its machine, where
locks work whatever the disk of the run is, and the names of the process's temporary files hold the name of the lock.
The operating system releases the lock when the process ends, however it ends. Who first sees it free renames it to
``.ended``, which stays for an hour: so long it tells which temporary files, in whatever folder, are leftovers.
"""

import atexit
import contextlib
import fnmatch
import functools
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

TEMPORARY = ".tmp-"
"""Start of the names of files that are being written; they end in ``.tmp``, so that no pattern takes one for finished."""
LEFTOVER_SECONDS = 3600
"""Age of a temporary file that is removed although its lock is not on this machine; and of a file ``.ended``."""


def remove_leftovers(folder: Path) -> int:
    """Delete the temporary files and folders that killed processes left below a folder, and return how many.

    One of another machine, whose lock cannot be seen here, goes when nobody has written to it for an hour.
    """
    leftovers = [path for path in _temporary_in(folder) if _is_leftover(path)]
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    for lock in _our_files("explain2me-*.lock"):
        _has_ended(lock)
    for ended in _our_files("explain2me-*.ended"):
        if _is_old(ended):
            ended.unlink(missing_ok=True)
    return len(leftovers)


def temporary_prefix() -> str:
    """Start of the names of the temporary files of this process."""
    return f"{TEMPORARY}{_own_lock(os.getpid())}-"


def _temporary_in(folder: Path) -> list[Path]:
    """All temporary files and folders below a folder. ``rglob`` would fail when another process removes one meanwhile."""
    return [
        Path(place, name)
        for place, folders, files in os.walk(folder)
        for name in fnmatch.filter([*folders, *files], f"{TEMPORARY}*.tmp")
    ]


def _is_leftover(path: Path) -> bool:
    lock = _lock_file(path.name.removeprefix(TEMPORARY).partition("-")[0])
    if lock.exists():
        return _has_ended(lock)
    return lock.with_suffix(".ended").exists() or _is_old(path)


def _has_ended(lock: Path) -> bool:
    """Whether the process of a lock has ended; False for a process of another user, whose lock cannot be tried."""
    ended = lock.with_suffix(".ended")
    try:
        with FileLock(lock, timeout=0):
            lock.rename(ended)
            ended.touch()
    except (Timeout, OSError):
        return ended.exists()  # another process has seen it first
    return True


def _our_files(pattern: str) -> Iterator[Path]:
    """Files of this user in the temporary folder, where anybody may put files and links."""
    for path in Path(tempfile.gettempdir()).glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            if not path.is_symlink() and path.stat().st_uid == os.getuid():
                yield path


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
    except FileNotFoundError:  # finished meanwhile
        return False


@functools.cache
def _own_lock(pid: int) -> str:
    """Name of the lock that this process holds until it ends; a fork takes one of its own."""
    name = uuid.uuid4().hex
    lock = FileLock(_lock_file(name), thread_local=False)
    lock.acquire()
    if not _lock_file(name).exists():  # another process saw it free before it was ours
        return _own_lock.__wrapped__(pid)

    def release() -> None:
        if os.getpid() == pid:
            lock.release()
            _lock_file(name).unlink(missing_ok=True)

    atexit.register(release)
    return name


def _lock_file(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"explain2me-{name}.lock"
