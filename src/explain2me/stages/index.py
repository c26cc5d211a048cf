"""Before stage 1: every image is read and decoded once, in chunks that are committed like shards."""

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from explain2me.config.compare import digest
from explain2me.errors import RunFolderError
from explain2me.images.examine import QUARANTINE, Indexed, index_images
from explain2me.images.listing import image_root
from explain2me.run.files import write_parquet
from explain2me.run.packs import read_parquet
from explain2me.workers import Engine, report_progress, run_tasks
from explain2me.workers.crashes import Attempt, CrashSearch, Whole, marked, remove_marks, suspected

CHUNK = 4096
"""Images of a chunk."""
PARTS = "index"
"""Folder of the chunks that are done, until all are."""
MARKED = "part-[0-9]*"
"""Titles of chunks; those of shards begin with the name of a model, and others may be at them already."""
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
        """A file name that no other chunk of the run has."""
        return f"part-{self.number:05d}-{self.key}.parquet"

    def path(self, folder: Path) -> Path:
        """Where it is committed."""
        return folder / PARTS / self.title

    def crashes(self, folder: Path) -> Path:
        """Rows of which processes die."""
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
    """Read every image of a run once, or what is left of that; None where another machine has begun the run meanwhile.

    Several machines may do this in one folder: each begins at another place and leaves out what is there.

    Args:
        images: of :func:`explain2me.images.listing.list_images`.
        source: the manifest or folder.
        folder: of the run.
        engine: who reads; a single chunk is read in this process.
        max_pixels: larger images are not decoded.
        share: (i, N): where to begin.
        on_done: called with the images read and all of them.
    """
    read = functools.partial(
        _index, images, source, folder, engine, max_pixels=max_pixels, share=share, on_done=on_done
    )
    try:
        return read()
    except (FileNotFoundError, RunFolderError):
        if not folder.exists() or (folder / PARTS).exists():
            raise
    return read()  # another machine found no image that can be used, and removed the chunks: so shall this one find


def _index(
    images: pa.Table,
    source: Path,
    folder: Path,
    engine: Engine,
    *,
    max_pixels: int,
    share: tuple[int, int],
    on_done: Callable[[int, int], None] | None,
) -> Indexed | None:
    key = [str(source.resolve()), max_pixels]  # the same names elsewhere are other images
    chunks = [
        IndexChunk(number, start, min(start + CHUNK, len(images)), digest([key, rows.to_pylist()]), rows)
        for number, start in enumerate(range(0, len(images), CHUNK))
        for rows in [images.take(list(range(start, min(start + CHUNK, len(images)))))]
    ]
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    first = share[0] * len(chunks) // share[1]
    missing = [Attempt.at(chunk) for chunk in chunks[first:] + chunks[:first] if not chunk.path(folder).exists()]
    done = len(images) - sum(attempt.stop - attempt.start for attempt in missing)

    def tell(_: Attempt, count: int, __: float) -> None:
        nonlocal done
        done += count
        if on_done:
            on_done(done, len(images))

    work = functools.partial(_commit_chunk, folder, source, max_pixels)
    search = CrashSearch(functools.partial(_record_crash, folder))
    suspects = suspected(folder, missing)
    for _ in run_tasks(work, missing, engine, recovery=search, suspects=suspects, on_progress=tell):
        pass
    try:
        return _joined([read_parquet(chunk.path(folder)) for chunk in chunks])
    except (RunFolderError, FileNotFoundError):
        if (folder / "run.json").exists():  # whoever wrote it has removed the chunks
            return None
        raise


def forget_chunks(folder: Path) -> None:
    """The chunks are part of images.parquet now, or of no use; so are the marks of processes that ended at one."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    remove_marks(folder, MARKED)


def _commit_chunk(folder: Path, source: Path, max_pixels: int, attempt: Attempt) -> None:
    with _while_needed(folder):
        _read_chunk(folder, source, max_pixels, attempt)


def _read_chunk(folder: Path, source: Path, max_pixels: int, attempt: Attempt) -> None:
    chunk = attempt.whole
    assert isinstance(chunk, IndexChunk)
    done = chunk.path(folder).exists() or (folder / "run.json").exists()  # by another machine in the meantime
    if done and not attempt.probe:
        return
    crashed = read_parquet(chunk.crashes(folder))["row"].to_pylist() if chunk.crashes(folder).exists() else []
    rows = chunk.rows.slice(attempt.start - chunk.start, attempt.stop - attempt.start)
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        if not attempt.probe and (done - told >= 64 or done == len(rows)):
            report_progress(done - told, 0.0)
            told = done

    with marked(folder, attempt):
        usable, refused = index_images(
            rows,
            image_root(source),
            max_pixels=max_pixels,
            crashing={row - attempt.start for row in crashed},
            on_done=tell,
        )
    if attempt.probe:
        return
    columns = {name: usable[name] for name in usable.column_names} | {
        name: pa.nulls(len(usable), pa.string()) for name in ("kind", "message")
    }
    bad = {name: refused[name] for name in ("image_id", "path", "kind", "message")}
    bad |= {
        name: pa.nulls(len(refused), CHUNK_SCHEMA.field(name).type) for name in CHUNK_SCHEMA.names if name not in bad
    }
    tables = [pa.table({name: part[name] for name in CHUNK_SCHEMA.names}).cast(CHUNK_SCHEMA) for part in (columns, bad)]
    write_parquet(pa.concat_tables(tables), chunk.path(folder), replace=False)  # so that all machines join the same


def _record_crash(folder: Path, whole: Whole, row: int) -> None:
    assert isinstance(whole, IndexChunk)
    path = whole.crashes(folder)
    with _while_needed(folder):
        known = read_parquet(path)["row"].to_pylist() if path.exists() else []
        write_parquet(pa.table({"row": pa.array(sorted({*known, row}), pa.int64())}), path)


@contextlib.contextmanager
def _while_needed(folder: Path) -> Iterator[None]:
    """Another machine may begin the run meanwhile and remove the index: then nothing of it can be missing."""
    try:
        yield
    except (FileNotFoundError, RunFolderError):
        if not (folder / "run.json").exists():
            raise


def _joined(parts: list[pa.Table]) -> Indexed:
    table = pa.concat_tables(parts)
    if table.schema.names != CHUNK_SCHEMA.names:
        raise RunFolderError("the chunks of the index are of another version; delete the folder index and call again")
    good = pc.is_null(table["kind"])
    usable = table.filter(good).drop_columns(["kind", "message"])
    bad = table.filter(pc.invert(good))
    stage = pa.array(["index"] * len(bad), pa.string())
    columns = {name: stage if name == "stage" else bad[name] for name in QUARANTINE.names}
    return Indexed(usable, pa.table(columns).cast(QUARANTINE))
