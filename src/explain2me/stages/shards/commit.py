"""Commit one shard: explain its images in pieces, and write its part file."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch

from explain2me.errors import Explain2MeError
from explain2me.run.files import write_parquet
from explain2me.run.folder import Run
from explain2me.run.plan import Shard
from explain2me.run.schema import QUARANTINE
from explain2me.stages.shards.pieces import explained_until, forget_pieces, joined, read_pieces, write_piece
from explain2me.stages.shards.rows import explain_rows, open_warm
from explain2me.workers import report_progress

PIECE_SECONDS = 30.0
"""A stop loses about so much work of each process; a batch under all conditions is not divided."""
LOST = ("missing", "dangling_link", "permission", "unreadable")
"""Kinds of errors that concern the place of an image, not its bytes."""
MANY_LOST = 8
"""Images of a shard; if fewer are missing, somebody may have deleted them."""
PRECISION_IMAGES = 32
"""Images of each model that are explained in float32 as well, if the run has another precision."""


def commit_shard(folder: Path, shard: Shard) -> None:
    """Explain one shard and commit its part file; before that, write images that cannot be read into the quarantine."""
    run = open_warm(folder)
    with _out_of_memory_in_one_line():
        table, refused = _explain_in_pieces(run, shard)
        _refuse_lost(shard, refused)
        if run.config.compute.precision != "float32" and shard.part == 0:
            _commit_precision(run, shard)
    quarantine = folder / "quarantine" / f"explain-{shard.title}"
    if refused:
        write_parquet(pa.Table.from_pylist(refused, schema=QUARANTINE), quarantine)
    else:
        quarantine.unlink(missing_ok=True)  # of an earlier attempt
    write_parquet(table, shard.path(folder))
    forget_pieces(folder, [shard])


def _explain_in_pieces(run: Run, shard: Shard) -> tuple[pa.Table, list[dict[str, object]]]:
    """The rows of a shard and its images that failed. Continues after the pieces of an attempt that was stopped.

    The borders of the batches follow from the shard alone, so a stop changes no byte. From the first failure on no piece
    is written: a disk that is gone must not get into one.
    """
    tables = read_pieces(run.folder, shard)
    refused: list[dict[str, object]] = []
    start = explained_until(run.folder, shard)
    rows = range(start, shard.stop)
    precision = run.config.compute.precision
    for piece in explain_rows(
        run, shard.model, rows, precision=precision, on_batch=report_progress, piece_seconds=PIECE_SECONDS
    ):
        tables.append(piece.table)
        refused += piece.refused
        if piece.stop < shard.stop and not refused:
            write_piece(run.folder, shard, piece.table, start, piece.stop)
        start = piece.stop
    return joined(tables), refused


@contextlib.contextmanager
def _out_of_memory_in_one_line() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        why = str(error).split("\n", maxsplit=1)[0]
        raise Explain2MeError(
            f"{why}; what is committed stays. Lower compute.workers where they share a GPU, or compute.batch_size (in a new "
            f"folder; 'auto' finds one that fits)"
        ) from None


def _refuse_lost(shard: Shard, refused: Sequence[Mapping[str, object]]) -> None:
    """Raise if so many images are missing that their disk is probably gone: the index could read all of them.

    The quarantine would keep them for ever, because a committed shard is not made again.
    """
    lost = [row for row in refused if row["kind"] in LOST]
    if len(lost) >= MANY_LOST and 2 * len(lost) > shard.stop - shard.start:
        raise Explain2MeError(
            f"{len(lost)} of the {shard.stop - shard.start} images of a shard were there when the run began and cannot be read "
            f"now, first {lost[0]['path']!r} ({lost[0]['message']}); is their disk there? Nothing of them is committed: call "
            f"the same command again, or start a new run without these images"
        )


def _commit_precision(run: Run, shard: Shard) -> None:
    """Explain a sample of all images in float32 with the same model."""
    count = len(run.image_table)
    sample = sorted({i * count // PRECISION_IMAGES for i in range(PRECISION_IMAGES)})
    (exact,) = explain_rows(run, shard.model, sample, precision="float32")
    write_parquet(exact.table, run.folder / "precision" / f"model={shard.model.name}" / shard.file_name)
