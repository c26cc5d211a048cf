"""Files that are whole or not there: atomic writes, checked reads, and packs of many small Parquet files in one.

A pack holds each of its files as one row group, under its old name: ``packed-*.parquet``, which DuckDB and pandas read
like any other. Whoever asks for a file by its path gets it, whether it lies there or in a pack beside.
"""

import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from explain2me.config import digest
from explain2me.errors import RunFolderError

PACKED = "packed-"
"""How the names of packs begin."""

PACK_BYTES = 256 * 2**20
"""A pack is closed when its files had so many bytes."""

PACK_FILES = 512
"""Or so many: the list of its row groups is read before any of them."""

TEMPORARY = ".tmp-"
"""How the names of files begin that are being written; they end in ``.tmp``, so that no pattern takes one for done."""

LEFTOVER_SECONDS = 3600
"""A temporary file not written to for so long was left by a process that was killed."""

FORMAT: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "write_page_checksum": True}


def write_parquet(table: pa.Table, path: Path, *, replace: bool = True) -> None:
    """Commit a table by one rename; the same table gives the same bytes. Without ``replace`` a file that is there stays."""
    with atomic_path(path, replace=replace) as temporary:
        pq.write_table(table, temporary, **FORMAT)


def write_json(value: Any, path: Path, *, replace: bool = True) -> bool:
    """Commit a JSON file by one rename; without ``replace`` only if there is none, and say whether that was so."""
    with atomic_path(path, replace=replace) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        ours = temporary.stat().st_ino
    return replace or path.stat().st_ino == ours


def sha256_of(path: Path) -> str:
    """Of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_path(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary name beside ``path``; synced and renamed to it at the end, removed after an error.

    Without ``replace`` a file that is there already stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f"{TEMPORARY}{this_process()}-", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        temporary.chmod(0o644)
        yield temporary
        _sync(temporary)
        if replace:
            temporary.replace(path)
        else:
            _rename_if_new(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read one file, or what a pack beside holds of that name, with its checksums checked.

    Raises:
        RunFolderError: it is missing or damaged; the message names the file.
    """
    member = None if path.exists() else packed_in(path.parent).get(path.name)
    try:
        if member is not None:
            return _read_member(member, columns)
        return pq.read_table(path, columns=columns, page_checksum_verification=True, partitioning=None)
    except FileNotFoundError:
        raise RunFolderError(f"{path} is missing; run the stage that makes it again") from None
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            raise  # the machine is at fault, not the file
        raise RunFolderError(
            f"{path if member is None else member.pack} is damaged ({str(error).splitlines()[0]}); delete it and call the "
            f"same command again"
        ) from None


class Member(NamedTuple):
    """A file that lies in a pack: its row group (None: it has no rows) and its own metadata."""

    pack: Path
    row_group: int | None
    metadata: dict[str, str]


def committed_in(folder: Path) -> set[str]:
    """Names of the Parquet files of a folder, loose or in packs; one look at the folder for all of them."""
    return {path.name for path in table_files(folder)}


def packed_in(folder: Path) -> dict[str, Member]:
    """The files in the packs of a folder, by name.

    Raises:
        RunFolderError: a pack is damaged.
    """
    packs = tuple(sorted(folder.glob(f"{PACKED}*.parquet")))
    return _members_of(packs, tuple(pack.stat().st_mtime_ns for pack in packs)) if packs else {}


@functools.lru_cache(maxsize=64)
def _members_of(packs: tuple[Path, ...], _: tuple[int, ...]) -> dict[str, Member]:
    found: dict[str, Member] = {}
    for pack in packs:
        try:
            metadata = pq.read_schema(pack).metadata
            rows = json.loads(metadata[b"members"])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"{pack} is damaged ({error}); delete it and call the same command again") from None
        found |= {name: Member(pack, group, own) for name, group, own in rows}
    return found


def _read_member(member: Member, columns: list[str] | None) -> pa.Table:
    file = _open_pack(member.pack, member.pack.stat().st_mtime_ns)
    if member.row_group is None:
        schema = file.schema_arrow
        table = (pa.schema([schema.field(name) for name in columns]) if columns else schema).empty_table()
    else:
        table = file.read_row_group(member.row_group, columns=columns)
    return table.replace_schema_metadata(member.metadata or None)


@functools.lru_cache(maxsize=8)
def _open_pack(pack: Path, _: int) -> pq.ParquetFile:
    return pq.ParquetFile(pack, page_checksum_verification=True)


def table_files(folder: Path, pattern: str = "*.parquet") -> list[Path]:
    """Every Parquet file of a folder by its name, loose or in a pack, each once, sorted."""
    loose = {path for path in folder.glob(pattern) if not path.name.startswith(PACKED)}
    return sorted(loose | {folder / name for name in packed_in(folder) if Path(name).match(pattern)})


def files_on_disk(folder: Path) -> list[Path]:
    """The Parquet files of a folder that hold every row once: packs, and loose files that are in none."""
    packed = packed_in(folder)
    return sorted(path for path in folder.glob("*.parquet") if path.name not in packed)


def pack_folder(folder: Path) -> int:
    """Put the loose Parquet files of a folder into packs; how many went in.

    A pack is committed before its files are deleted, and a file that is in a pack does not count, so that a kill in
    between loses and doubles nothing.
    """
    loose = [path for path in table_files(folder) if path.exists()]
    known = packed_in(folder)
    for path in loose:
        if path.name in known:  # an earlier call was stopped before it was deleted
            path.unlink()
    loose = [path for path in loose if path.name not in known]
    if len(loose) < 2:
        return 0
    groups: list[list[Path]] = [[]]
    size = 0
    for path in loose:
        if size > PACK_BYTES or len(groups[-1]) == PACK_FILES:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += path.stat().st_size
    for group in groups:
        _write_pack(group, folder / f"{PACKED}{digest([path.name for path in group])}.parquet")
        for path in group:
            path.unlink()
    return len(loose)


def _write_pack(paths: Sequence[Path], target: Path) -> None:
    schema = pq.read_schema(paths[0]).remove_metadata()
    members: list[tuple[str, int | None, dict[str, str]]] = []
    groups = 0
    for path in paths:
        file = pq.read_metadata(path)
        own = pq.read_schema(path).metadata or {}
        members.append((path.name, groups if file.num_rows else None, {k.decode(): v.decode() for k, v in own.items()}))
        groups += bool(file.num_rows)
    whole = schema.with_metadata({"members": json.dumps(members)})
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, whole, **FORMAT) as writer:
        for path, (_, group, _) in zip(paths, members, strict=True):
            if group is not None:
                table = read_parquet(path).replace_schema_metadata(whole.metadata)
                writer.write_table(table, row_group_size=len(table))
    newest = max(path.stat().st_mtime_ns for path in paths)
    os.utime(target, ns=(newest, newest))  # no table is older than its scores for being packed


def encoded(table: pa.Table) -> bytes:
    """The bytes that :func:`write_parquet` writes for a table; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **FORMAT)
    return sink.getvalue().to_pybytes()


def _rename_if_new(temporary: Path, path: Path) -> None:
    """A link is made by one machine only, also on a network drive."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        if not path.exists():
            temporary.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
