"""Stage 1: images and detectors to maps. The loop over batches is :func:`explain2me.stages.shard.explain_batches`."""

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch

from explain2me.config.schema import Config
from explain2me.errors import Explain2MeError
from explain2me.images.select import Selection
from explain2me.run.events import log_event, logging_errors
from explain2me.run.files import write_parquet
from explain2me.run.folder import Run
from explain2me.run.leftovers import remove_leftovers
from explain2me.run.plan import Shard, missing_of, plan, refuse_unplanned, share_of
from explain2me.run.record import Model
from explain2me.run.schema import QUARANTINE
from explain2me.stages.begin import begin_run
from explain2me.stages.shard import explain_rows, open_warm
from explain2me.workers import Engine, report_progress, run_tasks
from explain2me.workers.device import engine_of, with_device

LOST = ("missing", "dangling_link", "unreadable")
"""Kinds of errors that concern the place of an image, not its bytes."""
MANY_LOST = 8
"""Images of a shard; if fewer are missing, somebody may have deleted them."""
PRECISION_IMAGES = 32
"""Images of each model that are explained in float32 as well, if the run has another precision."""


def explain_run(
    config: Config,
    folder: Path,
    *,
    selection: Selection | None = None,
    share: tuple[int, int] = (0, 1),
    on_indexed: Callable[[int, int], None] | None = None,
    on_start: Callable[[Run, int, Mapping[Model, int]], None] | None = None,
    on_done: Callable[[Model, int, float], None] | None = None,
) -> Run:
    """Make every missing map of a run.

    Args:
        folder: of the run; created if missing.
        selection: of :func:`explain2me.images.select.select_images`, if it was called already.
        share: (i, N): machine i of N in one folder makes its share of the shards.
        on_indexed: called with the number of images read, and of all images.
        on_start: called once with the run, the number of image x model pairs of this share, and the number of missing
            pairs of each model.
        on_done: called with a model, the number of its images explained since the last call, and the seconds that they
            took; from any thread, also within a shard, and with a negative number when a shard starts again.

    Raises:
        Explain2MeError: wrong input, or the folder belongs to another config.
    """
    folder = folder.resolve()
    log = functools.partial(log_event, folder, share)
    started = time.monotonic()
    run = begin_run(config, folder, selection=selection, share=share, on_indexed=on_indexed)
    log("index", "done", images=len(run.image_table), seconds=_seconds_since(started))
    started = time.monotonic()
    shards = plan(run)
    refuse_unplanned(shards, folder)
    mine = share_of(shards, share)
    missing = missing_of(mine, folder)
    if on_start:
        on_start(run, _num_images_by_model(mine).total(), _num_images_by_model(missing))
    log("explain", "start", shards=len(mine), missing=len(missing))
    remove_leftovers(folder)
    try:
        with logging_errors(folder, share, "explain"):
            _explain_shards(missing, folder, engine_of(with_device(config, run.config).compute), log, on_done)
    finally:
        remove_leftovers(folder)  # dead workers may have left files
    log("explain", "done", shards=len(missing), seconds=_seconds_since(started))
    return run


def _explain_shards(
    shards: Sequence[Shard],
    folder: Path,
    engine: Engine,
    log: Callable[..., None],
    on_done: Callable[[Model, int, float], None] | None,
) -> None:
    """Let workers commit every shard. A shard is tried at most three times; then :func:`explain2me.workers.repeating` raises."""
    num_done: Counter[Shard] = Counter()

    def on_start(shard: Shard) -> None:
        if num_done[shard]:  # its first worker died in the middle
            on_progress(shard, -num_done[shard], 0.0)
        log("explain", "begin", shard=shard.title, images=[shard.start, shard.stop])

    def on_progress(shard: Shard, count: int, seconds: float) -> None:
        num_done[shard] += count
        if on_done:
            on_done(shard.model, count, seconds)

    work = functools.partial(commit_shard, folder)
    for shard in run_tasks(work, shards, engine, on_start=on_start, on_progress=on_progress):
        log("explain", "end", shard=shard.title, images=[shard.start, shard.stop])


def _num_images_by_model(shards: Sequence[Shard]) -> Counter[Model]:
    counts: Counter[Model] = Counter()
    for shard in shards:
        counts[shard.model] += shard.stop - shard.start
    return counts


def _seconds_since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def num_missing(run: Run) -> int:
    """Number of shards of all models that are not committed yet."""
    return len(missing_of(plan(run), run.folder))


def commit_shard(folder: Path, shard: Shard) -> None:
    """Explain one shard and commit its part file; before that, write images that cannot be read into the quarantine."""
    run = open_warm(folder)
    precision = run.config.compute.precision
    with _out_of_memory_in_one_line():
        table, refused = explain_rows(
            run, shard.model, range(shard.start, shard.stop), precision=precision, on_batch=report_progress
        )
        _refuse_lost(shard, refused)
        if precision != "float32" and shard.part == 0:
            _commit_precision(run, shard)
    quarantine = folder / "quarantine" / f"explain-{shard.title}"
    if refused:
        write_parquet(pa.Table.from_pylist(refused, schema=QUARANTINE), quarantine)
    else:
        quarantine.unlink(missing_ok=True)  # of an earlier attempt
    write_parquet(table, shard.path(folder))


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
            f"now, first {lost[0]['path']!r} ({lost[0]['message']}); is their disk there? Nothing of this shard is committed: call "
            f"the same command again, or start a new run without these images"
        )


def _commit_precision(run: Run, shard: Shard) -> None:
    """Explain a sample of all images in float32 with the same model."""
    count = len(run.image_table)
    sample = sorted({i * count // PRECISION_IMAGES for i in range(PRECISION_IMAGES)})
    exact, _ = explain_rows(run, shard.model, sample, precision="float32")
    write_parquet(exact, run.folder / "precision" / f"model={shard.model.name}" / shard.file_name)
