"""A folder of images: each subfolder a label, or a label and a source."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from explain2me.errors import ManifestError
from explain2me.images.containers import folder_labels
from explain2me.images.manifest import rows_to_table
from explain2me.text import nearest

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff"},
)


def num_ignored(table: pa.Table) -> int:
    """How many files of an imported folder or tar were left out, for their suffix or because they are hidden."""
    return int((table.schema.metadata or {}).get(b"ignored", b"0"))


def list_folder(folder: Path, *, split: str | None) -> pa.Table:
    """Rows of the images below a folder: label and source come from its subfolders."""
    top = folder if split is None else _split_folder(folder, split)
    where = repr(str(top))
    files, ignored = _image_files(top)
    if not files:
        raise ManifestError(
            f"{where}: expected images as label/source/*.jpg, label/*.jpg or *.jpg, got none ({ignored} other files); "
            f"the suffixes read are {', '.join(sorted(SUFFIXES))}"
        )
    paths = ["/".join(parts if split is None else (split, *parts)) for parts in files]
    repeated = [path for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise ManifestError(f"{where}: two files are written {repeated[0]!r}; rename the one that is not UTF-8")
    labels, sources = folder_labels(files, where)
    columns: list[Sequence[str | None]] = [paths, paths, labels or [None] * len(paths), sources]
    return rows_to_table(["image_id", "path", "label", "source"], columns, ignored=ignored)


def _split_folder(folder: Path, split: str) -> Path:
    """Where a folder keeps the images of a split."""
    try:
        known = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise ManifestError(f"{str(folder)!r}: the folder cannot be read ({error.strerror})") from error
    if split not in known:
        raise ManifestError(
            f"{str(folder)!r}: there is no folder of the split {split!r}; {nearest(split, known)}; expected "
            f"{split}/label/source/*.jpg, or give a manifest"
        )
    return folder / split


def _image_files(folder: Path) -> tuple[list[tuple[str, ...]], int]:
    """Parts of the path of each image below ``folder``, and how many other files there are. Links are followed."""
    files: list[tuple[str, ...]] = []
    ignored = 0
    to_do: list[tuple[str, tuple[str, ...], frozenset[tuple[int, int]]]] = [(str(folder), (), frozenset())]
    while to_do:
        path, parts, above = to_do.pop()
        try:
            status = Path(path).stat()
            if (status.st_dev, status.st_ino) in above:  # a link to a folder above: a circle
                continue
            entries = list(os.scandir(path))
        except OSError as error:
            raise ManifestError(
                f"{str(path)!r}: the folder cannot be read ({error.strerror}); allow it or leave it out"
            ) from error
        for entry in entries:
            name = os.fsencode(entry.name).decode("utf-8", "backslashreplace")
            if entry.name.startswith("."):
                ignored += 1
            elif Path(entry.name).suffix.lower() in SUFFIXES:
                files.append((*parts, name))
            elif is_folder(Path(entry.path)):
                to_do.append((entry.path, (*parts, name), above | {(status.st_dev, status.st_ino)}))
            else:
                ignored += 1
    return files, ignored


def is_folder(path: Path) -> bool:
    """Whether a path is a folder that can be reached."""
    try:
        return path.is_dir()
    except OSError:  # links in a circle, or a parent that may not be searched
        return False
