"""One image as a row of text cells, before it becomes a row of a table: what every kind of list has in common.

Imports nothing heavy, so that a mistake in a manifest is reported at once.
"""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

from explain2me.errors import ManifestError

SUFFIXES = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff"))
COLUMNS = ("label", "source", "split", "image_id", "sha256")
"""Optional columns of every list, beside ``path``."""


class Row(NamedTuple):
    """One image: ``place`` in its list, for messages; ``cells`` by column, "" if empty; ``inner``: its path in a tar."""

    place: str
    cells: dict[str, str]
    inner: str = ""


def folder_labels(images: Sequence[Sequence[str]], where: str) -> tuple[list[str] | None, list[str]]:
    """(labels, sources) by the folders ``label/source/...`` of images, given by the parts of their paths.

    Without folders there are no labels; without a second one the source is the label.

    Raises:
        ManifestError: some images are in folders and others are not.
    """
    flat = ["/".join(parts) for parts in images if len(parts) == 1]
    if flat and len(flat) != len(images):
        raise ManifestError(
            f"{where}: expected every image in a folder of its label, got {len(flat)} beside them, "
            f"first {min(flat)!r}; move them into one"
        )
    if flat:
        return None, ["images"] * len(images)
    return [parts[0] for parts in images], [parts[1] if len(parts) > 2 else parts[0] for parts in images]


def check_names(columns: Sequence[str], where: str, known: Sequence[str]) -> None:
    """Refuse a column whose name is nearly a known one: a label column left unread costs every AUROC."""
    for name in known:
        near = [column for column in columns if difflib.SequenceMatcher(None, name, column.casefold()).ratio() >= 0.8]
        if name not in columns and near:
            raise ManifestError(f"{where}: the column {near[0]!r} is not read; did you mean {name!r}? rename it")
