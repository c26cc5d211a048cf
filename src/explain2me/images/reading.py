"""Read the bytes of an image file, from disk or from a container, and check their hash."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from explain2me.errors import ImageError, MachineError
from explain2me.images.containers import NOT_THERE, container_of, read_member

MAX_BYTES = 512 * 2**20
LATER = "Nothing is quarantined: mend it and call the same command again, or leave such images out of a new run"


def check_hash(path: Path, expected_sha256: str) -> None:
    """Raise ImageError if a file has other bytes (``hash_mismatch``), or bytes that cannot be read; decodes nothing."""
    with with_file_name(path):
        check_sha256(read_bytes(path), expected_sha256)


def read_file(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a regular file or a member of a container; follows links, and never waits for a pipe or a device.

    Raises:
        ImageError: missing, dangling_link, not_regular, unreadable (a container), empty or too_many_bytes.
        MachineError: lost (the folder is missing or empty), permission or unreadable.
    """
    with with_file_name(path):
        return read_bytes(path, max_bytes=max_bytes)


@contextmanager
def with_file_name(path: Path) -> Iterator[None]:
    """Put the name of the image in front of an error about it; a missing folder is the fault of the machine."""
    try:
        yield
    except MachineError as error:
        raise MachineError(error.kind, f"{str(path)!r}: {error.message}. {LATER}") from error
    except ImageError as error:
        folder = _lost_folder(path) if error.kind in ("missing", "dangling_link") else None
        if folder:
            why = f"{str(folder)!r} is missing or empty; is its disk there? {LATER}"
            raise MachineError("lost", why) from error
        raise ImageError(error.kind, f"{path.name!r}: {error.message}") from error


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """As :func:`read_file`, with errors that do not name the file."""
    try:
        data = _read(path, max_bytes)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not data:
        raise ImageError("empty", "the file is empty (0 bytes)")
    return data


def _read(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file, or of a member where ``path`` leads on into a container file."""
    try:
        return _read_regular(path, max_bytes)
    except OSError as error:
        container = container_of(path) if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG) else None
        if container is None:
            raise
    member = read_member(*container, max_bytes=max_bytes)
    return _read_regular(member, max_bytes) if isinstance(member, Path) else member


def _read_regular(path: Path, max_bytes: int) -> bytes:
    _check_regular(path.stat().st_mode)
    # a pipe put there since must not block either: hence O_NONBLOCK and the second look
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_regular(status.st_mode)
        if status.st_size > max_bytes:
            raise ImageError("too_many_bytes", f"{status.st_size} bytes are more than the allowed {max_bytes}")
        return file.read(status.st_size)


def check_sha256(data: bytes, expected: str | None) -> str:
    """The sha256 of some bytes; raises ImageError if another one was expected."""
    sha256 = hashlib.sha256(data).hexdigest()
    if expected is not None and sha256 != expected:
        why = f"expected the sha256 {expected[:12]}..., got {sha256[:12]}..."
        raise ImageError("hash_mismatch", why)
    return sha256


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise ImageError("not_regular", f"expected a file, got a {kinds.get(stat.S_IFMT(mode), 'device')}")


def _unreadable(path: Path, error: OSError | ValueError) -> ImageError:
    """What is wrong with a file. Whatever does not come from its name or bytes is the fault of the machine."""
    code = error.errno if isinstance(error, OSError) else errno.ENOENT  # ValueError: a name that no file can have
    if code == errno.ELOOP or (code in (errno.ENOENT, errno.ENOTDIR) and path.is_symlink()):
        return ImageError("dangling_link", "a link to a file that does not exist")
    if code in NOT_THERE:
        return ImageError("missing", "no such file")
    if code in (errno.EACCES, errno.EPERM):
        return MachineError("permission", "the file may not be read; change its permissions")
    is_of_bytes = code in (None, errno.EINVAL, errno.EOVERFLOW)  # a container with places that no file has
    make = ImageError if is_of_bytes else MachineError
    return make("unreadable", f"the file cannot be read ({os.strerror(code or errno.EIO)})")


def _lost_folder(path: Path) -> Path | None:
    """The folder or container of a file if it is missing, or empty as one where a disk is not mounted; links are followed."""
    try:
        folder = Path(os.path.realpath(path)).parent
        with os.scandir(folder) as entries:
            return None if next(entries, None) else folder
    except ValueError:
        return None
    except OSError as error:
        if error.errno not in (*NOT_THERE, errno.EACCES):
            raise
        return folder if error.errno == errno.ENOENT else None
