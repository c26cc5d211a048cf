"""Read every image of a list once: decode it (:func:`index_images`), or compare its hash (:func:`verify_hashes`)."""

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from explain2me.errors import ImageError
from explain2me.images.decode import MAX_PIXELS, examine_file
from explain2me.images.listing import resolve
from explain2me.images.reading import check_hash
from explain2me.images.threads import in_order

QUARANTINE = pa.schema([(name, pa.string()) for name in ("image_id", "path", "stage", "kind", "message")])
CRASHED = "decoding this image killed its process twice; the images beside it decode"


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
    rows = table.to_pylist()

    def examine(position: int) -> tuple[int, int, str] | ImageError:
        row = rows[position]
        if position in crashing:
            return ImageError("crash", CRASHED)
        path = resolve(root, str(row["path"]))
        try:
            return examine_file(path, max_pixels=max_pixels, expected_sha256=row.get("expected_sha256"))
        except ImageError as error:
            return error

    results: list[tuple[int, int, str] | ImageError] = []
    with closing(in_order(examine, range(len(rows)), num_threads=num_threads, ahead=64)) as examined:
        for result in examined:
            results.append(result)
            if on_done is not None:
                on_done(len(results))
    return _split(table, rows, results)


def _split(
    table: pa.Table, rows: Sequence[dict[str, str | None]], results: Sequence[tuple[int, int, str] | ImageError]
) -> Indexed:
    """Usable rows with width, height and sha256; and the quarantine."""
    usable = {position: result for position, result in enumerate(results) if not isinstance(result, ImageError)}
    kept = table.select(["image_id", "path", "label", "source"]).take(pa.array(list(usable), pa.int64()))
    for column, name in enumerate(("width", "height", "sha256")):
        kind = pa.string() if name == "sha256" else pa.int32()
        kept = kept.append_column(name, pa.array([values[column] for values in usable.values()], kind))
    pairs = zip(rows, results, strict=True)
    refused = [_quarantined(row, error) for row, error in pairs if isinstance(error, ImageError)]
    return Indexed(kept, pa.Table.from_pylist(refused, schema=QUARANTINE))


def verify_hashes(
    table: pa.Table,
    root: Path,
    *,
    num_threads: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> pa.Table:
    """Read every file and compare it with its hash, without decoding it.

    Args:
        table: rows of :func:`list_images` with an expected_sha256 each, see :func:`require_hashes`.
        root: the folder to which the paths are relative.
        num_threads: that read; None: one for each processor core, at most 8.
        on_done: called in the caller's thread with the number of files done so far.

    Returns:
        The quarantine of files that are missing, unreadable or have other bytes, as :func:`index_images` returns it.
    """
    rows = table.to_pylist()

    def compare(row: dict[str, str]) -> ImageError | None:
        try:
            check_hash(resolve(root, row["path"]), row["expected_sha256"])
        except ImageError as error:
            return error
        return None

    bad: list[dict[str, str | None]] = []
    with closing(in_order(compare, rows, num_threads=num_threads, ahead=64)) as results:
        for position, error in enumerate(results):
            if error is not None:
                bad.append(_quarantined(rows[position], error))
            if on_done is not None:
                on_done(position + 1)
    return pa.Table.from_pylist(bad, schema=QUARANTINE)


def _quarantined(row: dict[str, str | None], error: ImageError) -> dict[str, str | None]:
    names = {"image_id": row["image_id"], "path": row["path"]}
    return names | {"stage": "index", "kind": error.kind, "message": error.message}
