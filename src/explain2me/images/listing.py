"""The list of images of a run: one row an image, from a manifest, a folder or containers; opens no image."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from explain2me.errors import ManifestError
from explain2me.images.containers import container_files, container_of, containers_beside, read_rows
from explain2me.images.folder import SUFFIXES, is_folder, list_folder
from explain2me.images.manifest import ESCAPED, list_manifest, read_manifest_rows, read_table
from explain2me.text import nearest

LOOKED_FOR = 1000
"""Rows of a manifest of which :func:`missing_files` looks for the file; there may be millions, on a slow drive."""


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
    ``datasets`` saved to disk; :mod:`explain2me.images.containers` tells how they are read. The path of an image goes on behind
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
        return read_table(rows, repr(str(source)), split=split, extra=extra, ignored=ignored)
    if not is_folder(source):
        return list_manifest(source, split=split, extra=extra)
    table = list_folder(source, split=split)
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
    return source if is_folder(source) else source.parent


def resolve(root: Path, path: str) -> Path:
    """The file that a row's ``path`` means: below ``root`` unless absolute, ``\\xff`` read as a byte where need be.

    >>> resolve(Path("faces"), "real/1.jpg").as_posix()
    'faces/real/1.jpg'
    """
    found = root / path
    if ESCAPED.search(path.encode()) and not os.path.lexists(found):
        return root / os.fsdecode(ESCAPED.sub(lambda match: bytes([int(match[1], 16)]), path.encode()))
    return found


def missing_files(source: Path, images: pa.Table) -> tuple[list[str], int]:
    """Paths of a CSV manifest where there is no file, of at most ``LOOKED_FOR`` rows spread evenly; and how many were looked for.

    Args:
        source: of :func:`list_images`; of a folder or container nothing is looked for, since they were just listed, nor inside the
            containers that a manifest names.
        images: of :func:`list_images`, all or some.
    """
    if is_folder(source) or container_files(source, SUFFIXES):
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


def splits_of(source: Path) -> dict[str, int]:
    """Rows by split of a manifest or of container files; empty for a folder, and where no splits are said."""
    containers = container_files(source, SUFFIXES)
    if not containers and is_folder(source):
        return {}
    rows = (
        read_rows(source, containers, extra=(), classes=None, suffixes=SUFFIXES)[0]
        if containers
        else read_manifest_rows(source, repr(str(source)), extra=())
    )
    return dict(Counter(row.cells["split"] for row in rows)) if "split" in rows[0].cells else {}


def unread_containers(source: Path) -> list[str]:
    """Names of container files in a folder that is read as a folder of images; they are left out."""
    return containers_beside(source) if is_folder(source) and not container_files(source, SUFFIXES) else []
