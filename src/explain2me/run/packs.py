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
from typing import Annotated, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter

from explain2me.config.compare import digest
from explain2me.errors import RunFolderError
from explain2me.run.checks.tables import named, open_parquet, read_groups
from explain2me.run.files import FORMAT, atomic_path

PACKED = "packed-"
"""Start of the names of packs."""
PACK_BYTES = 256 * 2**20
"""Bytes of files after which a pack is closed."""
PACK_FILES = 512
"""Files in a pack at most: its list of row groups is read before any of them."""


def read_parquet(path: Path, columns: list[str] | None = None, *, schema: pa.Schema | None = None) -> pa.Table:
    """Read one file, loose or from a pack beside, and check its columns (names and types), its size and its checksums.

    Raises:
        RunFolderError: the file is missing, cannot be read, or has other columns; the message names the file.
    """
    try:
        try:
            with named(path), open_parquet(path, schema) as file:
                return read_groups(path, file, range(file.num_row_groups), columns=columns, schema=schema)
        except FileNotFoundError:
            member = packed_in(path.parent).get(path.name)
            if member is None:
                raise
            with named(member.pack):
                return _read_member(member, columns, schema)
    except FileNotFoundError:
        raise RunFolderError(f"{path} is missing; run the stage that makes it again") from None


class Member(NamedTuple):
    """A file in a pack: its row group (None if it has no rows) and its own metadata."""

    pack: Path
    row_group: int | None
    metadata: dict[str, str]


_MEMBERS = TypeAdapter(list[tuple[str, Annotated[int, Field(ge=0)] | None, dict[str, str]]])
"""The list of members in the metadata of a pack: name, row group, metadata."""


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
        with named(pack), open_parquet(pack) as file:
            rows = _MEMBERS.validate_json((file.schema_arrow.metadata or {})[b"members"], strict=True)
            if not all(re.fullmatch(rf"(?!{PACKED})[^/\0]+\.parquet", name) for name, *_ in rows):
                raise ValueError("the name of a member leads elsewhere")
            if any(group is not None and group >= file.num_row_groups for _, group, _ in rows):
                raise ValueError(f"a member has a row group beyond its {file.num_row_groups}")
        members |= {name: Member(pack, group, own) for name, group, own in rows}
    return members


def _read_member(member: Member, columns: list[str] | None, schema: pa.Schema | None) -> pa.Table:
    file = _open_pack(member.pack, member.pack.stat().st_mtime_ns, schema)
    groups = [] if member.row_group is None else [member.row_group]
    return read_groups(member.pack, file, groups, columns=columns, schema=schema).replace_schema_metadata(
        member.metadata or None
    )


@functools.lru_cache(maxsize=8)
def _open_pack(pack: Path, _: int, schema: pa.Schema | None) -> pq.ParquetFile:
    return open_parquet(pack, schema)


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


def pack_folder(folder: Path, schema: pa.Schema | None = None) -> int:
    """Put the loose Parquet files of a folder, all with the columns of ``schema``, into packs, and return how many.

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
        _write_pack(group, folder / f"{PACKED}{digest([path.name for path in group])}.parquet", schema)
        for path in group:
            path.unlink()
    return len(loose)


def _write_pack(paths: Sequence[Path], target: Path, schema: pa.Schema | None) -> None:
    members: list[tuple[str, int | None, dict[str, str]]] = []
    groups = 0
    for path in paths:
        with named(path), open_parquet(path, schema) as file:
            schema = file.schema_arrow.remove_metadata()  # maps of another size do not go into one pack
            num_rows, own = file.metadata.num_rows, file.schema_arrow.metadata or {}
            members.append((path.name, groups if num_rows else None, {k.decode(): v.decode() for k, v in own.items()}))
        groups += bool(num_rows)
    assert schema is not None
    whole = schema.with_metadata({"members": json.dumps(members)})
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, whole, **FORMAT) as writer:
        for path, (_, group, _) in zip(paths, members, strict=True):
            if group is not None:
                table = read_parquet(path, schema=schema).replace_schema_metadata(whole.metadata)
                writer.write_table(table, row_group_size=len(table))
    newest = max(path.stat().st_mtime_ns for path in paths)
    os.utime(target, ns=(newest, newest))  # no table is older than its scores for being packed
