"""Commit one shard: explain its images in pieces, and write its part file."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

from explain2me.errors import Explain2MeError, RunFolderError
from explain2me.run.conditions import Condition, conditions_for
from explain2me.run.files import write_parquet
from explain2me.run.folder import GROWING, Run
from explain2me.run.plan import Shard, missing_of, planned, precision_path, precision_sample
from explain2me.run.schema import QUARANTINE
from explain2me.stages.shards.pieces import forget_pieces, joined, key_of, num_in_pieces, read_pieces, write_piece
from explain2me.stages.shards.reuse import Source, known_rows, sources_of
from explain2me.stages.shards.rows import Piece, explain_rows, open_warm
from explain2me.workers import report_progress

PIECE_SECONDS = 30.0
"""A stop loses about so much work of each process; a batch under all conditions is not divided."""
LOST = ("missing", "dangling_link", "unreadable")
"""Kinds of errors that concern the place of an image, not its bytes."""
MANY_LOST = 8
"""Images of a shard; if fewer are missing, somebody may have deleted them."""


def commit_shard(folder: Path, shard: Shard, reuse: Sequence[Path] = ()) -> None:
    """Explain one shard and commit its part file; before that, write images that cannot be read into the quarantine.

    Args:
        folder: of the run.
        shard: of its plan.
        reuse: other runs, whose maps are taken where they are the same.
    """
    run = open_warm(folder)
    if needs_precision(run, shard):
        _commit_precision(run, shard)
        if not missing_of([shard], folder):
            return
    with _out_of_memory_in_one_line():
        table, refused = _explain_in_pieces(run, shard, sources_of(folder, reuse))
    _refuse_lost(shard, refused)
    _refuse_changed(folder, shard)
    quarantine = folder / "quarantine" / f"explain-{shard.title}"
    if refused:
        write_parquet(pa.Table.from_pylist(refused, schema=QUARANTINE), quarantine)
    else:
        quarantine.unlink(missing_ok=True)  # of an earlier attempt
    write_parquet(table, shard.path(folder))
    forget_pieces(folder, shard)


def _explain_in_pieces(run: Run, shard: Shard, sources: Sequence[Source]) -> tuple[pa.Table, list[dict[str, object]]]:
    """The rows of a shard and its images that failed. Continues after the pieces of an attempt that was stopped.

    The borders of the batches follow from the shard alone, so a stop changes no byte. From the first failure on no piece
    is written: a disk that is gone must not get into one.
    """
    every = conditions_for(run.config.measures, shard.model.input_size)
    known = known_rows(run, shard, sources) if sources else None
    tasks = _to_explain(shard, every, known)
    key = key_of(tasks)
    tables = [*([] if known is None else [known]), *read_pieces(run.folder, shard, key)]
    refused: list[dict[str, object]] = []
    start, done, total = 0, num_in_pieces(run.folder, shard, key), sum(len(images) for _, images in tasks)
    report_progress(shard.stop - shard.start - total, 0.0)
    for conditions, images in tasks:
        rows = images[max(done - start, 0) :]
        start += len(images)
        for piece in _explain(run, shard, rows, conditions) if rows else ():
            tables.append(piece.table)
            refused += piece.refused
            done += piece.num_images
            if done < total and not refused:
                write_piece(run.folder, shard, key, piece.table, done - piece.num_images, done)
    gone = pa.array([row["image"] for row in refused], pa.int32())
    tables = [table.filter(pc.invert(pc.is_in(table["image"], gone))) for table in tables] if refused else tables
    return joined(tables, shard.model, [condition.name for condition in every]), refused


def _explain(run: Run, shard: Shard, rows: Sequence[int], conditions: Sequence[Condition]) -> Iterator[Piece]:
    return explain_rows(
        run,
        shard.model,
        rows,
        precision=run.config.compute.precision,
        conditions=conditions,
        on_batch=report_progress,
        piece_seconds=PIECE_SECONDS,
    )


def _to_explain(
    shard: Shard, conditions: Sequence[Condition], known: pa.Table | None
) -> list[tuple[tuple[Condition, ...], Sequence[int]]]:
    """Images of a shard that lack the same conditions, and these conditions, in the order of the first image."""
    if known is None:
        return [(tuple(conditions), range(shard.start, shard.stop))]
    there = set(zip(known["image"].to_pylist(), known["condition"].to_pylist(), strict=True))
    lacking: dict[tuple[Condition, ...], list[int]] = {}
    for image in range(shard.start, shard.stop):
        missing = tuple(condition for condition in conditions if (image, condition.name) not in there)
        lacking.setdefault(missing, []).append(image)
    return [(missing, images) for missing, images in lacking.items() if missing]


def _refuse_changed(folder: Path, shard: Shard) -> None:
    """Raise if another command has changed the run meanwhile: its readers must not find this part file."""
    if shard not in planned(open_warm(folder)) or (folder / GROWING / "run.json").exists():
        raise RunFolderError(f"another command has changed the run in {str(folder)!r} meanwhile; call this one again")


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


def needs_precision(run: Run, shard: Shard) -> bool:
    """Whether the maps of a model in float32 are to be made with this shard."""
    reduced = run.config.compute.precision != "float32"
    return reduced and shard.part == 0 and not precision_path(run, shard).exists()


def _commit_precision(run: Run, shard: Shard) -> None:
    """Explain a sample of all images in float32 with the same model."""
    with _out_of_memory_in_one_line():
        (exact,) = explain_rows(run, shard.model, precision_sample(run), precision="float32")
    _refuse_changed(run.folder, shard)
    write_parquet(exact.table, precision_path(run, shard))
