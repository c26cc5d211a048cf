"""Decode, perturb and explain images of one model; the results are the rows of a part file.

Read :func:`explain_batches` first: it is the loop of stage 1.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from explain2me.config.schema import ComputeConfig
from explain2me.detectors.load import Detector
from explain2me.detectors.runs import load_model
from explain2me.errors import CheckpointError
from explain2me.images.batches import batches
from explain2me.images.listing import image_root, resolve
from explain2me.measures import is_dead, is_flat
from explain2me.run.conditions import CLEAN, PERTURBATIONS, Condition, conditions_for, perturb
from explain2me.run.folder import Run, open_run
from explain2me.run.record import Model
from explain2me.run.schema import part_schema
from explain2me.salience.compiling import compile_before
from explain2me.salience.gradcam import predicted_classes
from explain2me.salience.methods import METHODS, Explainer
from explain2me.salience.target import classes_to_explain


class Batch(NamedTuple):
    """Clean images. A file that cannot be read is a black image here, so the batch borders do not depend on it.

    ``rows`` are those of images.parquet; a label is -1 where there is none.
    """

    rows: Int[Tensor, " N"]
    pixels: UInt8[Tensor, "N 3 H W"]
    ids: Sequence[str]
    labels: Int[Tensor, " N"]
    usable: Bool[Tensor, " N"]


class Explained(NamedTuple):
    """Results of a batch under one condition: maps for two classes from one forward pass.

    ``maps`` explain the class that salience.target names, ``fixed`` the class that is held fixed, and ``classes`` holds
    both. ``valid``: whether the condition could be applied.
    """

    maps: Float[Tensor, "N h w"]
    fixed: Float[Tensor, "N h w"]
    classes: Int[Tensor, "N 2"]
    logits: Float[Tensor, "N num_logits"]
    valid: Bool[Tensor, " N"]


Explain = Callable[[Tensor, Tensor, Tensor | None], Explained]
"""(images uint8 (N, 3, H, W), labels (N,), classes of the clean maps (N,), or None for clean images) -> Explained."""


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
            needs_map = PERTURBATIONS[condition.perturbation].needs_live_map
            yield condition, batch, result._replace(valid=live) if needs_map else result


def open_warm(folder: Path) -> Run:
    """The run, cached between the shards of one process; opened again when run.json has another modification time."""
    return _open_once(folder.resolve(), (folder / "run.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_once(folder: Path, _: int) -> Run:
    return open_run(folder)


@functools.lru_cache(maxsize=1)
def load_explainer(run: Run, model: Model) -> tuple[Detector, Explainer]:
    """The model on its device and its explainer inside its block, cached between the shards of one process.

    The block is never left: no other code uses this model.
    """
    compute = run.config.compute
    settings = next(detector for detector in run.config.detectors if detector.name == model.detector)
    make_explainer = METHODS[run.config.salience.method].load()
    detector = load_model(settings, model.checkpoint, model.seed, len(run.classes))
    if detector.weights_sha256 != model.weights_sha256:
        raise CheckpointError(f"{model.checkpoint} has changed since the run began; put it back, or start a new run")
    detector.model.to(compute.device).to(memory_format=torch.channels_last)
    if compute.compile:
        shape = (largest_batch(compute), 3, *detector.input_size)
        noise = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
        images = detector.preprocess(noise.to(torch.uint8).to(compute.device))
        with _precise(images, compute.precision):
            compile_before(detector.model, images, settings.layer, make_explainer=make_explainer)
    return detector, make_explainer(detector.model, settings.layer).__enter__()


def largest_batch(compute: ComputeConfig) -> int:
    """Number of images in the largest batch of a run."""
    return min(int(compute.batch_size), compute.shard_size)


class Piece(NamedTuple):
    """Rows of a part file: some images under some conditions.

    Attributes:
        table: the rows.
        refused: the images that failed, as rows of the quarantine.
        num_images: those of the piece, failed ones included.
    """

    table: pa.Table
    refused: list[dict[str, object]]
    num_images: int


def explain_rows(
    run: Run,
    model: Model,
    rows: Sequence[int],
    *,
    precision: str,
    conditions: Sequence[Condition] | None = None,
    on_batch: Callable[[int, float], None] | None = None,
    piece_seconds: float = math.inf,
) -> Iterator[Piece]:
    """Explain some images of one model.

    Args:
        run: with the images.
        model: of the run.
        rows: of images.parquet, ascending.
        precision: ``float32`` or ``bfloat16``.
        conditions: those of the rows; None: every one of the run.
        on_batch: called with the number of images of each batch and its seconds.
        piece_seconds: a piece ends at the first batch that ends after so many seconds.

    Yields:
        Pieces of whole batches that together hold every row, at least one.
    """
    piece_started = batch_started = time.monotonic()
    detector, explainer = load_explainer(run, model)
    conditions = conditions or conditions_for(run.config.measures, detector.input_size)
    refused: list[dict[str, object]] = []
    results: dict[Condition, list[tuple[Batch, Explained]]] = {condition: [] for condition in conditions}
    choose = functools.partial(classes_to_explain, run.config.salience.target, run.classes)
    explain: Explain = functools.partial(_explain, detector, explainer, choose, precision)
    if run.config.compute.compile:
        explain = functools.partial(_padded, explain, largest_batch(run.config.compute))
    clean_batches = _read(run, model, detector, rows, refused)
    count = 0
    for condition, batch, result in explain_batches(clean_batches, explain, conditions, seed=run.config.seed):
        if condition in results:  # the clean map is made in any case
            kept = result._replace(valid=result.valid.cpu() & batch.usable)
            # an empty slice would keep all pixels in memory
            results[condition].append((batch._replace(pixels=batch.pixels.new_empty(0)), kept))
        if condition != conditions[-1]:
            continue
        now = time.monotonic()
        count += len(batch.rows)
        if on_batch:
            on_batch(len(batch.rows), now - batch_started)
        batch_started = now
        if batch.rows[-1] == rows[-1] or now - piece_started > piece_seconds:
            yield Piece(_table(model, results), refused.copy(), count)
            refused.clear()
            results = {condition: [] for condition in conditions}
            piece_started, count = now, 0


def _explain(
    detector: Detector,
    explainer: Explainer,
    choose: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    precision: str,
    images: Tensor,
    labels: Tensor,
    clean_classes: Tensor | None,
) -> Explained:
    classes = torch.empty(0)

    def remember(logits: Tensor) -> Tensor:
        nonlocal classes
        classes = choose(logits, labels, clean_classes)
        return classes

    with _precise(images, precision):
        maps, logits = explainer.explain(detector.preprocess(images), remember)
    return Explained(maps[:, 0], maps[:, 1], classes, logits, torch.ones(len(images), dtype=torch.bool))


def _padded(explain: Explain, size: int, images: Tensor, labels: Tensor, clean_classes: Tensor | None) -> Explained:
    """Explain a batch filled up to one size: compiled code is for one size. The filler is cut off again."""
    count = len(images)
    filler = [0] * max(size - count, 0)
    result = explain(
        torch.cat([images, images[filler]]),
        torch.cat([labels, labels[filler]]),
        None if clean_classes is None else torch.cat([clean_classes, clean_classes[filler]]),
    )
    return Explained(*(part[:count] for part in result))


@contextlib.contextmanager
def _precise(images: Tensor, precision: str) -> Iterator[None]:
    """Autocast of the forward passes, and on CUDA exact and deterministic convolutions."""
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with exact_convolutions(images), autocast:
        yield


def exact_convolutions(images: Tensor) -> contextlib.AbstractContextManager[None]:
    """On CUDA: full float32 instead of TF32, and deterministic algorithms."""
    if images.device.type != "cuda":
        return contextlib.nullcontext()
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def _read(
    run: Run, model: Model, detector: Detector, rows: Sequence[int], refused: list[dict[str, object]]
) -> Iterator[Batch]:
    """Decode the images of a shard ahead of the model; appends the failures to ``refused``."""
    data, compute = run.config.data, run.config.compute
    table = run.image_table.take(list(rows))
    ids, paths = table["image_id"].to_pylist(), table["path"].to_pylist()
    class_of = {label: i for i, label in enumerate(run.classes)}
    labels = torch.tensor([class_of.get(label, -1) for label in table["label"].to_pylist()])
    root = image_root(Path(data.manifest))
    assert compute.batch_size != "auto"  # a number since the run began
    for batch in batches(
        [resolve(root, path) for path in paths],
        size=detector.input_size,
        batch_size=compute.batch_size,
        interpolation=detector.interpolation,
        max_pixels=data.max_pixels,
        expected_sha256=table["sha256"].to_pylist(),
    ):
        start = min([*batch.positions, *(failure.position for failure in batch.failures)])
        usable = torch.ones(len(batch.positions) + len(batch.failures), dtype=torch.bool)
        pixels = batch.images
        for position, error in batch.failures:
            usable[position - start] = False
            image = {"image": rows[position], "image_id": ids[position], "path": paths[position], "model": model.name}
            refused.append(image | {"stage": "explain", "kind": error.kind, "message": error.message})
        if batch.failures:
            pixels = torch.zeros(len(usable), 3, *detector.input_size, dtype=torch.uint8)
            pixels[usable] = batch.images
        span = slice(start, start + len(usable))
        pixels = pixels.to(compute.device, non_blocking=True)
        yield Batch(torch.tensor(rows[span]), pixels, ids[span], labels[span], usable)


def _table(model: Model, results: dict[Condition, list[tuple[Batch, Explained]]]) -> pa.Table:
    """Rows ordered by condition, then image, without the images that could not be read."""
    pairs = [pair for batches_of_condition in results.values() for pair in batches_of_condition]
    usable = torch.cat([batch.usable for batch, _ in pairs])
    rows = torch.cat([batch.rows for batch, _ in pairs])[usable].numpy()
    explained = Explained(*(torch.cat(parts).cpu()[usable] for parts in zip(*(e for _, e in pairs), strict=True)))
    conditions = np.repeat([condition.name for condition in results], len(rows) // len(results))
    logits = explained.logits.numpy().astype(np.float32)
    invalid = ~(explained.valid.numpy() & np.isfinite(logits).all(1))
    offsets = np.arange(len(logits) + 1, dtype=np.int32) * logits.shape[1]
    same = (explained.classes[:, 0] == explained.classes[:, 1]).numpy()
    arrays = [
        pa.array(rows, pa.int32()),
        pa.array(conditions, pa.string()).dictionary_encode(),
        pa.ListArray.from_arrays(offsets, pa.array(logits.ravel()), mask=pa.array(invalid)),
        pa.array(predicted_classes(explained.logits).numpy(), pa.int32(), mask=invalid),
        _lists(explained.maps.numpy(), invalid),
        _lists(explained.fixed.numpy(), invalid | same),
    ]
    height, width = explained.maps.shape[1:]
    schema = part_schema(model.name, f"{height}x{width}", [condition.name for condition in results])
    return pa.Table.from_arrays(arrays, schema=schema)


def _lists(maps: np.ndarray, null: np.ndarray) -> pa.Array:
    values = pa.array(maps.astype(np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(values, maps.shape[1] * maps.shape[2], mask=pa.array(null))
