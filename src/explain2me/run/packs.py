"""Read Parquet files, loose or in packs of many small files.

A pack, ``packed-*.parquet``, holds each of its files as one row group under its old name; DuckDB and pandas read it like
any other Parquet file. :func:`read_parquet` reads a file by its path, whether it is loose or in a pack beside.
"""

import functools
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from explain2me.config.compare import digest
from explain2me.errors import RunFolderError
from explain2me.run.files import FORMAT, atomic_path

PACKED = "packed-"
"""Start of the names of packs."""
PACK_BYTES = 256 * 2**20
"""Bytes of files after which a pack is closed."""
PACK_FILES = 512
"""Files in a pack at most: its list of row groups is read before any of them."""


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read one file, loose or from a pack beside, and check its checksums.

    Raises:
        RunFolderError: the file is missing or cannot be read; the message names the file.
    """
    where = path
    try:
        try:
            return pq.read_table(path, columns=columns, page_checksum_verification=True, partitioning=None)
        except FileNotFoundError:
            member = packed_in(path.parent).get(path.name)
            if member is None:
                raise
            where = member.pack
            return _read_member(member, columns)
    except FileNotFoundError:
        raise RunFolderError(f"{path} is missing; run the stage that makes it again") from None
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            raise  # the machine is at fault, not the file
        raise unreadable(where, error) from None


def unreadable(path: Path, why: object) -> RunFolderError:
    """The error for a file of a run that is there and is not what it should be; a reader cannot tell how that came."""
    reason = str(why).partition("\n")[0]
    return RunFolderError(
        f"{path} cannot be read ({reason}); look at its disk. A file of maps, scores or summary that is moved away is made "
        f"again by the command that makes it"
    )


class Member(NamedTuple):
    """A file in a pack: its row group (None if it has no rows) and its own metadata."""

    pack: Path
    row_group: int | None
    metadata: dict[str, str]


def committed_in(folder: Path) -> set[str]:
    """Names of the Parquet files of a folder, loose or in packs."""
    return {path.name for path in table_files(folder)}


def packed_in(folder: Path) -> dict[str, Member]:
    """The files in the packs of a folder, by name; raises RunFolderError for a damaged pack."""
    packs = tuple(sorted(folder.glob(f"{PACKED}*.parquet")))
    return _members_of(packs, tuple(pack.stat().st_mtime_ns for pack in packs)) if packs else {}


@functools.lru_cache(maxsize=64)
def _members_of(packs: tuple[Path, ...], _: tuple[int, ...]) -> dict[str, Member]:
    members: dict[str, Member] = {}
    for pack in packs:
        try:
            metadata = pq.read_schema(pack).metadata
            rows = json.loads(metadata[b"members"])
            if not all(re.fullmatch(rf"(?!{PACKED})[^/\0]+\.parquet", name) for name, *_ in rows):
                raise ValueError("the name of a member leads elsewhere")
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise unreadable(pack, error) from None
        members |= {name: Member(pack, group, own) for name, group, own in rows}
    return members


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
    """The Parquet files of a folder that together hold every row once: packs, and loose files that are in no pack."""
    packed = packed_in(folder)
    return sorted(path for path in folder.glob("*.parquet") if path.name not in packed)


def link_files(source: Path, target: Path, names: set[str]) -> None:
    """Give files of a folder a second place in another one: those with these names, and packs that hold no other file."""
    members: dict[Path, set[str]] = {}
    for name, member in packed_in(source).items():
        members.setdefault(member.pack, set()).add(name)
    packs = [pack for pack, packed in members.items() if packed <= names]
    packed = set().union(*(members[pack] for pack in packs))
    loose = [path for path in source.glob("*.parquet") if path.name in names - packed]
    for path in (path for path in packs + loose if not (target / path.name).exists()):
        try:
            (target / path.name).hardlink_to(path)
        except OSError:  # a file system without links
            shutil.copy2(path, target)


def pack_folder(folder: Path) -> int:
    """Put the loose Parquet files of a folder into packs, and return how many.

    A pack is committed before its files are deleted, and readers ignore a loose file that is in a pack: a kill in between
    loses and doubles nothing.
    """
    known = packed_in(folder)
    for name in known:  # an earlier call was stopped before it deleted these
        (folder / name).unlink(missing_ok=True)
    loose = [path for path in table_files(folder) if path.name not in known]
    if len(loose) < 2:
        return 0
    groups: list[list[Path]] = []
    size = 0
    for path in loose:
        if not groups or size > PACK_BYTES or len(groups[-1]) == PACK_FILES:
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
