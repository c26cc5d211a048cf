"""Images inside container files: members of a tar, rows of a Parquet or Arrow file. Nothing is unpacked to the disk.

The path of such an image goes on behind that of its container: ``shards/a.tar/real/001.jpg``, or a row, counted from
0, as ``train.parquet/00000017``. :func:`container_of` takes such a path apart, :func:`read_member` reads the image.

What comes from outside is refused rather than guessed at: a tar that holds links, devices, sparse files, names that
are absolute or climb with ``..``, or the same name twice cannot be used at all, and neither can one that is compressed
or cut off. Names are only looked up, never opened. Arrow files are memory-mapped and checked before they are read.
"""

import bisect
import functools
import json
import os
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from explain2me.errors import ImageError

KINDS = (".tar", ".parquet", ".arrow")
"""What the name of a container ends in."""
MAX_NAME = 4096
MAX_HEADER = 2**20
"""Bytes of a member's name, and of a header that says more about a member (pax)."""
MAX_TEXT = 16 * 2**10
"""Bytes of the label, source, split and the like of a row, on average over the rows."""
MAX_ROW_GROUP = 4 * 2**30
"""Bytes of a Parquet row group's images, which are in memory together."""
Value = TypeVar("Value")


class Span(NamedTuple):
    """Where the bytes of a member stand in its tar."""

    offset: int
    size: int


def container_of(path: Path) -> tuple[Path, str] | None:
    """The container file that ``path`` leads into, and the way on in it; None where it leads into none.

    >>> container_of(Path("no/such.tar/real/001.jpg"))
    """
    for folder in path.parents:
        try:
            mode = folder.stat().st_mode
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(mode) and folder.suffix.lower() in KINDS:
            return folder, path.relative_to(folder).as_posix()
        return None
    return None


def read_member(container: Path, inner: str, *, max_bytes: int) -> bytes | Path:
    """The bytes of an image in a container, or the file that holds them: a row may give a path and no bytes.

    Args:
        container: a tar, Parquet or Arrow file.
        inner: name of the member, or number of the row.
        max_bytes: larger images are not read.

    Raises:
        ImageError: missing, too_many_bytes, not_regular, or unreadable: the container cannot be used.
        OSError: the container cannot be opened or read.
    """
    if container.suffix.lower() == ".tar":
        return _read_tar_member(open_tar(container), inner, max_bytes=max_bytes)
    return _read_row(_rows_of(container), container, inner, max_bytes=max_bytes)


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever pyarrow raises on hostile bytes becomes an ImageError; errors of the disk stay what they are."""
    try:
        yield
    except ImageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        why = " ".join(str(error).split())[:200].encode("unicode_escape").decode()
        raise ImageError("unreadable", f"{what} is damaged or of another format ({why}); make it again") from error


class _Recent(Generic[Value]):
    """The values used last, up to a total cost. One thread makes a value while the others wait for it."""

    def __init__(self, max_cost: int) -> None:
        self._max_cost = max_cost
        self._lock = threading.Lock()
        self._values: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._cost = 0

    def get(self, key: Hashable, make: Callable[[], Value], *, cost: Callable[[Value], int] = lambda _: 1) -> Value:
        with self._lock:
            if key not in self._values:
                value = make()
                self._values[key] = value, cost(value)
                self._cost += cost(value)
            self._values.move_to_end(key)
            while self._cost > self._max_cost and len(self._values) > 1:
                self._cost -= self._values.popitem(last=False)[1][1]
            return self._values[key][0]


def _identity(path: Path) -> tuple[object, ...]:
    """Tells a file from another that is put in its place."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ImageError("not_regular", f"{path.name!r}: expected a file, got a folder, pipe or device")
    return str(path), status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


# --------------------------------------------------------------------------------------------------------------- tar


class Tar:
    """A tar kept open, and where its files stand in it. The descriptor is closed when nobody holds the tar any more."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self.members: Mapping[bytes, Span] = _index_tar(self._descriptor, self.name)

    def read(self, span: Span) -> bytes:
        """The bytes of a member; safe in threads, since nothing is sought."""
        data = os.pread(self._descriptor, span.size, span.offset)
        while len(data) < span.size:  # Linux reads at most 2 GiB at once
            more = os.pread(self._descriptor, span.size - len(data), span.offset + len(data))
            if not more:
                raise ImageError("truncated", f"{self.name!r} was cut off since its members were listed")
            data += more
        return data


_tars: _Recent[Tar] = _Recent(128)


def open_tar(path: Path) -> Tar:
    """The tar with its members, from the headers alone; opened once a process while it is among the last 128.

    Raises:
        ImageError: it cannot be used; the message names the tar and the member.
        OSError: it cannot be opened or read.
    """
    return _tars.get(_identity(path), lambda: Tar(path))


def member_text(name: bytes) -> str:
    """A member's name as text; bytes that are not UTF-8 are written ``\\xff``."""
    return name.decode("utf-8", "backslashreplace")


def _read_tar_member(tar: Tar, inner: str, *, max_bytes: int) -> bytes:
    span = tar.members.get(os.fsencode(inner))
    if span is None:  # a name that holds \xff as text was taken for one that is not UTF-8
        span = tar.members.get(member_text(os.fsencode(inner)).encode())
    if span is None:
        raise ImageError("missing", f"no such member of {tar.name!r}")
    if span.size > max_bytes:
        raise ImageError("too_many_bytes", f"{span.size} bytes are more than the allowed {max_bytes}")
    return tar.read(span)


_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def _index_tar(descriptor: int, tar: str) -> dict[bytes, Span]:
    """Where each file stands; reads the headers and what belongs to them (long names, pax), no contents."""
    num_bytes = os.fstat(descriptor).st_size
    _refuse_compressed(os.pread(descriptor, 8, 0), tar)
    found: dict[bytes, Span] = {}
    said: dict[bytes, bytes] = {}  # by pax and long-name headers about the member that follows
    offset = 0
    while any(block := os.pread(descriptor, _BLOCK, offset)):
        header = _read_header(block, offset, tar)
        start = offset + _BLOCK
        if header.kind in b"xgLK":
            said |= _read_said(descriptor, header, start, tar)
        else:
            header = _with_said(header, said, tar)
            name, said = _checked_name(header, tar), {}
            if header.kind == b"5":
                header = header._replace(size=0)  # some writers give folders a size, and no bytes
            elif found.setdefault(name, Span(start, header.size)).offset != start:
                raise _refused(tar, name, "is there twice; write the tar again with each name once")
        offset = start + -(-header.size // _BLOCK) * _BLOCK
        if start + header.size > num_bytes:
            raise _refused(tar, header.name, "is cut off, the tar ends before it; copy or download the tar again")
    _check_end(descriptor, block, offset, num_bytes, tar)
    return found


def _refuse_compressed(start: bytes, tar: str) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ImageError(
                "unreadable",
                f"{tar!r} is compressed ({name}), so its members cannot be reached one by one; decompress it to a .tar",
            )


def _read_header(block: bytes, offset: int, tar: str) -> _Header:
    try:
        if len(block) < _BLOCK:
            raise ValueError("cut off")
        if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * ord(" "):
            raise ValueError("wrong checksum")
        name, prefix = (block[place].partition(b"\0")[0] for place in (slice(100), slice(345, 500)))
        if block[257:263] == b"ustar\0" and prefix:  # GNU tar keeps other things there
            name = prefix + b"/" + name
        return _Header(name, _number(block[124:136]), block[156:157])
    except ValueError as error:
        todo = "copy or download it again" if offset else "give a tar, a CSV manifest or a folder of images"
        what = f"is damaged at byte {offset}" if offset else "is no tar"
        raise ImageError("unreadable", f"{tar!r} {what}: expected a member's header ({error}); {todo}") from error


def _number(field: bytes) -> int:
    """Octal text, or a big-endian number behind the byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if text.strip(b"01234567"):
        raise ValueError("a number that is not octal")
    return int(text or b"0", 8)


def _read_said(descriptor: int, header: _Header, start: int, tar: str) -> dict[bytes, bytes]:
    """What a pax header (x) or a GNU long name (L) says about the next member, a global one (g) about all."""
    if header.size > MAX_HEADER:
        raise _refused(tar, header.name, f"has a header of {header.size} bytes; expected at most {MAX_HEADER}")
    data = os.pread(descriptor, header.size, start)
    if header.kind == b"L":
        return {b"path": data.partition(b"\0")[0]}
    if header.kind == b"K":  # the target of a link, which is refused
        return {}
    try:
        records = _pax_records(data)
    except ValueError as error:
        raise _refused(tar, header.name, "has a damaged pax header; write the tar again") from error
    if header.kind == b"g":
        if {b"path", b"size"} & set(records):
            raise _refused(tar, header.name, "gives all members one name or size; write the tar again")
        return {}
    return records


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """``length key=value\\n`` repeated; the length is that of the whole record."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        space = data.index(b" ", at, at + 9)
        end = at + int(data[at:space])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not (space < end <= len(data) and equals and data[end - 1] == ord("\n")):
            raise ValueError("a record without its end")
        records[key] = value
        at = end
    return records


def _with_said(header: _Header, said: Mapping[bytes, bytes], tar: str) -> _Header:
    if any(key.startswith(b"GNU.sparse.") for key in said):
        header = header._replace(kind=b"S")
    size = said.get(b"size", b"")
    if size and (len(size) > 18 or not size.isdigit()):
        raise _refused(tar, header.name, "has a damaged size in its pax header; write the tar again")
    name = said.get(b"path", header.name)
    kind = b"5" if header.kind in (b"0", b"\0") and name.endswith(b"/") else header.kind  # as old tars write folders
    return _Header(name, int(size) if size else header.size, kind)


def _checked_name(header: _Header, tar: str) -> bytes:
    """The name without ``./`` in front; refuses what is no plain file or folder, and names that lead elsewhere."""
    if header.kind not in (b"0", b"\0", b"5", b"7"):
        what = _REFUSED.get(header.kind, f"of the unknown kind {header.kind!r}")
        raise _refused(tar, header.name, f"is {what}; expected plain files only: write the tar again without it")
    parts = [part for part in header.name.split(b"/") if part not in (b"", b".")]
    if header.name.startswith(b"/") or b".." in parts or b"\0" in header.name or len(header.name) > MAX_NAME:
        todo = f"expected a relative name without '..' and NUL, of at most {MAX_NAME} bytes; rename it"
        raise _refused(tar, header.name, f"leads out of the tar or is too long; {todo}")
    if not parts and header.kind != b"5":
        raise _refused(tar, header.name, "has no name; write the tar again")
    return b"/".join(parts)


def _check_end(descriptor: int, block: bytes, offset: int, num_bytes: int, tar: str) -> None:
    if len(block) < _BLOCK:
        raise ImageError("unreadable", f"{tar!r} is cut off: it has no end mark; copy or download it again")
    steps = range(offset, num_bytes, 2**20)
    if any(any(os.pread(descriptor, min(num_bytes - step, 2**20), step)) for step in steps):
        raise ImageError("unreadable", f"{tar!r} goes on after its end mark; give tars that were joined one by one")


def _refused(tar: str, name: bytes, why: str) -> ImageError:
    return ImageError("unreadable", f"{tar!r}: the member {member_text(name[:300])!r} {why}")


# ------------------------------------------------------------------------------------------------- Parquet and Arrow


class Rows:
    """A Parquet or Arrow file: its schema, its rows, and the images of a stretch of rows."""

    def __init__(self, path: Path) -> None:
        self.name, self._path, self._identity = path.name, path, _identity(path)
        self._arrow = path.suffix.lower() == ".arrow"
        with _refusing(repr(self.name)):
            if self._arrow:
                self._batches: list[pa.RecordBatch] = []
                self.schema: pa.Schema = _arrow_schema(path)
                counts = [len(batch) for batch in _arrow_batches(path, [_smallest_column(self.schema)])]
            else:
                self._file = pq.ParquetFile(path)
                weakref.finalize(self, self._file.close, force=True)
                self.schema = self._file.schema_arrow
                groups = range(self._file.metadata.num_row_groups)
                counts = [self._file.metadata.row_group(group).num_rows for group in groups]
            self.names: list[str] = self.schema.names
            self._starts = [0, *accumulate(counts)]
            num_bytes = path.stat().st_size
            if not all(0 <= count <= num_bytes for count in (*counts, len(self))):
                raise ValueError(f"{len(self)} rows in a file of {num_bytes} bytes")

    def __len__(self) -> int:
        return self._starts[-1]

    @functools.cached_property
    def features(self) -> dict[str, dict[str, Any]]:
        """What Hugging Face ``datasets`` wrote about the columns into the schema; empty where it wrote nothing."""
        return _features(self.schema, self.name)

    @functools.cached_property
    def image_column(self) -> str:
        """The column that holds the images: what the file says itself, or else the only one that can."""
        return _image_column(self)

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows, at least one; no others are read."""
        with _refusing(repr(self.name)):
            if self._arrow:
                batches = _arrow_batches(self._path, [self.names.index(name) for name in names])
                table = pa.Table.from_batches(batches, None if batches else self.schema)
            else:
                table = self._read_bounded(list(names), None, MAX_TEXT * len(self))
            if len(table) != len(self):
                raise ValueError(f"{len(table)} rows, not {len(self)}")
            return table

    def image(self, row: int) -> tuple[pa.Buffer | None, str | None]:
        """(bytes, path) of the image in a row, either may be missing."""
        part = bisect.bisect_right(self._starts, row) - 1
        with _refusing(repr(self.name)):
            images = _parts.get((self._identity, part), lambda: self._images(part), cost=lambda images: images.nbytes)
            cell = images[row - self._starts[part]]
            if not cell.is_valid:
                return None, None
            if not pa.types.is_struct(cell.type):
                return cell.as_buffer(), None
            data = cell["bytes"]
            path = cell["path"].as_py() if cell.type.get_field_index("path") >= 0 else None
            return data.as_buffer() if data.is_valid else None, path

    def _images(self, part: int) -> pa.Array | pa.ChunkedArray:
        column = self.image_column
        if self._arrow:
            if not self._batches:
                self._batches = _arrow_batches(self._path, [self.names.index(column)])
            return self._batches[part].column(0)
        group = self._file.metadata.row_group(part)
        leaves = [group.column(leaf) for leaf in range(group.num_columns)]
        num_bytes = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.startswith(column))
        if num_bytes > MAX_ROW_GROUP:
            raise ImageError(
                "too_many_bytes",
                f"the row group {part} of {self.name!r} holds {num_bytes} bytes of images, more than the allowed "
                f"{MAX_ROW_GROUP}; write it in smaller row groups",
            )
        return self._read_bounded([column], [part], MAX_ROW_GROUP).column(0)

    def _read_bounded(self, names: list[str], row_groups: list[int] | None, max_bytes: int) -> pa.Table:
        """Some columns, a few rows at a time: a dictionary makes few bytes of a file to many in memory."""
        batches, num_bytes = [], 0
        for batch in self._file.iter_batches(256, row_groups=row_groups, columns=names, use_threads=False):
            num_bytes += sum(map(_unpacked_bytes, batch.columns))
            if num_bytes > max_bytes:
                raise ImageError(
                    "too_many_bytes",
                    f"{self.name!r}: {', '.join(map(repr, names))} unpack to more than {max_bytes} bytes",
                )
            batches.append(batch)
        schema = pa.schema([self._file.schema_arrow.field(name) for name in names])
        return pa.Table.from_batches(batches, None if batches else schema)


def _unpacked_bytes(column: pa.Array) -> int:
    """Of a column without its dictionary."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    words = column.dictionary
    if not len(words) or not (pa.types.is_string(words.type) or pa.types.is_large_string(words.type)):
        return int(column.nbytes)
    return int(pc.sum(pc.take(pc.binary_length(words), column.indices)).as_py() or 0)


_files: _Recent[Rows] = _Recent(64)


_parts: _Recent[Any] = _Recent(512 * 2**20)


ROW_DIGITS = 8


def _rows_of(path: Path) -> Rows:
    return _files.get(_identity(path), lambda: Rows(path))


def _arrow_schema(path: Path) -> pa.Schema:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).schema


def _smallest_column(schema: pa.Schema) -> int:
    """One to count rows by: not the images, if there is another."""
    return next((place for place, field in enumerate(schema) if not _may_hold_images(field.type)), 0)


def _arrow_batches(path: Path, columns: Sequence[int]) -> list[pa.RecordBatch]:
    """Batches of some columns, not copied from the file; checked whole, since wrong offsets would be followed."""
    file = pa.memory_map(str(path))
    file.seek(max(0, file.size() - 8))
    if file.read(8) != b"\xff\xff\xff\xff\0\0\0\0":
        raise ValueError("cut off: expected an Arrow stream with its end mark")
    file.seek(0)
    options = pa.ipc.IpcReadOptions(included_fields=list(columns), use_threads=False)
    batches = list(pa.ipc.open_stream(file, options=options))
    for batch in batches:
        batch.validate(full=True)
    return batches


def _read_row(rows: Rows, container: Path, inner: str, *, max_bytes: int) -> bytes | Path:
    if not (inner.isascii() and inner.isdigit() and len(inner) < 19 and int(inner) < len(rows)):
        raise ImageError("missing", f"no such row in {container.name!r}, which has {len(rows)}, counted from 0")
    data, path = rows.image(int(inner))
    if data is None:
        return _file_of_row(container, path)
    if data.size > max_bytes:
        raise ImageError("too_many_bytes", f"{data.size} bytes are more than the allowed {max_bytes}")
    found: bytes = data.to_pybytes()
    return found


def _file_of_row(container: Path, path: str | None) -> Path:
    """A row without bytes may name a file below the folder of its container."""
    if not path:
        raise ImageError("missing", f"the row of {container.name!r} holds neither bytes nor a path")
    if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path or "://" in path:
        raise ImageError(
            "missing",
            f"the row of {container.name!r} holds no bytes but the path {path[:200]!r}; expected one relative to the "
            f"folder of {container.name!r}, without '..': write the images' bytes into it",
        )
    return container.parent / path


def _image_column(rows: Rows) -> str:
    features = rows.features
    found = [name for name in rows.names if features.get(name, {}).get("_type") == "Image"]
    found = found or [field.name for field in rows.schema if _may_hold_images(field.type)]
    if len(found) > 1 and "image" in found:
        return "image"
    if len(found) != 1:
        raise ImageError(
            "unreadable",
            f"{rows.name!r}: expected one column of images (binary, or a struct of bytes and path), got {found} among the "
            f"columns {rows.names}; call the one that is meant 'image'",
        )
    if not _may_hold_images(rows.schema.field(found[0]).type):
        got = rows.schema.field(found[0]).type
        raise ImageError("unreadable", f"{rows.name!r}: expected bytes in the column {found[0]!r}, got {got}")
    return found[0]


def _may_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        kind = kind.field(place).type if place >= 0 else pa.null()
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _features(schema: pa.Schema, file: str) -> dict[str, dict[str, Any]]:
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return {}
    try:
        features = json.loads(text)["info"]["features"]
        return {str(name): value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageError(
            "unreadable", f"{file!r}: the metadata 'huggingface' of its schema is damaged; write the file again"
        ) from error
