"""Images: a list of files in, checked rows and batches of pixels out, read ahead in threads.

::

    list_images    manifest or folder -> table of rows, sorted by image_id; no image is opened (manifest.py)
    index_images   every file read and fully decoded once -> usable rows, quarantine
    verify_hashes  every file read and compared to the sha256 of its row; nothing is decoded
    batches        files -> uint8 batches, decoded ahead in threads
"""

import os
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import UInt8
from torch import Tensor

from explain2me.decode import MAX_PIXELS, check_hash, check_size, examine_file, load_array
from explain2me.errors import ImageError
from explain2me.manifest import resolve

QUARANTINE = pa.schema([(name, pa.string()) for name in ("image_id", "path", "stage", "kind", "message")])
CRASHED = "the process that read this image ended, twice, and not at the images beside it"
Item = TypeVar("Item")
Result = TypeVar("Result")


class Indexed(NamedTuple):
    """What :func:`index_images` found; both tables keep the order of the rows given."""

    usable: pa.Table
    quarantine: pa.Table


class Failure(NamedTuple):
    """One image of a batch that could not be used."""

    position: int
    error: ImageError


class Batch(NamedTuple):
    """Decoded images and where they stand in the list of paths; failed ones are left out of the first two."""

    positions: list[int]
    images: UInt8[Tensor, "n 3 H W"]
    failures: list[Failure]


def index_images(
    table: pa.Table,
    root: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    crashing: Collection[int] = (),
    num_threads: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Indexed:
    """Read and fully decode every image once; bad ones go to the quarantine, the others go on.

    Args:
        table: rows of :func:`list_images`; with a column expected_sha256 the bytes are compared before decoding.
        root: the folder to which the paths are relative, see :func:`image_root`.
        max_pixels: images with more pixels are not decoded.
        crashing: rows that are not opened, because processes have ended at them; their kind is ``crash``.
        num_threads: decoding threads; None takes one for each processor core, at most 8.
        on_done: called in the caller's thread with the number of images done so far.

    Returns:
        usable: image_id, path, label, source, width, height (pixels, upright), sha256 (of the file's bytes).
        quarantine: image_id, path, stage ("index"), kind, message; see :mod:`explain2me.decode`.
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

    found: list[tuple[int, int, str]] = []
    usable: list[int] = []
    bad: list[dict[str, str | None]] = []
    with closing(_in_order(examine, range(len(rows)), num_threads=num_threads, ahead=64)) as results:
        for position, result in enumerate(results):
            if isinstance(result, ImageError):
                bad.append(_quarantined(rows[position], result))
            else:
                usable.append(position)
                found.append(result)
            if on_done is not None:
                on_done(position + 1)
    kept = table.select(["image_id", "path", "label", "source"]).take(pa.array(usable, pa.int64()))
    for column, name in enumerate(("width", "height", "sha256")):
        kind = pa.string() if name == "sha256" else pa.int32()
        kept = kept.append_column(name, pa.array([values[column] for values in found], kind))
    return Indexed(kept, pa.Table.from_pylist(bad, schema=QUARANTINE))


def verify_hashes(
    table: pa.Table,
    root: Path,
    *,
    num_threads: int | None = None,
    on_done: Callable[[int], None] | None = None,
) -> pa.Table:
    """Read every file and compare it to its hash; nothing is decoded.

    Args:
        table: rows of :func:`list_images` with an expected_sha256 each, see :func:`require_hashes`.
        root: the folder to which the paths are relative.
        num_threads: reading threads; None takes one for each processor core, at most 8.
        on_done: called in the caller's thread with the number of files done so far.

    Returns:
        The quarantine that :func:`index_images` would give for files that are missing, unreadable or of other bytes.
    """
    rows = table.to_pylist()

    def compare(row: dict[str, str]) -> ImageError | None:
        try:
            check_hash(resolve(root, row["path"]), row["expected_sha256"])
        except ImageError as error:
            return error
        return None

    bad: list[dict[str, str | None]] = []
    with closing(_in_order(compare, rows, num_threads=num_threads, ahead=64)) as results:
        for position, error in enumerate(results):
            if error is not None:
                bad.append(_quarantined(rows[position], error))
            if on_done is not None:
                on_done(position + 1)
    return pa.Table.from_pylist(bad, schema=QUARANTINE)


def _quarantined(row: dict[str, str | None], error: ImageError) -> dict[str, str | None]:
    names = {"image_id": row["image_id"], "path": row["path"]}
    return names | {"stage": "index", "kind": error.kind, "message": error.message}


def _in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int | None, ahead: int
) -> Generator[Result, None, None]:
    """Map in threads; results come in the order of the items, at most ``ahead`` of which are under way."""
    pool = ThreadPoolExecutor(num_threads or min(8, _num_cores()), thread_name_prefix="explain2me-images")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ----------------------------------------------------------------------------------------------------------- batches


def batches(
    paths: Sequence[Path],
    *,
    size: tuple[int, int],
    batch_size: int,
    interpolation: str = "bilinear",
    max_pixels: int = MAX_PIXELS,
    expected_sha256: Sequence[str | None] | None = None,
    crashing: Collection[int] = (),
    num_threads: int | None = None,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Decode ``paths`` in order, ``batch_size`` positions a batch; ``prefetch`` batches are decoded ahead in threads.

    Batch i covers the positions i * batch_size and following whatever fails in it, so a bad image moves no border;
    a batch may be empty. Memory does not grow with the number of paths. The threads end with the generator: when it is
    exhausted, closed or dropped, and when the consumer raises.

    Args:
        paths: the files, see :func:`resolve`.
        size: height and width in pixels of the images given.
        batch_size: positions a batch; the last batch holds the rest.
        interpolation: one of :data:`INTERPOLATIONS`.
        max_pixels: images with more pixels fail.
        expected_sha256: per path; other bytes fail as ``hash_mismatch``, so a file swapped after the index is noticed.
        crashing: positions that are not opened, because processes have ended at them; they fail as ``crash``.
        num_threads: decoding threads; None takes one for each processor core, at most 8.
        prefetch: batches decoded ahead of the one in use, at least 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_size(size, interpolation)
    if batch_size < 1 or prefetch < 1:
        raise ValueError(f"expected batch_size and prefetch of at least 1, got {batch_size} and {prefetch}")
    if expected_sha256 is not None and len(expected_sha256) != len(paths):
        raise ValueError(f"expected one sha256 per path, got {len(expected_sha256)} for {len(paths)} paths")

    def load(position: int) -> UInt8[np.ndarray, "3 H W"] | ImageError:
        if position in crashing:
            return ImageError("crash", CRASHED)
        sha256 = None if expected_sha256 is None else expected_sha256[position]
        try:
            return load_array(paths[position], size, interpolation, max_pixels=max_pixels, expected_sha256=sha256)
        except ImageError as error:
            return error

    results = _in_order(load, range(len(paths)), num_threads=num_threads, ahead=prefetch * batch_size)
    return _grouped(results, num_images=len(paths), size=size, batch_size=batch_size)


def _grouped(
    results: Generator[UInt8[np.ndarray, "3 H W"] | ImageError, None, None],
    *,
    num_images: int,
    size: tuple[int, int],
    batch_size: int,
) -> Generator[Batch, None, None]:
    with closing(results):
        for start in range(0, num_images, batch_size):
            part = list(enumerate(islice(results, batch_size), start))
            images = [(position, result) for position, result in part if not isinstance(result, ImageError)]
            stacked = np.stack([image for _, image in images]) if images else np.empty((0, 3, *size), np.uint8)
            failures = [Failure(position, result) for position, result in part if isinstance(result, ImageError)]
            yield Batch([position for position, _ in images], torch.from_numpy(stacked), failures)
