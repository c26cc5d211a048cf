"""Tars kept open, and the index of their members, from the headers alone.

``tarfile`` reads each header block. The walk from block to block and the extended headers (pax, GNU long names) are read
here, because ``TarFile`` takes a damaged header for the end of the tar and does not look behind the end; because a hostile
pax header of 64 KiB takes it 3.4 s and 1.0 GiB, and the cost grows with the square of its length (Python 3.11 and 3.12);
and because it takes three times the memory for a tar of 100,000 members.

Refused: a tar that is compressed, cut off, damaged, or followed by other data; members that are links, devices or sparse
files; names that are absolute, climb with ``..``, are too long, or are there twice; extended headers that are too long.
"""

import os
import tarfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from explain2me.errors import ImageError
from explain2me.images.containers.opened import Recent, file_identity, num_kept_open
from explain2me.images.containers.rows import as_text

BLOCK = tarfile.BLOCKSIZE
MAX_NAME = 4096
"""Bytes of a member's name."""
MAX_HEADER = 2**20
"""Bytes of an extended header, which is read into memory."""
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
REFUSED = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
ONLY_FILES = "expected plain files only: write the tar again without it"


class Span(NamedTuple):
    """Where the bytes of a member are in its tar."""

    offset: int
    size: int


class Tar:
    """A tar kept open, with the span of each of its files. The file is closed when nobody holds the tar any more.

    Raises:
        ImageError: the tar cannot be used; the message names the tar and the member.
        OSError: the tar cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        try:
            self.members: Mapping[bytes, Span] = _index(self._descriptor)
        except ValueError as error:
            raise ImageError("unreadable", f"{self.name!r}: {error}") from error

    def read(self, span: Span) -> bytes:
        """The bytes of a member; safe in threads, since the position of the file is not used."""
        data = os.pread(self._descriptor, span.size, span.offset)
        while len(data) < span.size:  # Linux reads at most 2 GiB at once
            more = os.pread(self._descriptor, span.size - len(data), span.offset + len(data))
            if not more:
                raise ImageError("truncated", f"{self.name!r} was cut off since its members were listed")
            data += more
        return data


OPEN_TARS: Recent[Tar] = Recent(num_kept_open(128))


def open_tar(path: Path) -> Tar:
    """The tar, indexed once a process while it is among the last ones; raises as :class:`Tar` does."""
    return OPEN_TARS.get(file_identity(path), lambda: Tar(path))


def read_tar_member(container: Path, inner: str, max_bytes: int) -> bytes:
    """Read the image that is called ``inner``; see :func:`explain2me.images.containers.formats.read_member`."""
    tar, name = open_tar(container), os.fsencode(inner)
    # a name that holds \xff as text was taken for one that is not UTF-8
    span = tar.members.get(name) or tar.members.get(as_text(name).encode())
    if span is None:
        raise ImageError("missing", f"no such member of {tar.name!r}")
    if span.size > max_bytes:
        raise ImageError("too_many_bytes", f"{span.size} bytes are more than the allowed {max_bytes}")
    return tar.read(span)


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def _index(descriptor: int) -> dict[bytes, Span]:
    """The span of each file by its name; raises ValueError for a tar that cannot be used."""
    num_bytes = os.fstat(descriptor).st_size
    magic = os.pread(descriptor, 8, 0)
    if kind := next((kind for start, kind in COMPRESSED.items() if magic.startswith(start)), None):
        raise ValueError(f"compressed ({kind}), so its members cannot be read one by one; decompress it to a .tar")
    spans: dict[bytes, Span] = {}
    extended: dict[bytes, bytes] = {}  # path and size of the member that follows
    end = 0
    while any(block := os.pread(descriptor, BLOCK, end)):
        header = _read_header(block, end)
        start = end + BLOCK
        if header.kind in EXTENDED:
            extended |= _read_extended(descriptor, header, start)
        else:
            header = _extend(header, extended)
            name, extended = _checked_name(header), {}
            if header.kind == tarfile.DIRTYPE:
                header = header._replace(size=0)  # some writers give folders a size, and no bytes
            elif spans.setdefault(name, Span(start, header.size)).offset != start:
                raise _refusal(name, "is there twice; write the tar again with each name once")
        end = start + -(-header.size // BLOCK) * BLOCK
        if start + header.size > num_bytes:
            raise _refusal(header.name, "is cut off, the tar ends before it; copy or download the tar again")
    _check_end(descriptor, block, end, num_bytes)
    return spans


def _read_header(block: bytes, offset: int) -> _Header:
    try:
        header = tarfile.TarInfo.frombuf(block, "latin-1", "strict")  # bytes and back again, whatever they are
        if header.size < 0:
            raise ValueError("negative size")
    except (tarfile.HeaderError, ValueError) as error:
        todo = "copy or download it again" if offset else "give a tar, a CSV manifest or a folder of images"
        where = f"damaged at byte {offset}" if offset else "no tar"
        raise ValueError(f"{where}, expected a member's header ({error}); {todo}") from error
    name = header.name.encode("latin-1")
    if not block.startswith(tarfile.POSIX_MAGIC[:6], 257):  # GNU tar keeps times where ustar has the start of the name
        name = block[:100].partition(b"\0")[0]
    return _Header(name, header.size, header.type)


def _read_extended(descriptor: int, header: _Header, start: int) -> dict[bytes, bytes]:
    """The path and size that a pax header or GNU long name gives to the next member; a global header must give none."""
    if header.size > MAX_HEADER:
        raise _refusal(header.name, f"has a header of {header.size} bytes; expected at most {MAX_HEADER}")
    data = os.pread(descriptor, header.size, start)
    if header.kind == tarfile.GNUTYPE_LONGNAME:
        return {b"path": data.partition(b"\0")[0]}
    if header.kind == tarfile.GNUTYPE_LONGLINK:  # the target of a link, which is refused
        return {}
    try:
        records = _pax_records(data)
    except ValueError as error:
        raise _refusal(header.name, "has a damaged pax header; write the tar again") from error
    given: dict[bytes, bytes] = {key: records[key] for key in (b"path", b"size") if key in records}
    if header.kind == tarfile.XGLTYPE and given:
        raise _refusal(header.name, "gives all members one name or size; write the tar again")
    if header.kind == tarfile.XHDTYPE and any(key.startswith(b"GNU.sparse.") for key in records):
        name = records.get(b"GNU.sparse.name", header.name)
        raise _refusal(name, f"is {REFUSED[tarfile.GNUTYPE_SPARSE]}; {ONLY_FILES}")
    return given


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """``length key=value\\n`` repeated; the length is that of the whole record."""
    records: dict[bytes, bytes] = {}
    place = 0
    while place < len(data):
        space = data.index(b" ", place, place + 9)
        end = place + int(data[place:space])
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not (space < end <= len(data) and equals and data[end - 1] == ord("\n")):
            raise ValueError("a record without its end")
        records[key] = value
        place = end
    return records


def _extend(header: _Header, extended: Mapping[bytes, bytes]) -> _Header:
    """The header with the name and size that its extended headers give."""
    name = extended.get(b"path", header.name)
    kind = tarfile.DIRTYPE if header.kind in FILES and name.endswith(b"/") else header.kind  # as old tars write folders
    size = extended.get(b"size", b"")
    if size and (len(size) > 18 or not size.isdigit()):
        raise _refusal(header.name, "has a damaged size in its pax header; write the tar again")
    return _Header(name, int(size) if size else header.size, kind)


def _checked_name(header: _Header) -> bytes:
    """The name without ``./`` in front; refuses what is no plain file or folder, and names that lead elsewhere."""
    if header.kind not in (*FILES, tarfile.DIRTYPE):
        kind = REFUSED.get(header.kind, f"of the unknown kind {header.kind!r}")
        raise _refusal(header.name, f"is {kind}; {ONLY_FILES}")
    parts = [part for part in header.name.split(b"/") if part not in (b"", b".")]
    if header.name.startswith(b"/") or b".." in parts or b"\0" in header.name or len(header.name) > MAX_NAME:
        todo = f"expected a relative name without '..' and NUL, of at most {MAX_NAME} bytes; rename it"
        raise _refusal(header.name, f"leads out of the tar or is too long; {todo}")
    if not parts and header.kind != tarfile.DIRTYPE:
        raise _refusal(header.name, "has no name; write the tar again")
    return b"/".join(parts)


def _check_end(descriptor: int, block: bytes, end: int, num_bytes: int) -> None:
    """A tar ends with a block of zeros, and only zeros follow."""
    if len(block) < BLOCK:
        raise ValueError("cut off, it has no end mark; copy or download it again")
    steps = range(end, num_bytes, 2**20)
    if any(any(os.pread(descriptor, min(num_bytes - step, 2**20), step)) for step in steps):
        raise ValueError("continues after its end mark; give tars that were joined one by one")


def _refusal(name: bytes, why: str) -> ValueError:
    return ValueError(f"the member {as_text(name[:300])!r} {why}")
