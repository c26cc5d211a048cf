"""Stage 1: images and detectors to maps. The loop over batches is :func:`explain2me.stages.shards.rows.explain_batches`."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from explain2me.config.schema import Config
from explain2me.images.select import Selection
from explain2me.run.events import log_event, logging_errors
from explain2me.run.folder import EARLIER, GROWING, Run
from explain2me.run.leftovers import remove_leftovers
from explain2me.run.plan import Shard, missing_of, plan, refuse_unplanned, share_of
from explain2me.run.record import Model
from explain2me.stages.begin import begin_run
from explain2me.stages.growth import set_aside_strays
from explain2me.stages.index import num_indexed
from explain2me.stages.refusals import open_existing
from explain2me.stages.shards.commit import commit_shard, needs_precision
from explain2me.stages.shards.pieces import PIECES, keep_pieces, num_in_pieces
from explain2me.stages.shards.reuse import refuse_other_settings, refuse_useless
from explain2me.workers import Engine, run_tasks
from explain2me.workers.device import engine_of, with_device


def explain_run(
    config: Config,
    folder: Path,
    *,
    selection: Selection | None = None,
    share: tuple[int, int] = (0, 1),
    reuse: Sequence[Path] = (),
    on_indexed: Callable[[int, int], None] | None = None,
    on_grown: Callable[[str], None] | None = None,
    on_start: Callable[[Run, int, Mapping[Model, int]], None] | None = None,
    on_done: Callable[[Model, int, float], None] | None = None,
) -> Run:
    """Make every missing map of a run.

    Args:
        folder: of the run; created if missing.
        selection: of :func:`explain2me.images.select.select_images`, if it was called already.
        share: (i, N): machine i of N in one folder makes its share of the shards.
        reuse: other runs, whose maps are taken where everything that decides them is the same.
        on_indexed: called with the number of images read, and of all images.
        on_grown: called with what was added and taken out, in words, if the run in the folder had another state.
        on_start: called once with the run, the number of image x model pairs of this share, and the number of missing
            pairs of each model.
        on_done: called with a model, the number of its images explained since the last call, and the seconds that they
            took; from any thread, also within a shard, and with a negative number when a shard starts again.

    Raises:
        Explain2MeError: wrong input, or the folder belongs to another config.
    """
    folder, reuse = folder.resolve(), tuple(path.resolve() for path in reuse)
    if reuse:
        old = open_existing(folder)
        refuse_other_settings(with_device(config, old.config if old else None), reuse)
    log = functools.partial(log_event, folder, share)
    started = time.monotonic()
    run = begin_run(config, folder, selection=selection, share=share, on_indexed=on_indexed, on_grown=on_grown)
    refuse_useless(run, reuse)
    log("index", "done", images=len(run.image_table), seconds=_seconds_since(started))
    started = time.monotonic()
    shards = plan(run)
    set_aside_strays(run)
    refuse_unplanned(shards, folder)
    mine = share_of(shards, share)
    missing = missing_of(mine, folder)
    imprecise = [shard for shard in mine if shard.part == 0 and shard not in missing and needs_precision(run, shard)]
    if on_start:
        left = _num_images_by_model(missing, folder)
        on_start(run, sum(shard.stop - shard.start for shard in mine), left)
    log("explain", "start", shards=len(mine), missing=len(missing), **({"reuse": [*map(str, reuse)]} if reuse else {}))
    remove_leftovers(folder)
    try:
        engine = engine_of(with_device(config, run.config).compute)
        work = functools.partial(commit_shard, folder, reuse=reuse)
        with logging_errors(folder, share, "explain"):
            _explain_shards(work, [*imprecise, *missing], folder, engine, log, on_done)
    finally:
        remove_leftovers(folder)  # dead workers may have left files
    if (folder / PIECES).exists():  # a process was killed just after it had committed a part file
        keep_pieces(folder, missing_of(shards, folder))
    log("explain", "done", shards=len(missing), seconds=_seconds_since(started))
    return run


def _explain_shards(
    work: Callable[[Shard], None],
    shards: Sequence[Shard],
    folder: Path,
    engine: Engine,
    log: Callable[..., None],
    on_done: Callable[[Model, int, float], None] | None,
) -> None:
    """Let workers commit every shard. A shard is tried at most three times; then :func:`explain2me.workers.repeating` raises."""
    num_explained = {shard: num_in_pieces(folder, shard) for shard in shards}

    def on_start(shard: Shard) -> None:
        again = num_explained[shard] - num_in_pieces(folder, shard)
        if again:  # its first worker died in the middle
            on_progress(shard, -again, 0.0)
        log("explain", "begin", shard=shard.title, images=[shard.start, shard.stop])

    def on_progress(shard: Shard, count: int, seconds: float) -> None:
        num_explained[shard] += count
        if on_done:
            on_done(shard.model, count, seconds)

    for shard in run_tasks(work, shards, engine, on_start=on_start, on_progress=on_progress):
        log("explain", "end", shard=shard.title, images=[shard.start, shard.stop])


def _num_images_by_model(missing: Sequence[Shard], folder: Path) -> Counter[Model]:
    """Images without maps of each model."""
    counts: Counter[Model] = Counter()
    for shard in missing:
        counts[shard.model] += shard.stop - shard.start - num_in_pieces(folder, shard)
    return counts


def num_explained(run: Run) -> tuple[int, int]:
    """Number of image x model pairs with committed maps, also those of unfinished shards; and of all."""
    shards = plan(run)
    left = _num_images_by_model(missing_of(shards, run.folder), run.folder).total()
    total = len(run.image_table) * len(run.models)
    return total - left, total


def kept_text(folder: Path) -> str:
    """How many images of a stopped run are kept, for people."""
    run = open_existing(folder)
    if run is None or (folder / GROWING).exists():
        return f"{num_indexed(folder) + num_indexed(folder / GROWING)} images are read and kept"
    explained, total = num_explained(run)
    more = ", and those in earlier/" if (folder / EARLIER).exists() else ""
    return f"the maps of {explained} of {total} images x models are kept{more}"


def _seconds_since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def num_missing(run: Run) -> int:
    """Number of shards of all models that are not committed yet."""
    return len(missing_of(plan(run), run.folder))
