"""The list of images of a run, one row per image. Opens no image.

pyarrow is imported when the list becomes a table: a mistake in a manifest or folder is reported without it.
"""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from explain2me.errors import ManifestError
from explain2me.images.containers import container_files, container_of, is_container_name, read_rows
from explain2me.images.folder import is_folder, walk_folder
from explain2me.images.manifest import read_manifest_rows
from explain2me.images.rows import SUFFIXES, Row, folder_labels
from explain2me.text import nearest

if TYPE_CHECKING:
    import pyarrow as pa

LOOKED_FOR = 1000
"""Rows of a manifest whose files :func:`missing_files` looks for; there may be millions, on a slow drive."""
ESCAPED = re.compile(rb"\\x([89a-f][0-9a-f])")
"""A byte that is not UTF-8, as "backslashreplace" writes it."""
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")

Columns = dict[str, list[str | None]]


class Listing(NamedTuple):
    """The images of a manifest, a folder or container files.

    ``columns``: of equal length, sorted by image_id, see :func:`list_images`. ``splits``: number of rows of each split,
    before one was chosen; empty where there are none. ``num_ignored``: files or members that are no images.
    ``containers_left_out``: container files in a folder that was read as a folder of images.
    """

    columns: Columns
    splits: Mapping[str, int] = {}
    num_ignored: int = 0
    containers_left_out: Sequence[str] = ()

    def table(self) -> "pa.Table":
        """The columns as a table of strings."""
        import pyarrow as pa

        return pa.table({name: pa.array(values, pa.string()) for name, values in self.columns.items()})


def list_images(
    source: Path, *, split: str | None = None, extra: Sequence[str] = (), classes: Sequence[str] | None = None
) -> "pa.Table":
    """List the images of a manifest, a folder or container files, without opening any.

    - A manifest is a CSV file (UTF-8) with a column ``path``, relative to the manifest or absolute, and optionally
      ``label``, ``source``, ``split``, ``image_id`` and ``sha256``, each filled in every row taken or in none. Paths and
      image_ids must be unique over all splits. Further columns are ignored.
    - A folder holds ``label/source/*.jpg`` (deeper folders belong to their source), ``label/*.jpg`` or, without labels,
      ``*.jpg``, each below a folder of its split where a split is asked for. Hidden files are left out.
    - Container files are WebDataset tars, Parquet or Arrow files, and what ``datasets`` saved to disk, see
      :mod:`explain2me.images.containers`. The path of an image continues behind that of its container
      (``a.tar/real/1.jpg``, ``a.parquet/00000017``); a CSV manifest may hold such paths, too.

    Args:
        source: the CSV file, the container file or the folder.
        split: take only the rows with this value in the column ``split``, or the subfolder of this name; None takes all.
        extra: further columns to read; null where empty, and throughout where absent.
        classes: labels in the order of the logits, for container files whose labels are numbers.

    Returns:
        Columns image_id, path, label, source (strings), sorted by image_id, and expected_sha256 where a manifest has
        ``sha256``. image_id is the path where the manifest has none: give one where paths are absolute, since noise is
        keyed by it. label is null throughout where labels are absent. source is the label where absent, ``"images"``
        where both are. The bytes of a name that is not UTF-8 are written ``\\xff``; :func:`resolve` understands them.

    Raises:
        ManifestError: the manifest, folder or container is missing or wrong; the message names the line or member.
    """
    return list_source(source, split=split, extra=extra, classes=classes).table()


def list_source(
    source: Path, *, split: str | None = None, extra: Sequence[str] = (), classes: Sequence[str] | None = None
) -> Listing:
    """As :func:`list_images`, with what else was seen on the way. Every folder is walked once, every file read once."""
    if is_folder(source):
        saved_by_datasets = (source / "dataset_dict.json").exists() or (source / "state.json").exists()
        listing = None if saved_by_datasets else _list_images_below(source, split, extra)
        if listing:
            return listing
    if is_folder(source) or is_container_name(source.name):
        containers = container_files(source)
        if not containers:
            raise _no_images(source, split)
        rows, num_ignored = read_rows(source, containers, extra=extra, classes=classes)
    else:
        rows, num_ignored = read_manifest_rows(source, extra=extra), 0
    return _listing_of_rows(rows, repr(str(source)), split=split, extra=extra)._replace(num_ignored=num_ignored)


def _list_images_below(folder: Path, split: str | None, extra: Sequence[str]) -> Listing | None:
    """The images of a folder, or of the subfolder of a split; None where it holds none."""
    top = folder
    if split is not None:
        if split[:1] in ("", ".") or "/" in split or not is_folder(folder / split):
            return None
        top = folder / split
    files = walk_folder(top)
    if not files.images:
        return None
    paths = ["/".join(parts if split is None else (split, *parts)) for parts in files.images]
    labels, sources = folder_labels(files.images, repr(str(top)))
    columns = _columns(paths, labels, sources) | {name: [None] * len(paths) for name in extra}
    _refuse_look_alikes(columns, repr(str(top)))
    return Listing(_sorted_by_id(columns), {}, files.num_ignored, files.containers if split is None else ())


def _no_images(folder: Path, split: str | None) -> ManifestError:
    """What is wrong with a folder in which neither images nor container files were found."""
    if split is not None:
        try:
            known = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
        except OSError as error:
            return ManifestError(f"{str(folder)!r}: the folder cannot be read ({error.strerror})")
        if split not in known and known:
            return ManifestError(
                f"{str(folder)!r}: there is no folder of the split {split!r}; {nearest(split, known)}; expected "
                f"{split}/label/source/*.jpg, or give a manifest"
            )
        folder = folder / split if known else folder
    return ManifestError(
        f"{str(folder)!r}: expected images as label/source/*.jpg, label/*.jpg or *.jpg, got none "
        f"({walk_folder(folder).num_ignored} other files); the suffixes read are {', '.join(sorted(SUFFIXES))}"
    )


def _columns(
    paths: list[str], labels: list[str] | None, sources: list[str] | None, ids: list[str] | None = None
) -> Columns:
    sources = sources or labels or ["images"] * len(paths)
    return {
        "image_id": [*(ids or paths)],
        "path": [*paths],
        "label": [*labels] if labels else [None] * len(paths),
        "source": [*sources],
    }


def _listing_of_rows(rows: Sequence[Row], where: str, *, split: str | None, extra: Sequence[str]) -> Listing:
    """Rows of a manifest or of containers, checked: paths and ids are unique, columns are filled or empty."""
    if _filled(rows, "path", where) is None:
        raise ManifestError(f"{where}: the column 'path' is empty in every row; fill it")
    _check_unique(rows, "path", where, key=os.path.normpath)
    _check_unique(rows, "image_id", where, key=str)
    splits = Counter(row.cells["split"] for row in rows) if "split" in rows[0].cells else {}
    rows = _rows_of_split(rows, split, where)
    paths = [row.cells["path"] for row in rows]
    columns = _columns(paths, *(_filled(rows, name, where) for name in ("label", "source", "image_id")))
    _refuse_look_alikes(columns, where)
    if any(row.cells.get("sha256", "").strip() for row in rows):
        columns["expected_sha256"] = [_expected_sha256(row, where) for row in rows]
    columns |= {name: [row.cells.get(name, "").strip() or None for row in rows] for name in extra}
    return Listing(_sorted_by_id(columns), splits)


def _refuse_look_alikes(columns: Columns, where: str) -> None:
    """Refuse labels or sources that look the same and would count as two."""
    for column in ("label", "source"):
        seen: dict[str, str] = {}
        for name in sorted({name for name in columns[column] if name is not None}):
            first = seen.setdefault(_visible(name), name)
            if first != name:
                raise ManifestError(
                    f"{where}: the {column}s {first!a} and {name!a} look the same but count as two; write one of "
                    f"them throughout"
                )


def _visible(name: str) -> str:
    """What can be seen of a name.

    >>> _visible("real\N{ZERO WIDTH SPACE} \N{NO-BREAK SPACE}"), _visible("re\N{COMBINING ACUTE ACCENT}al")
    ('real', 'réal')
    """
    composed = unicodedata.normalize("NFC", name)
    return " ".join("".join(sign for sign in composed if unicodedata.category(sign) != "Cf").split())


def _sorted_by_id(columns: Columns) -> Columns:
    ids = columns["image_id"]
    order = sorted(range(len(ids)), key=lambda position: str(ids[position]))
    return {name: [values[position] for position in order] for name, values in columns.items()}


def _check_unique(rows: Sequence[Row], column: str, where: str, *, key: Callable[[str], str]) -> None:
    seen: dict[str, str] = {}
    for row in rows:
        cell = row.cells.get(column, "")
        if cell.strip() and (first := seen.setdefault(key(cell), row.place)) != row.place:
            raise ManifestError(f"{where} {row.place}: the {column} {cell!r} is on {first} already; keep one of them")


def _rows_of_split(rows: Sequence[Row], split: str | None, where: str) -> Sequence[Row]:
    if split is None:
        return rows
    if "split" not in rows[0].cells:
        raise ManifestError(
            f"{where}: the split {split!r} was asked, but there is no column 'split' in {list(rows[0].cells)}"
        )
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


def sample_images(table: "pa.Table", sample: int | Mapping[str, int] | None, *, seed: int) -> "pa.Table":
    """Draw images of each source without replacement; rows stay in their order.

    The draw depends on ``seed``, the source and its images alone, not on other sources (the paper, 4.1: 4,000 real
    images and 1,000 of each generator).

    Args:
        table: of :func:`list_images`.
        sample: images of each source, or by source (others are taken whole), or None: all.
        seed: of the draw.

    Raises:
        ManifestError: a source is absent, or has fewer images than asked for.
    """
    if sample is None:
        return table
    import numpy as np

    sources = table["source"].to_pylist()
    sizes = dict.fromkeys(sources, sample) if isinstance(sample, int) else dict(sample)
    kept = [i for i, source in enumerate(sources) if source not in sizes]
    for source, count in sizes.items():
        rows = [i for i, other in enumerate(sources) if other == source]
        if not rows:
            raise ManifestError(f"sample: there is no source {source!r}; {nearest(source, sorted(set(sources)))}")
        if len(rows) < count:
            raise ManifestError(
                f"sample: expected at least {count} images of the source {source!r}, got {len(rows)}; ask for fewer, or give "
                f"a number for each larger source (others are taken whole), such as sample = {{{source} = {len(rows)}}}"
            )
        key = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big")
        drawn = np.random.default_rng([seed, key]).choice(len(rows), count, replace=False)
        kept += [rows[i] for i in drawn]
    return table.take(sorted(kept))


def image_root(source: Path) -> Path:
    """The folder to which the paths of :func:`list_images` are relative."""
    return source if is_folder(source) else source.parent


def resolve(root: Path, path: str) -> Path:
    """The file that a row's ``path`` means: below ``root`` unless absolute, ``\\xff`` read as a byte where need be.

    >>> resolve(Path("faces"), "real/1.jpg").as_posix()
    'faces/real/1.jpg'
    """
    file = root / path
    if ESCAPED.search(path.encode()) and not os.path.lexists(file):
        return root / os.fsdecode(ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), path.encode()))
    return file


def missing_files(source: Path, images: "pa.Table") -> tuple[list[str], int]:
    """Paths of a CSV manifest without a file, of at most ``LOOKED_FOR`` rows spread evenly; and how many were looked for.

    Nothing is looked for in a folder or container, which was just listed, nor inside the containers that a manifest names.
    """
    if is_folder(source) or is_container_name(source.name):
        return [], 0
    paths, root = images["path"].to_pylist(), image_root(source)
    count = min(LOOKED_FOR, len(paths))
    some = [paths[i * len(paths) // count] for i in range(count)]
    files = [(path, resolve(root, path)) for path in some]
    return [path for path, file in files if not os.path.lexists(file) and container_of(file) is None], count


def check_labels(table: "pa.Table", classes: Sequence[str]) -> None:
    """Raise :class:`ManifestError` when a label is not one of ``classes``; absent labels pass."""
    counts = Counter(table["label"].to_pylist())
    if unknown := sorted(label for label in counts if label is not None and label not in classes):
        label = unknown[0]
        path = table["path"][table["label"].to_pylist().index(label)].as_py()
        raise ManifestError(
            f"expected labels among the classes {sorted(classes)}, got the label {label!r} in {counts[label]} row(s), "
            f"first for the path {path!r}; {nearest(label, classes)}"
            + (f" (unknown as well: {unknown[1:6]})" if unknown[1:] else "")
        )


def require_hashes(table: "pa.Table", source: Path) -> None:
    """Raise :class:`ManifestError` when a row of :func:`list_images` has no sha256 to compare its file with."""
    given = table["expected_sha256"].to_pylist() if "expected_sha256" in table.schema.names else [None] * len(table)
    if None in given:
        path = table["path"][given.index(None)].as_py()
        raise ManifestError(
            f"{str(source)!r}: --verify-hashes needs the sha256 of every image, {given.count(None)} of {len(table)} have none, "
            f"first {path!r}; give a manifest with a column 'sha256', 64 digits each, as `sha256sum` prints them for the "
            f"files while they are known to be whole"
        )
