"""Write files atomically: a file is complete, or it does not exist."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from explain2me.run.leftovers import temporary_prefix

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
