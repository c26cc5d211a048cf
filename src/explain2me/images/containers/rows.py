"""The rows that container files give: one row an image, with the cells that a line of a CSV manifest would have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from explain2me.errors import ManifestError
from explain2me.images.rows import Row, folder_labels
from explain2me.text import number_text


class Container(NamedTuple):
    """A container file; ``name``: its path below the folder of the data set; ``split``: "" where none is known."""

    path: Path
    name: str
    split: str


def as_text(name: bytes) -> str:
    """The name of a file or member as text; bytes that are not UTF-8 are written ``\\xff``."""
    return name.decode("utf-8", "backslashreplace")


def cell_text(value: object, where: str) -> str:
    """The cell as a CSV file would hold it; None is an empty cell."""
    text = (value or "") if value is None or isinstance(value, str) else number_text(value)
    if text is None:
        got = value if isinstance(value, float) else f"a {type(value).__name__}"
        raise ManifestError(f"{where}: expected text, a whole number, true or false, got {got}; write it as text")
    return text


def class_name(text: str, classes: Sequence[str] | None) -> str:
    """The class at the place that a number gives; the text itself where it names a class or gives no place.

    >>> class_name("1", ["real", "fake"]), class_name("1", ["1", "0"]), class_name("7", ["real", "fake"])
    ('fake', '1', '7')
    """
    if classes is None or text in classes or not (text.isascii() and text.isdigit()):
        return text
    return classes[int(text)] if int(text) < len(classes) else text


def json_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object that may be hostile."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: no valid JSON ({type(error).__name__}); expected an object {{...}}") from error
    if not isinstance(tree, dict):
        raise ManifestError(f"{where}: expected a JSON object {{...}}, got a {type(tree).__name__}")
    return tree


def label_by_folders(rows: Sequence[Row], where: str) -> None:
    """Fill in the labels of a tar from its folders where no member says any; the sources likewise."""
    if not all(row.inner and not row.cells["label"] for row in rows):
        return
    labels, sources = folder_labels([row.inner.split("/") for row in rows], where)
    without_sources = not any(row.cells["source"] for row in rows)
    for i, row in enumerate(rows):
        row.cells["label"] = labels[i] if labels else ""
        if without_sources:
            row.cells["source"] = sources[i]
