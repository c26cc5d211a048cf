"""Parquet files: one row group of images is in memory at a time, within a limit."""

import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from explain2me.errors import ImageError
from explain2me.images.containers.tables import Table, list_table, read_row

MAX_TEXT = 16 * 2**10
"""Bytes of the label, source, split and the like of a row, on average over the rows."""
MAX_ROW_GROUP = 4 * 2**30
"""Bytes of a row group's images, which are in memory together."""


class ParquetFile:
    """A :class:`explain2me.images.containers.tables.TableFile`; its parts are row groups."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = pq.ParquetFile(path)
        weakref.finalize(self, self._file.close, force=True)
        self.schema: pa.Schema = self._file.schema_arrow
        metadata = self._file.metadata
        self.part_rows = [metadata.row_group(part).num_rows for part in range(metadata.num_row_groups)]

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows."""
        return self._read_bounded(list(names), None, MAX_TEXT * sum(self.part_rows))

    def images(self, column: str, part: int) -> pa.ChunkedArray:
        """The images of one row group."""
        group = self._file.metadata.row_group(part)
        leaves = [group.column(leaf) for leaf in range(group.num_columns)]
        num_bytes = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.startswith(column))
        if num_bytes > MAX_ROW_GROUP:
            where, todo = f"the row group {part} of {self._name!r}", "write it in smaller row groups"
            why = f"{where} holds {num_bytes} bytes of images, more than the allowed {MAX_ROW_GROUP}; {todo}"
            raise ImageError("too_many_bytes", why)
        return self._read_bounded([column], [part], MAX_ROW_GROUP).column(0)

    def _read_bounded(self, names: list[str], row_groups: list[int] | None, max_bytes: int) -> pa.Table:
        """Read a few rows at a time: with a dictionary, few bytes in the file become many in memory."""
        batches, num_bytes = [], 0
        for batch in self._file.iter_batches(256, row_groups=row_groups, columns=names, use_threads=False):
            num_bytes += sum(map(_unpacked_bytes, batch.columns))
            if num_bytes > max_bytes:
                columns = ", ".join(map(repr, names))
                raise ImageError("too_many_bytes", f"{self._name!r}: {columns} unpack to more than {max_bytes} bytes")
            batches.append(batch)
        schema = pa.schema([self.schema.field(name) for name in names])
        return pa.Table.from_batches(batches, None if batches else schema)


def _unpacked_bytes(column: pa.Array) -> int:
    """Bytes of a column with each word of its dictionary written out."""
    if pa.types.is_dictionary(column.type):
        words = column.dictionary
        if len(words) and (pa.types.is_string(words.type) or pa.types.is_large_string(words.type)):
            return int(pc.sum(pc.take(pc.binary_length(words), column.indices)).as_py() or 0)
    return int(column.nbytes)


read_image = partial(read_row, ParquetFile)
list_images = partial(list_table, ParquetFile)


def is_download_table(path: Path) -> bool:
    """Whether a Parquet file is the table of downloads that img2dataset writes beside each tar."""
    try:
        return {"url", "status"} <= set(Table(ParquetFile, path).names)
    except (ImageError, OSError):  # whoever reads the file reports it
        return False
