"""Stage 1: images and detectors to maps. Read :func:`explain_batches` first: it is the loop."""

import contextlib
import functools
import glob
import json
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from explain2me.conditions import CLEAN, Condition, conditions_for, perturb
from explain2me.config import Config
from explain2me.crashes import Attempt, CrashSearch, Whole, marked, suspected
from explain2me.detectors import Detector
from explain2me.errors import CheckpointError, Explain2MeError
from explain2me.events import log_event
from explain2me.executors import Engine, report_progress, run_tasks
from explain2me.files import read_parquet, remove_leftovers, write_parquet
from explain2me.images import CRASHED, batches
from explain2me.manifest import image_root, resolve
from explain2me.measures import is_dead, is_flat
from explain2me.prepare import engine_of, load_model, prepare
from explain2me.salience import GradCAM, compile_before, predicted_classes
from explain2me.shards import Shard, missing_of, plan, refuse_unplanned, share_of
from explain2me.store import QUARANTINE, SCHEMA_VERSION, Model, Run, maps_schema, open_run

LOST = ("missing", "dangling_link", "permission", "unreadable")
"""Kinds of errors that are of the place of an image, not of its bytes."""
MANY_LOST = 8
"""Images of a shard; fewer may have been deleted."""
PRECISION_IMAGES = 32
"""Images of each model that are explained in float32 as well when a run has another precision."""


class Batch(NamedTuple):
    """Clean images; a file that cannot be read keeps its place as a black image, so that the others do not move.

    ``rows`` (N,) of images.parquet, ``pixels`` uint8 (N, 3, H, W), ``ids`` N strings, ``labels`` int64 (N,) with -1 for
    none, ``usable`` bool (N,).
    """

    rows: Tensor
    pixels: Tensor
    ids: Sequence[str]
    labels: Tensor
    usable: Tensor


class Explained(NamedTuple):
    """A batch under one condition: maps for two classes from one forward pass.

    ``maps`` (N, h, w) for the class that salience.target names, ``fixed`` (N, h, w) for the class of variant `fixed`,
    ``classes`` int64 (N, 2) these two, ``logits`` (N, C), ``valid`` bool (N,): the condition could be applied.
    """

    maps: Tensor
    fixed: Tensor
    classes: Tensor
    logits: Tensor
    valid: Tensor


Explain = Callable[[Tensor, Tensor, Tensor | None], Explained]
"""(images uint8 (N, 3, H, W), labels (N,), classes of the clean maps (N,) or None when these are the clean images)."""


def explain_batches(
    shard_batches: Iterable[Batch], explain: Explain, conditions: Sequence[Condition], *, seed: int
) -> Iterator[tuple[Condition, Batch, Explained]]:
    """Explain every batch under every condition; the clean map comes first, because it drives the blur."""
    for batch in shard_batches:
        clean = explain(batch.pixels, batch.labels, None)
        yield CLEAN, batch, clean
        live = ~(is_dead(clean.maps) | is_flat(clean.maps))
        for condition, pixels in perturb(batch.pixels, conditions, clean_maps=clean.maps, seed=seed, ids=batch.ids):
            result = explain(pixels, batch.labels, clean.classes[:, 0])
            yield condition, batch, result._replace(valid=live) if condition.measure == "focus" else result


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
    run, shard = _open(folder), attempt.whole
    assert isinstance(shard, Shard)
    precision = run.config.compute.precision
    crashed = _crash_file(run, shard)
    crashing = set(read_parquet(crashed)["image"].to_pylist()) if crashed.exists() else set()
    with marked(folder, attempt), _out_of_memory_in_a_line():
        if attempt.start == attempt.stop:
            _warm_up(run, shard.model)
            return
        table, refused = _explain_rows(
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
    detector, cam = _load(run, model)
    size = (_batch_size(run), 3, *detector.input_size)
    cam(detector.preprocess(torch.zeros(size, dtype=torch.uint8, device=run.config.compute.device)))


def _commit_precision(run: Run, shard: Shard) -> None:
    """The same model in float32 on a sample of all images, without those of which processes died."""
    count = len(run.image_table)
    sample = sorted({i * count // PRECISION_IMAGES for i in range(PRECISION_IMAGES)})
    files = (run.folder / "quarantine").glob(f"crash-{glob.escape(shard.model.name)}-part-*.parquet")
    crashing = {image for path in files for image in read_parquet(path)["image"].to_pylist()}
    exact, _ = _explain_rows(run, shard.model, sample, precision="float32", crashing=crashing)
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


def _open(folder: Path) -> Run:
    """The run, kept open between the shards of one process; run.json is replaced whole, so its times tell it apart."""
    return _open_once(folder.resolve(), (folder / "run.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_once(folder: Path, _: int) -> Run:
    return open_run(folder)


@functools.lru_cache(maxsize=1)
def _load(run: Run, model: Model) -> tuple[Detector, GradCAM]:
    """The model on its device, warm between the shards of one process, and opened to be explained: nobody else has it."""
    wanted = next(detector for detector in run.config.detectors if detector.name == model.detector)
    detector = load_model(wanted, model.checkpoint, model.seed, len(run.classes))
    if detector.weights_sha256 != model.weights_sha256:
        raise CheckpointError(f"{model.checkpoint} has changed since the run began; put it back, or start a new run")
    detector.model.to(run.config.compute.device).to(memory_format=torch.channels_last)
    if run.config.compute.compile:
        noise = torch.randint(
            0, 256, (_batch_size(run), 3, *detector.input_size), generator=torch.Generator().manual_seed(0)
        )
        images = detector.preprocess(noise.to(torch.uint8).to(run.config.compute.device))
        autocast = torch.autocast(
            images.device.type, torch.bfloat16, enabled=run.config.compute.precision == "bfloat16"
        )
        with _exact_convolutions(images), autocast:
            compile_before(detector.model, images, wanted.layer)
    return detector, GradCAM(detector.model, layer=wanted.layer).__enter__()


def _batch_size(run: Run) -> int:
    """The largest batch of a run."""
    return min(int(run.config.compute.batch_size), run.config.compute.shard_size)


def _explain_rows(
    run: Run,
    model: Model,
    rows: Sequence[int],
    *,
    precision: str,
    crashing: Collection[int],
    on_batch: Callable[[int, float], None] | None = None,
) -> tuple[pa.Table, list[dict[str, object]]]:
    started = time.monotonic()
    detector, cam = _load(run, model)
    conditions = conditions_for(run.config.measures, detector.input_size)
    refused: list[dict[str, object]] = []
    results: dict[Condition, list[tuple[Batch, Explained]]] = {condition: [] for condition in conditions}
    explain: Explain = functools.partial(_explain, detector, cam, run, precision)
    if run.config.compute.compile:
        explain = functools.partial(_padded, explain, _batch_size(run))
    for condition, batch, result in explain_batches(
        _read(run, model, detector, rows, refused, crashing), explain, conditions, seed=run.config.seed
    ):
        kept = result._replace(valid=result.valid.cpu() & batch.usable)
        if condition == conditions[-1] and on_batch:
            now = time.monotonic()
            on_batch(len(batch.rows), now - started)
            started = now
        # a slice would keep all pixels alive
        results[condition].append((batch._replace(pixels=batch.pixels.new_empty(0)), kept))
    return _table(model, results), refused


def _explain(
    detector: Detector, cam: GradCAM, run: Run, precision: str, images: Tensor, labels: Tensor, clean: Tensor | None
) -> Explained:
    target = run.config.salience.target
    classes = torch.empty(0)

    def choose(logits: Tensor) -> Tensor:
        nonlocal classes
        predicted = predicted_classes(logits)
        if target == "predicted":
            wanted = predicted
        elif target == "true":
            wanted = labels.to(predicted)
        else:
            wanted = torch.full_like(predicted, run.classes.index(target))
        fixed = clean if clean is not None else torch.where(labels.to(predicted) < 0, wanted, labels.to(predicted))
        classes = torch.stack([wanted, fixed], dim=1)
        return classes

    with (
        _exact_convolutions(images),
        torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        maps, logits = cam.explain(detector.preprocess(images), choose)
    return Explained(maps[:, 0], maps[:, 1], classes, logits, torch.ones(len(images), dtype=torch.bool))


def _padded(explain: Explain, size: int, images: Tensor, labels: Tensor, clean: Tensor | None) -> Explained:
    """A smaller last batch filled up and cut again: compiled code is made for one size."""
    count = len(images)
    filler = [0] * max(size - count, 0)
    result = explain(
        torch.cat([images, images[filler]]),
        torch.cat([labels, labels[filler]]),
        None if clean is None else torch.cat([clean, clean[filler]]),
    )
    return Explained(*(part[:count] for part in result))


def _exact_convolutions(images: Tensor) -> contextlib.AbstractContextManager[None]:
    """On CUDA: no TF32 in the name of float32, and the same algorithm each time."""
    if images.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def _read(
    run: Run,
    model: Model,
    detector: Detector,
    rows: Sequence[int],
    refused: list[dict[str, object]],
    crashing: Collection[int],
) -> Iterator[Batch]:
    """Decode the images of a shard ahead of the model; what fails is added to ``refused``."""
    data, compute = run.config.data, run.config.compute
    table = run.image_table.take(list(rows))
    ids, paths = table["image_id"].to_pylist(), table["path"].to_pylist()
    classes = {label: i for i, label in enumerate(run.classes)}
    labels = torch.tensor([classes.get(label, -1) for label in table["label"].to_pylist()])
    root = image_root(Path(data.manifest))
    files = [resolve(root, path) for path in paths]
    assert compute.batch_size != "auto"  # found before run.json was written
    for batch in batches(
        files,
        size=detector.input_size,
        batch_size=compute.batch_size,
        interpolation=detector.interpolation,
        max_pixels=data.max_pixels,
        expected_sha256=table["sha256"].to_pylist(),
        crashing={position for position, row in enumerate(rows) if row in crashing},
    ):
        start = min([*batch.positions, *(failure.position for failure in batch.failures)])
        usable = torch.ones(len(batch.positions) + len(batch.failures), dtype=torch.bool)
        pixels = batch.images
        for position, error in batch.failures:
            usable[position - start] = False
            if error.kind == "crash":  # in the quarantine since it was found
                continue
            where = {"image": rows[position], "image_id": ids[position], "path": paths[position], "model": model.name}
            refused.append(where | {"stage": "explain", "kind": error.kind, "message": error.message})
        if batch.failures:
            pixels = torch.zeros(len(usable), 3, *detector.input_size, dtype=torch.uint8)
            pixels[usable] = batch.images
        span = slice(start, start + len(usable))
        pixels = pixels.to(compute.device, non_blocking=True)
        yield Batch(torch.tensor(rows[span]), pixels, ids[span], labels[span], usable)


def _table(model: Model, results: dict[Condition, list[tuple[Batch, Explained]]]) -> pa.Table:
    """Rows by condition, then image; images that could not be read are left out."""
    columns: dict[str, list[Any]] = {name: [] for name in ("image", "condition", "valid", "logits", "predicted")}
    maps: list[np.ndarray] = []
    fixed: list[np.ndarray] = []
    same: list[np.ndarray] = []
    for condition, pairs in results.items():
        usable = torch.cat([batch.usable for batch, _ in pairs])
        joined = Explained(*(torch.cat(parts).cpu()[usable] for parts in zip(*(r for _, r in pairs), strict=True)))
        columns["image"].append(torch.cat([batch.rows for batch, _ in pairs])[usable].numpy())
        columns["condition"] += [condition.name] * len(joined.maps)
        columns["valid"].append(joined.valid.numpy())
        columns["logits"].append(joined.logits.numpy())
        columns["predicted"].append(predicted_classes(joined.logits).numpy())
        maps.append(joined.maps.numpy())
        fixed.append(joined.fixed.numpy())
        same.append((joined.classes[:, 0] == joined.classes[:, 1]).numpy())
    height, width = maps[0].shape[1:]
    logits = np.concatenate(columns["logits"]).astype(np.float32)
    invalid = ~(np.concatenate(columns["valid"]) & np.isfinite(logits).all(1))
    offsets = np.arange(len(logits) + 1, dtype=np.int32) * logits.shape[1]
    arrays = [
        pa.array(np.concatenate(columns["image"]), pa.int32()),
        pa.array(columns["condition"]).dictionary_encode(),
        pa.ListArray.from_arrays(offsets, pa.array(logits.ravel()), mask=pa.array(invalid)),
        pa.array(np.concatenate(columns["predicted"]), pa.int32(), mask=invalid),
        _lists(np.concatenate(maps), invalid),
        _lists(np.concatenate(fixed), invalid | np.concatenate(same)),
    ]
    names = json.dumps([condition.name for condition in results])
    metadata = {
        "schema": str(SCHEMA_VERSION),
        "model": model.name,
        "map_size": f"{height}x{width}",
        "conditions": names,
    }
    return pa.Table.from_arrays(arrays, schema=maps_schema(height * width).with_metadata(metadata))


def _lists(maps: np.ndarray, null: np.ndarray) -> pa.Array:
    values = pa.array(maps.astype(np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(values, maps.shape[1] * maps.shape[2], mask=pa.array(null))
