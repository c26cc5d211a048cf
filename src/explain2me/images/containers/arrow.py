"""Arrow streams, as ``datasets`` saves them: mapped into memory, and checked before they are read."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from explain2me.images.containers.tables import list_table, may_hold_images, read_row

END_MARK = b"\xff\xff\xff\xff\0\0\0\0"


class ArrowFile:
    """A :class:`explain2me.images.containers.tables.TableFile`; its parts are record batches."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._image_batches: list[pa.RecordBatch] = []
        with pa.memory_map(str(path)) as file:
            self.schema: pa.Schema = pa.ipc.open_stream(file).schema
        # rows are counted in a column that holds no images, if there is one
        columns = (place for place, field in enumerate(self.schema) if not may_hold_images(field.type))
        self.part_rows = [len(batch) for batch in _batches(path, [next(columns, 0)])]

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows."""
        batches = _batches(self._path, [self.schema.names.index(name) for name in names])
        return pa.Table.from_batches(batches, None if batches else self.schema)

    def images(self, column: str, part: int) -> pa.Array:
        """The images of one record batch."""
        if not self._image_batches:
            self._image_batches = _batches(self._path, [self.schema.names.index(column)])
        return self._image_batches[part].column(0)


def _batches(path: Path, columns: Sequence[int]) -> list[pa.RecordBatch]:
    """Batches of some columns, not copied from the file; validated, because wrong offsets would be followed."""
    file = pa.memory_map(str(path))
    file.seek(max(0, file.size() - len(END_MARK)))
    if file.read(len(END_MARK)) != END_MARK:
        raise ValueError("cut off: expected an Arrow stream with its end mark")
    file.seek(0)
    options = pa.ipc.IpcReadOptions(included_fields=list(columns), use_threads=False)
    batches = list(pa.ipc.open_stream(file, options=options))
    for batch in batches:
        batch.validate(full=True)
    return batches


read_image = partial(read_row, ArrowFile)
list_images = partial(list_table, ArrowFile)
