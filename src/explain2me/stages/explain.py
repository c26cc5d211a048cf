"""Stage 1: images and detectors to maps. Read :func:`explain_batches` first: it is the loop."""

import contextlib
import functools
import glob
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import torch

from explain2me.config.schema import Config
from explain2me.errors import Explain2MeError
from explain2me.images.examine import CRASHED
from explain2me.run.events import log_event
from explain2me.run.files import write_parquet
from explain2me.run.folder import Run
from explain2me.run.leftovers import remove_leftovers
from explain2me.run.packs import read_parquet
from explain2me.run.plan import Shard, missing_of, plan, refuse_unplanned, share_of
from explain2me.run.record import Model
from explain2me.run.schema import QUARANTINE
from explain2me.salience.gradcam import choose_predicted
from explain2me.stages.begin import prepare
from explain2me.stages.shard import explain_rows, largest_batch, load_explainer, open_warm
from explain2me.workers import Engine, report_progress, run_tasks
from explain2me.workers.crashes import Attempt, CrashSearch, Whole, marked, suspected
from explain2me.workers.device import engine_of

LOST = ("missing", "dangling_link", "permission", "unreadable")
"""Kinds of errors that are of the place of an image, not of its bytes."""
MANY_LOST = 8
"""Images of a shard; fewer may have been deleted."""
PRECISION_IMAGES = 32
"""Images of each model that are explained in float32 as well when a run has another precision."""


def explain_run(
    config: Config,
    folder: Path,
    *,
    share: tuple[int, int] = (0, 1),
    on_indexed: Callable[[int, int], None] | None = None,
    on_start: Callable[[Run, int, Mapping[Model, int]], None] | None = None,
    on_done: Callable[[Model, int, float], None] | None = None,
) -> Run:
    """Make every map of a run that is not there yet.

    Args:
        config: of the run.
        folder: of the run; made if missing.
        share: (i, N): the i-th of N machines that work in one folder makes its share of the shards.
        on_indexed: called with the images that were read and all of them.
        on_start: called once with the run, the number of image x model pairs of this share, and of each model still to
            do.
        on_done: called with a model, how many more of its images are explained, and the seconds that they took a worker;
            from any thread, also within a shard, and with a negative number where a shard is begun again.

    Raises:
        Explain2MeError: wrong input, or the folder belongs to another config.
    """
    folder = folder.resolve()
    log = functools.partial(log_event, folder, share)
    started = time.monotonic()
    work = functools.partial(commit_shard, folder)
    run = prepare(config, folder, share=share, on_indexed=on_indexed)
    log("index", "done", images=len(run.image_table), seconds=round(time.monotonic() - started, 3))
    started = time.monotonic()
    shards = plan(run)
    refuse_unplanned(shards, folder)
    mine = share_of(shards, share)
    missing = missing_of(mine, folder)
    if on_start:
        left: Counter[Model] = Counter()
        for shard in missing:
            left[shard.model] += shard.stop - shard.start
        on_start(run, sum(shard.stop - shard.start for shard in mine), left)
    log("explain", "start", shards=len(mine), missing=len(missing))
    remove_leftovers(folder)
    attempts = [Attempt.at(shard) for shard in missing]

    counted: Counter[Attempt] = Counter()

    def begin(attempt: Attempt) -> None:
        if counted[attempt]:  # of a try that ended in the middle
            tell(attempt, -counted[attempt], 0.0)
        log("explain", "probe" if attempt.probe else "begin", shard=attempt.whole.title, images=attempt[1:3])

    def tell(attempt: Attempt, count: int, seconds: float) -> None:
        assert isinstance(attempt.whole, Shard)
        counted[attempt] += count
        if on_done and not attempt.probe:
            on_done(attempt.whole.model, count, seconds)

    search = CrashSearch(functools.partial(_record_crash, run))
    attempts_made = run_tasks(
        work,
        attempts,
        _engine(config, run),
        recovery=search,
        suspects=suspected(folder, attempts),
        on_start=begin,
        on_progress=tell,
    )
    try:
        for attempt in attempts_made:
            log("explain", "probed" if attempt.probe else "end", shard=attempt.whole.title, images=attempt[1:3])
    except BaseException:  # it has ended its workers, perhaps in the middle of a file
        remove_leftovers(folder)
        raise
    if search.num_deaths:
        remove_leftovers(folder)
    log("explain", "done", shards=len(missing), seconds=round(time.monotonic() - started, 3))
    return run


def _engine(config: Config, run: Run) -> Engine:
    """As this call asks for, with the run's own device and threads; run.json may be of another machine."""
    own = {name: getattr(run.config.compute, name) for name in ("device", "threads")}
    return engine_of(config.model_copy(update={"compute": config.compute.model_copy(update=own)}))


def num_missing(run: Run) -> int:
    """Shards of all models whose part file is not there yet."""
    return len(missing_of(plan(run), run.folder))


def commit_shard(folder: Path, attempt: Attempt) -> None:
    """Explain one shard and commit its part file; images that cannot be read go to the quarantine first.

    A probe explains some of its images and commits nothing.
    """
    run, shard = open_warm(folder), attempt.whole
    assert isinstance(shard, Shard)
    precision = run.config.compute.precision
    crashed = _crash_file(run, shard)
    crashing = set(read_parquet(crashed)["image"].to_pylist()) if crashed.exists() else set()
    with marked(folder, attempt), _out_of_memory_in_a_line():
        if attempt.start == attempt.stop:
            _warm_up(run, shard.model)
            return
        table, refused = explain_rows(
            run,
            shard.model,
            range(attempt.start, attempt.stop),
            precision=precision,
            crashing=crashing,
            on_batch=report_progress,
        )
        if attempt.probe:
            return
        _refuse_lost(shard, refused)
        if precision != "float32" and shard.part == 0:
            _commit_precision(run, shard)
    quarantine = folder / "quarantine" / f"explain-{shard.title}"
    if refused:
        write_parquet(pa.Table.from_pylist(refused, schema=QUARANTINE), quarantine)
    else:
        quarantine.unlink(missing_ok=True)  # of an earlier try
    write_parquet(table, shard.path(folder))


@contextlib.contextmanager
def _out_of_memory_in_a_line() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        why = str(error).split("\n", maxsplit=1)[0]
        raise Explain2MeError(
            f"{why}; what is committed stays. Lower compute.workers where they share a GPU, or compute.batch_size (in a new "
            f"folder; 'auto' finds one that fits)"
        ) from None


def _refuse_lost(shard: Shard, refused: Sequence[Mapping[str, object]]) -> None:
    """Raise where a disk seems to be gone: all of these images were read when the run began.

    In the quarantine they would stay there, since a shard that is committed is not made again.
    """
    lost = [row for row in refused if row["kind"] in LOST]
    if len(lost) >= MANY_LOST and 2 * len(lost) > shard.stop - shard.start:
        raise Explain2MeError(
            f"{len(lost)} of the {shard.stop - shard.start} images of a shard were there when the run was begun and cannot be read "
            f"now, first {lost[0]['path']!r} ({lost[0]['message']}); is their disk there? Nothing of this shard is committed: call "
            f"the same command again, or start a new run without these images"
        )


def _warm_up(run: Run, model: Model) -> None:
    """All that a worker does before it sees an image."""
    detector, explainer = load_explainer(run, model)
    size = (largest_batch(run), 3, *detector.input_size)
    blank = torch.zeros(size, dtype=torch.uint8, device=run.config.compute.device)
    explainer.explain(detector.preprocess(blank), choose_predicted)


def _commit_precision(run: Run, shard: Shard) -> None:
    """The same model in float32 on a sample of all images, without those of which processes died."""
    count = len(run.image_table)
    sample = sorted({i * count // PRECISION_IMAGES for i in range(PRECISION_IMAGES)})
    files = (run.folder / "quarantine").glob(f"crash-{glob.escape(shard.model.name)}-part-*.parquet")
    crashing = {image for path in files for image in read_parquet(path)["image"].to_pylist()}
    exact, _ = explain_rows(run, shard.model, sample, precision="float32", crashing=crashing)
    write_parquet(exact, run.folder / "precision" / f"model={shard.model.name}" / shard.file_name)


def _record_crash(run: Run, whole: Whole, image: int) -> None:
    """Into the quarantine, where the next try of the shard finds it."""
    assert isinstance(whole, Shard)
    path = _crash_file(run, whole)
    rows = read_parquet(path).to_pylist() if path.exists() else []
    found = run.image_table.slice(image, 1).to_pylist()[0]
    row = {name: found[name] for name in ("image", "image_id", "path")} | {"model": whole.model.name}
    rows.append(row | {"stage": "explain", "kind": "crash", "message": CRASHED})
    write_parquet(pa.Table.from_pylist(sorted(rows, key=lambda row: row["image"]), schema=QUARANTINE), path)


def _crash_file(run: Run, shard: Shard) -> Path:
    return run.folder / "quarantine" / f"crash-{shard.title}"
