"""Read a manifest: a CSV file with one line per image. Opens no image, and imports nothing heavy."""

import csv
import difflib
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from explain2me.errors import ImageError, ManifestError
from explain2me.images.reading import read_bytes
from explain2me.images.rows import COLUMNS, Row, check_names


def read_manifest_rows(manifest: Path, *, extra: Sequence[str]) -> list[Row]:
    """Rows of a CSV file (UTF-8, with a column ``path``); column names that are nearly one that is read are refused.

    Raises:
        ManifestError: the file is missing or not such a CSV file; the message names the line.
    """
    where = repr(str(manifest))
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
        text = data.decode("utf-8-sig")
    except ImageError as error:
        todo = "give a CSV file with a column 'path', or a folder of images"
        raise ManifestError(f"{where}: {error.message}; {todo}") from error
    except UnicodeDecodeError as error:
        line, got = data.count(b"\n", 0, error.start) + 1, f"the byte 0x{data[error.start]:02x}"
        raise ManifestError(f"{where} line {line}: expected UTF-8, got {got}; save the file as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ManifestError(f"{where} line {line}: expected text, got a NUL byte; save the file as UTF-8 text")
    return text


def _check_columns(fields: Sequence[str], where: str, *, extra: Sequence[str]) -> list[str]:
    columns = [field.strip() for field in fields]
    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
        raise ManifestError(f"{where}: the column {repeated[0]!r} is there twice; rename one")
    if "path" not in columns:
        separator = next((mark for mark in (";", "\t") if len(columns) == 1 and mark in columns[0]), None)
        near = difflib.get_close_matches("path", columns, n=1)
        todo = f"rename {near[0]!r} to 'path'" if near else "add it: one file each, relative to the manifest"
        todo = f"separate fields by commas, not {separator!r}" if separator else todo
        raise ManifestError(f"{where}: expected a column 'path', got the columns {columns}; {todo}")
    check_names(columns, where, (*COLUMNS, *extra))
    return columns


def _cells(fields: Sequence[str], columns: Sequence[str], where: str) -> dict[str, str]:
    if len(fields) != len(columns):
        raise ManifestError(
            f"{where}: expected {len(columns)} fields ({', '.join(map(repr, columns))}), got {len(fields)}; "
            "put a field that holds a comma in double quotes"
        )
    return dict(zip(columns, fields, strict=True))
