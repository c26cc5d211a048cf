"""Read every image of a list once: decode it (:func:`index_images`), or compare its hash (:func:`verify_hashes`)."""

from collections.abc import Callable, Collection, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from explain2me.errors import ImageError, ManifestError
from explain2me.images.decode import MAX_PIXELS, examine_file
from explain2me.images.listing import resolve
from explain2me.images.reading import check_hash
from explain2me.images.threads import in_order

REFUSED = pa.schema([(name, pa.string()) for name in ("image_id", "path", "stage", "kind", "message")])
CRASHED = "decoding this image killed its process twice; the images beside it decode"

Result = TypeVar("Result")
Row = dict[str, Any]


class Indexed(NamedTuple):
    """Result of :func:`index_images`; both tables keep the order of the rows given."""

    usable: pa.Table
    quarantine: pa.Table


def index_images(
    table: pa.Table,
    root: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    crashing: Collection[int] = (),
    num_threads: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Indexed:
    """Read and decode every image once; bad ones go to the quarantine.

    Args:
        table: rows of :func:`list_images`; with a column expected_sha256 the bytes are compared before decoding.
        root: the folder to which the paths are relative, see :func:`image_root`.
        max_pixels: images with more pixels are not decoded.
        crashing: rows that are not opened, because they kill the process; their kind is ``crash``.
        num_threads: that decode; None: one for each processor core, at most 8.
        on_done: called in the caller's thread with the number of images done so far.

    Returns:
        usable: image_id, path, label, source, width, height (pixels, upright), sha256 (of the file's bytes).
        quarantine: image_id, path, stage ("index"), kind, message; see :mod:`explain2me.images.decode`.
    """

    def examine(item: tuple[int, Row]) -> tuple[int, int, str]:
        position, row = item
        if position in crashing:
            raise ImageError("crash", CRASHED)
        path = resolve(root, row["path"])
        return examine_file(path, max_pixels=max_pixels, expected_sha256=row.get("expected_sha256"))

    results = _read_all(table, examine, num_threads, on_done)
    usable = {position: result for position, result in enumerate(results) if not isinstance(result, ImageError)}
    kept = table.select(["image_id", "path", "label", "source"]).take(pa.array(list(usable), pa.int64()))
    for column, (name, kind) in enumerate((("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()))):
        kept = kept.append_column(name, pa.array([values[column] for values in usable.values()], kind))
    return Indexed(kept, _refused(table, results))


def refuse_contradictions(images: pa.Table, where: str) -> None:
    """Raise ManifestError where images with the same bytes have different labels.

    Args:
        images: with the columns path, label and sha256.
        where: they are listed, for the message.
    """
    labels, paths = images["label"].to_pylist(), images["path"].to_pylist()
    for rows in copies(images):
        other = next((row for row in rows if labels[row] != labels[rows[0]]), None)
        if other is not None:
            raise ManifestError(
                f"{where}: {paths[rows[0]]!r} and {paths[other]!r} are the same picture with the labels {labels[rows[0]]!r} and "
                f"{labels[other]!r}; keep the right one"
            )


def copies_warning(images: pa.Table) -> str | None:
    """One line about images with the same bytes; None where there are none. ``images`` as of :func:`copies`, with path."""
    groups = copies(images)
    if not groups:
        return None
    first, second = (images["path"][row].as_py() for row in groups[0][:2])
    count = sum(len(rows) - 1 for rows in groups)
    which = "image is a copy" if count == 1 else "images are copies"
    return (
        f"{count} {which} of another one, byte for byte, first {second!r} of {first!r}: each counts as an image of its own, "
        f"and intervals are too narrow"
    )


def copies(images: pa.Table) -> list[list[int]]:
    """The rows of images with the same bytes, in groups of two and more; by the column sha256."""
    groups: dict[str, list[int]] = {}
    for row, sha256 in enumerate(images["sha256"].to_pylist()):
        groups.setdefault(sha256, []).append(row)
    return [rows for rows in groups.values() if len(rows) > 1]


def verify_hashes(
    table: pa.Table, root: Path, *, num_threads: int | None = None, on_done: Callable[[int], None] | None = None
) -> pa.Table:
    """Read every file and compare it with its expected_sha256, without decoding it; arguments as :func:`index_images`.

    Returns:
        The quarantine of files that are missing, unreadable or have other bytes, as :func:`index_images` returns it.
    """

    def compare(item: tuple[int, Row]) -> None:
        check_hash(resolve(root, item[1]["path"]), item[1]["expected_sha256"])

    return _refused(table, _read_all(table, compare, num_threads, on_done))


def _read_all(
    table: pa.Table,
    function: Callable[[tuple[int, Row]], Result],
    num_threads: int | None,
    on_done: Callable[[int], None] | None,
) -> list[Result | ImageError]:
    results: list[Result | ImageError] = []
    with closing(in_order(function, enumerate(table.to_pylist()), num_threads=num_threads, ahead=64)) as examined:
        for result in examined:
            results.append(result)
            if on_done is not None:
                on_done(len(results))
    return results


def _refused(table: pa.Table, results: Iterable[object]) -> pa.Table:
    pairs = zip(table.select(["image_id", "path"]).to_pylist(), results, strict=True)
    refused = [
        row | {"stage": "index", "kind": result.kind, "message": result.message}
        for row, result in pairs
        if isinstance(result, ImageError)
    ]
    return pa.Table.from_pylist(refused, schema=REFUSED)
