"""Write files and folders atomically: complete, or not there. One process at a time writes tables into a run."""

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from explain2me.errors import BusyError
from explain2me.run.leftovers import temporary_prefix

LOCK = ".lock"
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's renameat2."""
FORMAT: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "write_page_checksum": True}


def write_parquet(table: pa.Table, path: Path, *, replace: bool = True) -> None:
    """Commit a table by one rename; the same table gives the same bytes. Without ``replace`` an existing file stays."""
    with atomic_path(path, replace=replace) as temporary:
        pq.write_table(table, temporary, **FORMAT)


def write_json(value: Any, path: Path, *, replace: bool = True) -> bool:
    """Commit a JSON file by one rename, and return whether it was written: without ``replace`` an existing file stays."""
    with atomic_path(path, replace=replace) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        ours = temporary.stat().st_ino
    return replace or path.stat().st_ino == ours


def sha256_of(path: Path) -> str:
    """Hash of the bytes of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary name beside ``path``; synced and renamed to it at the end, removed after an error.

    Without ``replace`` an existing file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=temporary_prefix(), suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o644)
        yield temporary
        _sync(temporary)
        if replace or not _link_if_new(temporary, path):
            temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """An empty folder with a temporary name, put in the place of ``target`` at the end; removed after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(), suffix=".tmp", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        put_in_place(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a folder to ``target`` and delete what was there: a reader finds all old files or all new ones.

    A ``target`` that is a link is replaced, not followed.
    """
    _sync(folder)
    if target.is_symlink():
        target.unlink()
    if not target.exists():
        folder.rename(target)
    else:
        _exchange(folder, target)
        shutil.rmtree(folder, ignore_errors=True)  # a reader may hold a file of it
    _sync(target.parent)


def _exchange(a: Path, b: Path) -> None:
    """Swap the names of two folders in one step; in three where the system or the file system cannot."""
    with contextlib.suppress(AttributeError):
        swap = ctypes.CDLL(None).renameat2
        if swap(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
            return
    before = Path(tempfile.mkdtemp(prefix=temporary_prefix(), suffix=".tmp", dir=b.parent))
    b.rename(before)  # an empty folder may be replaced
    a.rename(b)
    before.rename(a)


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder; the system releases it when the process ends.

    Raises:
        BusyError: another process holds it.
    """
    try:
        lock = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"another process is writing into {str(folder)!r}; wait for it or stop it, then call the same command again"
        ) from None
    with lock:
        yield


def encoded(table: pa.Table) -> bytes:
    """The bytes that :func:`write_parquet` writes for a table; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **FORMAT)
    return sink.getvalue().to_pybytes()


def _link_if_new(temporary: Path, path: Path) -> bool:
    """Give a file a second name, which only one machine can do, also on a network drive; whether that name exists now."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        return path.exists()
    return True


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
