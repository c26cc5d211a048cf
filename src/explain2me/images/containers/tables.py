"""Tables of images in Parquet and Arrow files, as Hugging Face ``datasets`` writes them.

A table has one column of images (binary, or a struct of ``bytes`` and ``path``) and columns by the names of a manifest.
A number as a label is the name that the file gives to it (``ClassLabel``), or else its place in ``classes``, or else its
decimal digits. A row without bytes may name a file below the folder of its table.
"""

import bisect
import functools
import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from explain2me.errors import ImageError, ManifestError
from explain2me.images.containers.opened import Recent, file_identity, num_kept_open, refusing_damage
from explain2me.images.containers.rows import Container, cell_text, class_name
from explain2me.images.rows import Row, check_names

ROW_DIGITS = 8


class TableFile(Protocol):
    """What a format of tables must offer: its schema, and the columns and images of its parts."""

    schema: pa.Schema
    part_rows: list[int]
    """How many rows each part has; the images of a part are read together."""

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows, at least one; no others are read."""

    def images(self, column: str, part: int) -> pa.Array | pa.ChunkedArray:
        """The images of one part."""


OpenTable = Callable[[Path], TableFile]


class Table:
    """A table kept open: its schema, its rows, and the image of a row."""

    def __init__(self, open_table: OpenTable, path: Path) -> None:
        self.name, self._identity = path.name, file_identity(path)
        with refusing_damage(self.name):
            self._file = open_table(path)
            self.schema = self._file.schema
            self.names: list[str] = self.schema.names
            counts = self._file.part_rows
            self._starts = [0, *accumulate(counts)]
            num_bytes = path.stat().st_size
            if not all(0 <= count <= num_bytes for count in (*counts, len(self))):
                raise ValueError(f"{len(self)} rows in a file of {num_bytes} bytes")

    def __len__(self) -> int:
        return self._starts[-1]

    @functools.cached_property
    def features(self) -> dict[str, dict[str, Any]]:
        """What ``datasets`` wrote about the columns into the schema; empty where it wrote nothing."""
        text = (self.schema.metadata or {}).get(b"huggingface")
        if text is None:
            return {}
        try:
            features = json.loads(text)["info"]["features"]
            return {str(name): value for name, value in features.items() if isinstance(value, dict)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            why = "the metadata 'huggingface' of its schema is not as datasets writes it; write the file again"
            raise ImageError("unreadable", f"{self.name!r}: {why}") from error

    @functools.cached_property
    def image_column(self) -> str:
        """The column of images: the one that the file declares, or else the only one that can hold images."""
        names = [name for name in self.names if self.features.get(name, {}).get("_type") == "Image"]
        names = names or [field.name for field in self.schema if may_hold_images(field.type)]
        if len(names) > 1 and "image" in names:
            return "image"
        if len(names) != 1:
            raise ImageError(
                "unreadable",
                f"{self.name!r}: expected one column of images (binary, or a struct of bytes and path), got {names} "
                f"among the columns {self.names}; call the one that is meant 'image'",
            )
        kind = self.schema.field(names[0]).type
        if not may_hold_images(kind):
            raise ImageError("unreadable", f"{self.name!r}: expected bytes in the column {names[0]!r}, got {kind}")
        return names[0]

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Some columns of all rows, at least one."""
        with refusing_damage(self.name):
            table = self._file.columns(names)
            if len(table) != len(self):
                raise ValueError(f"{len(table)} rows, not {len(self)}")
            return table

    def image(self, row: int) -> tuple[pa.Buffer | None, str | None]:
        """(bytes, path) of the image in a row; either may be missing."""
        part = bisect.bisect_right(self._starts, row) - 1
        with refusing_damage(self.name):
            images = IMAGE_PARTS.get((self._identity, part), lambda: self._file.images(self.image_column, part))
            cell = images[row - self._starts[part]]
            if not cell.is_valid:
                return None, None
            if not pa.types.is_struct(cell.type):
                return cell.as_buffer(), None
            data = cell["bytes"]
            path = cell["path"].as_py() if cell.type.get_field_index("path") >= 0 else None
            return data.as_buffer() if data.is_valid else None, path


OPEN_TABLES: Recent[Table] = Recent(num_kept_open(64))
IMAGE_PARTS: Recent[Any] = Recent(512 * 2**20, cost=lambda images: images.nbytes)
"""Row groups and record batches of images, by their bytes."""


def read_row(open_table: OpenTable, container: Path, inner: str, max_bytes: int) -> bytes | Path:
    """Read the image of the row whose number is ``inner``; see :func:`explain2me.images.containers.formats.read_member`."""
    table = OPEN_TABLES.get(file_identity(container), lambda: Table(open_table, container))
    if not (inner.isascii() and inner.isdigit() and len(inner) < 19 and int(inner) < len(table)):
        raise ImageError("missing", f"no such row in {container.name!r}, which has {len(table)}, counted from 0")
    data, path = table.image(int(inner))
    if data is not None:
        if data.size > max_bytes:
            raise ImageError("too_many_bytes", f"{data.size} bytes are more than the allowed {max_bytes}")
        return data.to_pybytes()
    if not path:
        raise ImageError("missing", f"the row of {container.name!r} holds neither bytes nor a path")
    if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path or "://" in path:
        raise ImageError(
            "missing",
            f"the row of {container.name!r} holds no bytes but the path {path[:200]!r}; expected one relative to the "
            f"folder of {container.name!r}, without '..': write the images' bytes into it",
        )
    return container.parent / path


def may_hold_images(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold images: binary, or a struct with a binary field ``bytes``."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        kind = kind.field(place).type if place >= 0 else pa.null()
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def list_table(
    open_table: OpenTable, file: Container, columns: Sequence[str], classes: Sequence[str] | None
) -> tuple[list[Row], int]:
    """One row for each image of a table; none is left out."""
    table = Table(open_table, file.path)
    if repeated := sorted({name for name in table.names if table.names.count(name) > 1}):
        raise ManifestError(f"{file.name!r}: the column {repeated[0]!r} is there twice; rename one")
    check_names(table.names, repr(file.name), columns)
    images = table.image_column  # raises where there is none
    names = [name for name in columns if name in table.names and name != images]
    values = _columns(table, names, classes, repr(file.name))
    rows = []
    for i in range(len(table)):
        cells = {name: values[name][i] if name in values else "" for name in columns}
        cells |= {"path": f"{file.name}/{i:0{ROW_DIGITS}d}", "split": cells["split"] or file.split}
        rows.append(Row(f"row {i} of {file.name!r}", cells))
    return rows, 0


def _columns(table: Table, names: Sequence[str], classes: Sequence[str] | None, where: str) -> dict[str, list[str]]:
    """The cells of some columns as text."""
    values = table.columns(names) if names else pa.table({})
    columns: dict[str, list[str]] = {}
    for name in names:
        kind = values.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
        if not (is_text or is_number or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
            raise ManifestError(
                f"{where}: expected text or numbers in the column {name!r}, got {kind}; write it as text"
            )
        cells = [cell_text(value, f"{where}, {name}") for value in values[name].to_pylist()]
        feature = table.features.get(name, {})
        if pa.types.is_integer(kind) and feature.get("_type") == "ClassLabel":
            cells = _class_label_names(cells, feature.get("names"), f"{where}: the column {name!r}")
        elif is_number and name == "label":
            cells = [class_name(cell, classes) for cell in cells]
        columns[name] = cells
    return columns


def _class_label_names(numbers: Sequence[str], names: object, where: str) -> list[str]:
    """Names for the numbers of a ``ClassLabel``; -1 is no label, as in test splits that keep their labels back."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ManifestError(f"{where}: its classes have no list of names, as datasets writes it; write the file again")
    known = {str(i): name for i, name in enumerate(names)} | {"": "", "-1": ""}
    if unknown := sorted({number for number in numbers if number not in known}):
        raise ManifestError(f"{where}: expected numbers below {len(names)}, its classes, got {unknown[0]}")
    return [known[number] for number in numbers]
