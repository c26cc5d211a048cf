"""Before stage 1: read and decode every image once, in chunks that are committed like shards."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from explain2me.config.compare import digest
from explain2me.errors import RunFolderError
from explain2me.images.examine import REFUSED, Indexed, index_images
from explain2me.images.listing import image_root
from explain2me.run.files import write_parquet
from explain2me.run.packs import read_parquet
from explain2me.workers import Engine, report_progress
from explain2me.workers.crash_search import Attempt, Task, run_despite_crashes

CHUNK = 512
"""Images in a chunk: seconds of work, which a stop loses."""
PARTS = "index"
"""Folder of the finished chunks; removed when images.parquet holds their rows."""
CHUNK_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("image_id", "path", "label", "source")]
    + [("width", pa.int32()), ("height", pa.int32())]
    + [(name, pa.string()) for name in ("sha256", "kind", "message")]
)


@dataclass(frozen=True)
class IndexChunk:
    """Rows ``start`` to ``stop`` of the manifest."""

    number: int
    start: int
    stop: int
    key: str
    rows: pa.Table = field(compare=False, repr=False)

    @property
    def title(self) -> str:
        """File name that no other chunk of the run has."""
        return f"part-{self.number:05d}-{self.key}.parquet"

    def path(self, folder: Path) -> Path:
        """Where the chunk is committed."""
        return folder / PARTS / self.title

    def crashes(self, folder: Path) -> Path:
        """File of the rows that kill processes."""
        return folder / PARTS / f"crash-{self.title}"


def index_run(
    images: pa.Table,
    source: Path,
    folder: Path,
    engine: Engine,
    *,
    max_pixels: int,
    share: tuple[int, int] = (0, 1),
    on_done: Callable[[int, int], None] | None = None,
) -> Indexed | None:
    """Read every image of a run once and return the rows; None if another machine has written run.json meanwhile.

    Several machines may do this in one folder: each starts at another chunk and skips the finished ones. An image that
    kills the process that decodes it goes to the quarantine, see :mod:`explain2me.workers.crash_search`.

    Args:
        images: of :func:`explain2me.images.listing.list_images`.
        source: the manifest or folder.
        folder: of the run.
        engine: reads the chunks; a single chunk is read in this process.
        max_pixels: larger images are not decoded.
        share: (i, N), the first chunk to read.
        on_done: called with the number of images read, and of all images.
    """
    key = [str(source.resolve()), max_pixels]  # the same names elsewhere are other images
    chunks = [
        IndexChunk(number, start, start + len(rows), digest([key, rows.to_pylist()]), rows)
        for number, start in enumerate(range(0, len(images), CHUNK))
        for rows in [images.take(list(range(start, min(start + CHUNK, len(images)))))]
    ]
    first = share[0] * len(chunks) // share[1]
    read_chunk = functools.partial(_read_chunk, folder, image_root(source), max_pixels)

    def read() -> Indexed | None:
        try:
            _read_missing(chunks[first:] + chunks[:first], folder, engine, read_chunk, on_done)
            return _joined([read_parquet(chunk.path(folder)) for chunk in chunks])
        except (RunFolderError, FileNotFoundError):
            if (folder / "run.json").exists():  # its writer has removed the chunks
                return None
            raise

    try:
        return read()
    except (RunFolderError, FileNotFoundError):
        if not folder.exists() or (folder / PARTS).exists():
            raise
    return read()  # another machine found no usable image and removed the chunks: find the same here


def _read_missing(
    chunks: list[IndexChunk],
    folder: Path,
    engine: Engine,
    read_chunk: Callable[[Attempt], None],
    on_done: Callable[[int, int], None] | None,
) -> None:
    """Read and commit the chunks that are not committed yet."""
    marks = folder / PARTS
    marks.mkdir(parents=True, exist_ok=True)
    missing = [chunk for chunk in chunks if not chunk.path(folder).exists()]
    num_images = sum(chunk.stop - chunk.start for chunk in chunks)
    num_done = num_images - sum(chunk.stop - chunk.start for chunk in missing)

    def add(count: int) -> None:
        nonlocal num_done
        num_done += count
        if on_done:
            on_done(num_done, num_images)

    record = functools.partial(_record_crash, folder)
    run_despite_crashes(read_chunk, missing, engine, marks=marks, record=record, on_progress=add)


def num_indexed(folder: Path) -> int:
    """Number of images that an unfinished index of a run has read and kept."""
    return sum(pq.read_metadata(path).num_rows for path in (folder / PARTS).glob("part-*.parquet"))


def forget_chunks(folder: Path) -> None:
    """Remove the chunks: images.parquet holds their rows now, or nothing needs them."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _read_chunk(folder: Path, root: Path, max_pixels: int, attempt: Attempt) -> None:
    """Decode the images of a chunk and commit their rows; a probe commits nothing."""
    chunk = attempt.whole
    assert isinstance(chunk, IndexChunk)
    with _unless_another_machine_began(folder):
        if not attempt.probe and (chunk.path(folder).exists() or (folder / "run.json").exists()):
            return
        indexed = index_images(
            chunk.rows.slice(attempt.start - chunk.start, attempt.stop - attempt.start),
            root,
            max_pixels=max_pixels,
            crashing={row - attempt.start for row in _crashing_rows(chunk, folder)},
            on_done=None if attempt.probe else _reporter(attempt.stop - attempt.start),
        )
        if not attempt.probe:  # all machines use the first file
            write_parquet(_as_rows(indexed), chunk.path(folder), replace=False)


def _crashing_rows(chunk: IndexChunk, folder: Path) -> list[int]:
    path = chunk.crashes(folder)
    return read_parquet(path)["row"].to_pylist() if path.exists() else []


def _reporter(num_images: int, step: int = 64) -> Callable[[int], None]:
    """Report the progress of the worker after every ``step`` images, and at the end."""
    num_reported = 0

    def on_done(num_done: int) -> None:
        nonlocal num_reported
        if num_done - num_reported >= step or num_done == num_images:
            report_progress(num_done - num_reported, 0.0)
            num_reported = num_done

    return on_done


def _as_rows(indexed: Indexed) -> pa.Table:
    """Usable images and quarantined ones in one table; ``kind`` is null for the usable ones."""
    return pa.concat_tables(indexed, promote_options="default").select(CHUNK_SCHEMA.names).cast(CHUNK_SCHEMA)


def _record_crash(folder: Path, chunk: Task, row: int) -> None:
    """Add a row to the file of the rows that the next attempts leave out."""
    assert isinstance(chunk, IndexChunk)
    with _unless_another_machine_began(folder):
        rows = sorted({*_crashing_rows(chunk, folder), row})
        write_parquet(pa.table({"row": pa.array(rows, pa.int64())}), chunk.crashes(folder))


@contextlib.contextmanager
def _unless_another_machine_began(folder: Path) -> Iterator[None]:
    """Ignore missing files once there is a run.json: its writer has removed the chunks, and nobody needs them."""
    try:
        yield
    except (FileNotFoundError, RunFolderError):
        if not (folder / "run.json").exists():
            raise


def _joined(chunks: list[pa.Table]) -> Indexed:
    table = pa.concat_tables(chunks)
    if table.schema.names != CHUNK_SCHEMA.names:
        raise RunFolderError(
            "the files in the folder index of this run are not as this version writes them; move that folder away and call the same command again"
        )
    is_usable = pc.is_null(table["kind"])
    usable = table.filter(is_usable).drop_columns(["kind", "message"])
    refused = table.filter(pc.invert(is_usable))
    refused = refused.append_column("stage", pa.array(["index"] * len(refused), pa.string()))
    return Indexed(usable, refused.select(REFUSED.names).cast(REFUSED))
