"""Temporary files of processes that were killed, and which processes are alive."""

import contextlib
import fnmatch
import functools
import os
import socket
import time
from pathlib import Path

from explain2me.config.compare import digest

TEMPORARY = ".tmp-"
"""How the names of files begin that are being written; they end in ``.tmp``, so that no pattern takes one for done."""
LEFTOVER_SECONDS = 3600
"""A temporary file not written to for so long was left by a process that was killed."""


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files that a killed process left below a folder; how many.

    Their names say which process of which machine was at it. What another machine left goes after an hour.
    """
    old = [path for path in _temporary_in(folder) if _is_leftover(path)]
    for path in old:
        path.unlink(missing_ok=True)
    return len(old)


def _temporary_in(folder: Path) -> list[Path]:
    """All below a folder; others may remove folders of it meanwhile, at which ``rglob`` would fail."""
    return [
        Path(place, name) for place, _, names in os.walk(folder) for name in fnmatch.filter(names, f"{TEMPORARY}*.tmp")
    ]


def _is_leftover(path: Path) -> bool:
    who = path.name.removeprefix(TEMPORARY).rpartition("-")[0]
    if who.partition("-")[0] == _here():
        return not is_at_work(who)
    try:
        return time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
    except FileNotFoundError:  # done in the meantime
        return False


def this_process() -> str:
    """A word that stands for this process, on all machines that may share a folder."""
    return f"{_here()}-{os.getpid()}"


def is_at_work(process: str) -> bool:
    """Whether a process of that word lives here; False where it ended or is of another machine."""
    here, _, pid = process.partition("-")
    if here != _here() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    with contextlib.suppress(OSError, IndexError):  # one that ended may wait for its parent to ask
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


@functools.cache
def _here() -> str:
    """Where a process number means something: this start of this machine, and the container."""
    parts = [socket.gethostname()]
    for place in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            path = Path(place)
            parts.append(str(path.readlink()) if path.is_symlink() else path.read_text())
    return digest(parts)
