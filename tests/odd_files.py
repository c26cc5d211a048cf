"""Files that are no images, and a disk that takes no more, for the tests of what becomes of them."""

import contextlib
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from explain2me.images.reading import MAX_BYTES


def make_socket(path: Path) -> None:
    """A socket that nobody listens to any more."""
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have about 100 characters only
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def make_too_large(path: Path) -> None:
    """A file of more bytes than are read; sparse, so that it takes no disk."""
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)


def writes(data: Callable[[], bytes]) -> Callable[[Path], object]:
    """What writes these bytes to a path."""
    return lambda path: path.write_bytes(data())


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow over ``size`` bytes, as on a disk that is full; workers inherit it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
