"""A Parquet file of a run is opened only if it has the columns that it should have, and no more rows than its bytes can hold."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from explain2me.errors import RunFolderError
from explain2me.run.schema import ADDED_LATER, FILLED, TEXT
from explain2me.text import printable_line, shorten

FREE_BYTES = 256 * 2**20
"""Memory that any file may take; maps that are all zero take little room on a disk."""
MOST_EXPANSION = 40
"""Memory that a file may take beyond FREE_BYTES, as a multiple of its size. A million images of regular names take twelve
times theirs, and those of long paths about twice that.
"""
TEXT_BYTES, NUMBER_BYTES = 64, 8
"""Memory of a cell: of text without its characters, as Python holds it."""
MOST_ROW_GROUPS = 4096
MOST_METADATA = 64 * 2**20
"""Bytes of one text in a footer."""
ParquetError = (OSError, pa.ArrowException, ValueError, LookupError, TypeError, OverflowError)
"""What pyarrow raises for bytes that are not Parquet."""


def unreadable(path: Path, why: object) -> RunFolderError:
    """The error for a file of a run that is there and is not what it should be; a reader cannot tell how that came."""
    reason = printable_line(str(why).partition("\n")[0])
    return RunFolderError(
        f"{path} cannot be read ({reason}); look at its disk. A file of maps, scores or summary that is moved away is made "
        f"again by the command that makes it"
    )


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Name the file in what pyarrow raises for bytes that are not Parquet; other errors of the disk stay as they are."""
    try:
        yield
    except ParquetError as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno):
            raise  # the machine is at fault, not the file
        raise unreadable(path, error) from None


def open_parquet(path: Path, schema: pa.Schema | None = None) -> pq.ParquetFile:
    """Open a file after a look at its footer; text columns are read as dictionaries, see :func:`read_groups`.

    Raises:
        RunFolderError: it has other columns than ``schema``, or too many row groups.
        Exception: one of ParquetError, where it is not Parquet.
    """
    texts = [field.name for field in schema or () if field.type == TEXT]
    try:
        file = _open(path, texts)
    except KeyError:  # one of them is not there
        file = _open(path, [])
    wrong = _wrong_columns(file.schema_arrow, schema)
    if file.num_row_groups > MOST_ROW_GROUPS:
        wrong = f"it has {file.num_row_groups} row groups, expected at most {MOST_ROW_GROUPS}"
    if wrong:
        file.close()
        raise unreadable(path, wrong)
    return file


def _open(path: Path, texts: list[str]) -> pq.ParquetFile:
    limits = {"thrift_string_size_limit": MOST_METADATA, "thrift_container_size_limit": MOST_METADATA // 64}
    return pq.ParquetFile(path, read_dictionary=texts, page_checksum_verification=True, **limits)


def read_groups(
    path: Path,
    file: pq.ParquetFile,
    groups: Sequence[int],
    *,
    columns: list[str] | None = None,
    schema: pa.Schema | None = None,
) -> pa.Table:
    """Some row groups of the file that :func:`open_parquet` opened at ``path`` with ``schema``, their bytes checked.

    A dictionary of few long texts may stand for many cells, so the bytes of the cells are counted before they are copied.

    Raises:
        Exception: one of ParquetError; ValueError where the groups take far more memory than bytes on the disk, or where
            cells that must be filled are empty.
    """
    size = path.stat().st_size
    texts = [field.name for field in schema or () if field.type == TEXT]
    _check_size(file, groups, texts, size)
    table = file.read_row_groups(groups, columns=columns) if groups else file.schema_arrow.empty_table()
    table = table if columns is None else table.select(columns)
    table.validate(full=True)
    if schema is None:
        return table
    texts = [name for name in texts if name in table.column_names]
    num_bytes = sum(_text_bytes(chunk) for name in texts for chunk in table[name].chunks)
    if num_bytes > _most_bytes(size):
        raise ValueError(f"its texts take {num_bytes} bytes of memory and {size} on the disk")
    for name in texts:
        table = table.set_column(table.column_names.index(name), name, table[name].cast(TEXT))
    if "image" in schema.names:
        _refuse_empty_cells(table)
    return table


def refuse_empty_cells(path: Path, table: pa.Table) -> None:
    """Raise RunFolderError for an empty cell in a column that must have none. Tables by image are checked when read."""
    with named(path):
        _refuse_empty_cells(table)


def _refuse_empty_cells(table: pa.Table) -> None:
    for name in sorted(FILLED.intersection(table.column_names)):
        if table[name].null_count and not (name == "image" and "stage" in table.column_names):  # an image of no table
            raise ValueError(f"column {name!r} is empty in {table[name].null_count} rows")


def _text_bytes(chunk: pa.Array) -> int:
    if not isinstance(chunk, pa.DictionaryArray):
        return int(chunk.nbytes)
    return int(pc.sum(pc.binary_length(chunk.dictionary).cast(pa.int64()).take(chunk.indices)).as_py() or 0)


def _wrong_columns(found: pa.Schema, schema: pa.Schema | None) -> str | None:
    """The first difference from the columns that were expected. A list of 0 numbers stands for one of any length."""
    if schema is None:
        return None
    expected = [field for field in schema if field.name in found.names or field.name not in ADDED_LATER]
    if found.names != [field.name for field in expected]:
        names = shorten(", ".join(map(repr, found.names)))
        return f"expected the columns {', '.join(field.name for field in expected)}; got {names}"
    for field, got in zip(expected, found, strict=True):
        if not _same_type(field.type, got.type):
            return f"expected column {field.name} of type {field.type}, got {shorten(got.type)}"
    return None


def _same_type(expected: pa.DataType, got: pa.DataType) -> bool:
    if expected == TEXT and got == pa.dictionary(pa.int32(), TEXT):
        return True
    if pa.types.is_fixed_size_list(expected) and expected.list_size == 0:
        return bool(pa.types.is_fixed_size_list(got) and got.value_type == expected.value_type and got.list_size > 0)
    return bool(expected == got)


def _check_size(file: pq.ParquetFile, groups: Sequence[int], texts: Sequence[str], size: int) -> None:
    """ValueError where row groups take far more memory than their file on the disk.

    Asks no column chunk: pyarrow aborts the process where one contradicts itself, but reads it with an error.
    """
    chosen = [file.metadata.row_group(group) for group in groups]
    num_rows = sum(max(group.num_rows, 0) for group in chosen)
    row_bytes = sum(TEXT_BYTES if field.name in texts else _cell_bytes(field.type) for field in file.schema_arrow)
    num_bytes = sum(max(group.total_byte_size, 0) for group in chosen) + num_rows * row_bytes
    if num_bytes > _most_bytes(size):
        raise ValueError(f"{num_rows} rows take {num_bytes} bytes of memory and {size} on the disk")


def _cell_bytes(kind: pa.DataType) -> int:
    return NUMBER_BYTES * (int(kind.list_size) if pa.types.is_fixed_size_list(kind) else 1)


def _most_bytes(size: int) -> int:
    return max(FREE_BYTES, MOST_EXPANSION * size)
