"""The list of images: a manifest CSV, or a folder or container files imported to the same table. Opens no image."""

import csv
import difflib
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from explain2me.containers import container_of
from explain2me.decode import read_bytes
from explain2me.errors import ImageError, ManifestError, nearest
from explain2me.packed import Row, check_names, container_files, containers_beside, folder_labels, read_rows

LOOKED_FOR = 1000
"""Rows of a manifest of which :func:`missing_files` looks for the file; there may be millions, on a slow drive."""
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".dib", ".webp", ".tif", ".tiff"},
)


def list_images(
    source: Path, *, split: str | None = None, extra: Sequence[str] = (), classes: Sequence[str] | None = None
) -> pa.Table:
    """List the images of a manifest, a folder or container files, without opening any.

    A manifest is a CSV file (UTF-8) with a column ``path``, relative to the manifest or absolute, and optionally
    ``label``, ``source``, ``split``, ``image_id`` and ``sha256``; further columns are ignored. An optional column is
    filled in every row taken or in none. Paths and image_ids must be unique over the whole file, all splits
    included. A folder holds ``label/source/*.jpg`` (deeper folders belong to their source), ``label/*.jpg`` or,
    without labels, ``*.jpg``, and each of these below folders of the splits, ``split/label/source/*.jpg``, where splits are
    asked for; every name with an image suffix is taken, whatever it is, except hidden ones.

    Container files are WebDataset tars, Parquet or Arrow files, one or a folder of them without loose images, and what
    ``datasets`` saved to disk; :mod:`explain2me.packed` tells how they are read. The path of an image goes on behind
    that of its container (``a.tar/real/1.jpg``, ``a.parquet/00000017``); a CSV manifest may hold such paths as well.

    Args:
        source: the CSV file, the container file or the folder.
        split: take only the rows with this value in the column ``split``, or the subfolder of this name; None takes all.
        extra: further columns to read; null where empty, and throughout where absent.
        classes: labels in the order of the logits, for container files whose labels are numbers.

    Returns:
        Columns image_id, path, label, source (strings), sorted by image_id, so the order of lines and of directory
        listings has no influence. image_id is the path where the manifest has none: give one where paths are
        absolute, since noise is keyed by it. label is null throughout where labels are absent. source is the label
        where absent, ``"images"`` where both are. A manifest with ``sha256`` adds the column expected_sha256.
        The bytes of a name that is not UTF-8 are written ``\\xff``; :func:`resolve` understands them.

    Raises:
        ManifestError: the manifest, folder or container is missing or wrong; the message names the line or member.
    """
    containers = container_files(source, SUFFIXES)
    if containers:
        rows, ignored = read_rows(source, containers, extra=extra, classes=classes, suffixes=SUFFIXES)
        return _table_of(rows, repr(str(source)), split=split, extra=extra, ignored=ignored)
    if not _is_folder(source):
        return _list_manifest(source, split=split, extra=extra)
    table = _list_folder(source, split=split)
    for name in extra:
        table = table.append_column(name, pa.nulls(len(table), pa.string()))
    return table


def sample_images(table: pa.Table, sample: int | Mapping[str, int] | None, *, seed: int) -> pa.Table:
    """Draw images of each source without replacement; rows stay in their order.

    The draw depends on ``seed``, the source and its images alone, not on other sources (the paper, 4.1: 4,000 real
    images and 1,000 of each generator).

    Args:
        table: of :func:`list_images`.
        sample: images of each source, or by source (others are taken whole), or None: all.
        seed: of the draw.

    Raises:
        ManifestError: a source that is not there, or that has fewer images than asked for.
    """
    if sample is None:
        return table
    sources = table["source"].to_pylist()
    wanted = dict.fromkeys(sources, sample) if isinstance(sample, int) else dict(sample)
    kept = [i for i, source in enumerate(sources) if source not in wanted]
    for source, count in wanted.items():
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
    return source if _is_folder(source) else source.parent


def resolve(root: Path, path: str) -> Path:
    """The file that a row's ``path`` means: below ``root`` unless absolute, ``\\xff`` read as a byte where need be.

    >>> resolve(Path("faces"), "real/1.jpg").as_posix()
    'faces/real/1.jpg'
    """
    found = root / path
    if _ESCAPED.search(path.encode()) and not os.path.lexists(found):
        return root / os.fsdecode(_ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), path.encode()))
    return found


def num_ignored(table: pa.Table) -> int:
    """How many files of an imported folder or tar were left out, for their suffix or because they are hidden."""
    return int((table.schema.metadata or {}).get(b"ignored", b"0"))


def missing_files(source: Path, images: pa.Table) -> tuple[list[str], int]:
    """Paths of a CSV manifest where there is no file, of at most ``LOOKED_FOR`` rows spread evenly; and how many were looked for.

    Args:
        source: of :func:`list_images`; of a folder or container nothing is looked for, since they were just listed, nor inside the
            containers that a manifest names.
        images: of :func:`list_images`, all or some.
    """
    if _is_folder(source) or container_files(source, SUFFIXES):
        return [], 0
    paths, root = images["path"].to_pylist(), image_root(source)
    count = min(LOOKED_FOR, len(paths))
    some = [paths[i * len(paths) // count] for i in range(count)]
    files = [(path, resolve(root, path)) for path in some]
    return [path for path, file in files if not os.path.lexists(file) and container_of(file) is None], count


def check_labels(table: pa.Table, classes: Sequence[str]) -> None:
    """Raise :class:`ManifestError` when a label is not one of ``classes``; absent labels pass."""
    counts = Counter(table["label"].to_pylist())
    unknown = sorted(label for label in counts if label is not None and label not in classes)
    if unknown:
        label = unknown[0]
        path = table["path"][table["label"].to_pylist().index(label)].as_py()
        raise ManifestError(
            f"expected labels among the classes {sorted(classes)}, got the label {label!r} in {counts[label]} row(s), "
            f"first for the path {path!r}; {nearest(label, classes)}"
            + (f" (unknown as well: {unknown[1:6]})" if unknown[1:] else "")
        )


def require_hashes(table: pa.Table, source: Path) -> None:
    """Raise :class:`ManifestError` when a row of :func:`list_images` has no sha256 to compare its file with."""
    given = table["expected_sha256"] if "expected_sha256" in table.schema.names else pa.nulls(len(table), pa.string())
    if given.null_count:
        path = table["path"].filter(given.is_null())[0].as_py()
        raise ManifestError(
            f"{str(source)!r}: --verify-hashes needs the sha256 of every image, {given.null_count} of {len(table)} have none, "
            f"first {path!r}; give a manifest with a column 'sha256', 64 digits each, as `sha256sum` prints them for the "
            f"files while they are known to be whole"
        )


_ESCAPED = re.compile(rb"\\x([89a-f][0-9a-f])")  # what "backslashreplace" writes for a byte that is not UTF-8
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


def _list_manifest(manifest: Path, *, split: str | None, extra: Sequence[str]) -> pa.Table:
    where = repr(str(manifest))
    return _table_of(_read_rows(manifest, where, extra=extra), where, split=split, extra=extra)


def _table_of(rows: list[Row], where: str, *, split: str | None, extra: Sequence[str], ignored: int = 0) -> pa.Table:
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
    return _table(names, columns, ignored=ignored)


def _table(names: Sequence[str], columns: Sequence[Sequence[str | None]], *, ignored: int = 0) -> pa.Table:
    ids = columns[0]
    order = sorted(range(len(ids)), key=lambda position: str(ids[position]))
    arrays = [pa.array([column[position] for position in order], pa.string()) for column in columns]
    schema = pa.schema([(name, pa.string()) for name in names], metadata={"ignored": str(ignored)})
    return pa.Table.from_arrays(arrays, schema=schema)


def _read_rows(manifest: Path, where: str, *, extra: Sequence[str]) -> list[Row]:
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


def splits_of(source: Path) -> dict[str, int]:
    """Rows by split of a manifest or of container files; empty for a folder, and where no splits are said."""
    containers = container_files(source, SUFFIXES)
    if not containers and _is_folder(source):
        return {}
    rows = (
        read_rows(source, containers, extra=(), classes=None, suffixes=SUFFIXES)[0]
        if containers
        else _read_rows(source, repr(str(source)), extra=())
    )
    return dict(Counter(row.cells["split"] for row in rows)) if "split" in rows[0].cells else {}


def unread_containers(source: Path) -> list[str]:
    """Names of container files in a folder that is read as a folder of images; they are left out."""
    return containers_beside(source) if _is_folder(source) and not container_files(source, SUFFIXES) else []


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


def _list_folder(folder: Path, *, split: str | None) -> pa.Table:
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
    return _table(["image_id", "path", "label", "source"], columns, ignored=ignored)


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
            elif _is_folder(Path(entry.path)):
                to_do.append((entry.path, (*parts, name), above | {(status.st_dev, status.st_ino)}))
            else:
                ignored += 1
    return files, ignored


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # links in a circle, or a parent that may not be searched
        return False
