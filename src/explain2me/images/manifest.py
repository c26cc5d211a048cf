"""The list of images: a manifest CSV, or a folder or container files imported to the same table. Opens no image."""

import csv
import difflib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from explain2me.errors import ImageError, ManifestError
from explain2me.images.containers import Row, check_names
from explain2me.images.reading import read_bytes
from explain2me.text import nearest

ESCAPED = re.compile(rb"\\x([89a-f][0-9a-f])")  # what "backslashreplace" writes for a byte that is not UTF-8


_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def list_manifest(manifest: Path, *, split: str | None, extra: Sequence[str]) -> pa.Table:
    """Rows of the images of a CSV file."""
    where = repr(str(manifest))
    return read_table(read_manifest_rows(manifest, where, extra=extra), where, split=split, extra=extra)


def read_table(rows: list[Row], where: str, *, split: str | None, extra: Sequence[str], ignored: int = 0) -> pa.Table:
    """Checked rows as a table: paths and ids are unique, empty columns are filled."""
    if _filled(rows, "path", where) is None:
        raise ManifestError(f"{where}: the column 'path' is empty in every row; fill it")
    _check_unique(rows, "path", where, key=os.path.normpath)
    _check_unique(rows, "image_id", where, key=str)
    rows = _rows_of_split(rows, split, where)
    paths = [row.cells["path"] for row in rows]
    labels = _filled(rows, "label", where)
    sources = _filled(rows, "source", where) or labels or ["images"] * len(rows)
    columns: list[Sequence[str | None]] = [_filled(rows, "image_id", where) or paths, paths]
    columns += [labels or [None] * len(rows), sources]
    names = ["image_id", "path", "label", "source"]
    if any(row.cells.get("sha256", "").strip() for row in rows):
        names.append("expected_sha256")
        columns.append([_expected_sha256(row, where) for row in rows])
    names += extra
    columns += [[row.cells.get(name, "").strip() or None for row in rows] for name in extra]
    return rows_to_table(names, columns, ignored=ignored)


def rows_to_table(names: Sequence[str], columns: Sequence[Sequence[str | None]], *, ignored: int = 0) -> pa.Table:
    """Columns of text as a table sorted by image id."""
    ids = columns[0]
    order = sorted(range(len(ids)), key=lambda position: str(ids[position]))
    arrays = [pa.array([column[position] for position in order], pa.string()) for column in columns]
    schema = pa.schema([(name, pa.string()) for name in names], metadata={"ignored": str(ignored)})
    return pa.Table.from_arrays(arrays, schema=schema)


def read_manifest_rows(manifest: Path, where: str, *, extra: Sequence[str]) -> list[Row]:
    """Cells of a CSV file with the line that each row stands on."""
    reader = csv.reader(io.StringIO(_manifest_text(manifest, where), newline=""), strict=True)
    columns: list[str] = []
    rows: list[Row] = []
    line = 1
    try:
        for fields in reader:
            if fields and not columns:
                columns = _check_columns(fields, f"{where} line {line}", extra=extra)
            elif fields:
                rows.append(Row(f"line {line}", _cells(fields, columns, f"{where} line {line}")))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(f"{where} line {line}: not valid CSV ({error}); look for an unclosed quote") from error
    if not rows:
        raise ManifestError(f"{where}: expected a line of column names and one line per image, got no rows")
    return rows


def _manifest_text(manifest: Path, where: str) -> str:
    try:
        data = read_bytes(manifest)
    except ImageError as error:
        todo = "give a CSV file with a column 'path', or a folder of images"
        raise ManifestError(f"{where}: {error.message}; {todo}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        got = f"the byte 0x{data[error.start]:02x}"
        raise ManifestError(f"{where} line {line}: expected UTF-8, got {got}; save the file as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ManifestError(f"{where} line {line}: expected text, got a NUL byte; save the file as UTF-8 text")
    return text


def _check_columns(fields: Sequence[str], where: str, *, extra: Sequence[str]) -> list[str]:
    columns = [field.strip() for field in fields]
    repeated = [name for name, count in Counter(columns).items() if count > 1]
    if repeated:
        raise ManifestError(f"{where}: the column {repeated[0]!r} is there twice; rename one")
    if "path" not in columns:
        separator = next((mark for mark in (";", "\t") if len(columns) == 1 and mark in columns[0]), None)
        near = difflib.get_close_matches("path", columns, n=1)
        todo = f"rename {near[0]!r} to 'path'" if near else "add it: one file each, relative to the manifest"
        todo = f"separate fields by commas, not {separator!r}" if separator else todo
        raise ManifestError(f"{where}: expected a column 'path', got the columns {columns}; {todo}")
    check_names(columns, where, extra=extra)
    return columns


def _cells(fields: Sequence[str], columns: Sequence[str], where: str) -> dict[str, str]:
    if len(fields) != len(columns):
        raise ManifestError(
            f"{where}: expected {len(columns)} fields ({', '.join(map(repr, columns))}), got {len(fields)}; "
            "put a field that holds a comma in double quotes"
        )
    return dict(zip(columns, fields, strict=True))


def _check_unique(rows: Sequence[Row], column: str, where: str, *, key: Callable[[str], str]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        cell = row.cells.get(column, "")
        if cell.strip() and (first := seen.setdefault(key(cell), row.place)) != row.place:
            raise ManifestError(f"{where} {row.place}: the {column} {cell!r} is on {first} already; keep one of them")


def _rows_of_split(rows: list[Row], split: str | None, where: str) -> list[Row]:
    if split is None:
        return rows
    if "split" not in rows[0].cells:
        got = list(rows[0].cells)
        raise ManifestError(f"{where}: the split {split!r} was asked, but there is no column 'split' in {got}")
    counts = Counter(row.cells["split"] for row in rows)
    if not counts[split]:
        there = ", ".join(f"{name!r} ({count})" for name, count in sorted(counts.items()) if count)
        known = nearest(split, counts)
        raise ManifestError(f"{where}: no rows of the split {split!r}; there are {there} rows; {known}")
    return [row for row in rows if row.cells["split"] == split]


def _filled(rows: Sequence[Row], column: str, where: str) -> list[str] | None:
    """The cells of a column, or None where it is absent or empty throughout."""
    cells = [row.cells.get(column, "") for row in rows]
    empty = [row.place for row, cell in zip(rows, cells, strict=True) if not cell.strip()]
    if len(empty) == len(rows):
        return None
    if empty:
        more = f" ({len(empty)} such rows)" if empty[1:] else ""
        raise ManifestError(f"{where} {empty[0]}: the {column} is empty{more}; fill it in every row")
    return cells


def _expected_sha256(row: Row, where: str) -> str | None:
    text = row.cells["sha256"].strip()
    if text and not _SHA256.fullmatch(text):
        raise ManifestError(f"{where} {row.place}: expected a sha256 of 64 hexadecimal digits, got {text!r}")
    return text.lower() or None
