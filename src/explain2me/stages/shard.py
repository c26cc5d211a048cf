"""One shard: its images decoded, perturbed and explained, as rows of a part file."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from explain2me.detectors.load import Detector
from explain2me.detectors.runs import load_model
from explain2me.errors import CheckpointError
from explain2me.images.batches import batches
from explain2me.images.listing import image_root, resolve
from explain2me.measures import is_dead, is_flat
from explain2me.run.conditions import CLEAN, Condition, conditions_for, perturb
from explain2me.run.folder import Run, open_run
from explain2me.run.record import Model
from explain2me.run.schema import SCHEMA_VERSION, maps_schema
from explain2me.salience.compiling import compile_before
from explain2me.salience.gradcam import GradCAM, predicted_classes


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


def open_warm(folder: Path) -> Run:
    """The run, kept open between the shards of one process; run.json is replaced whole, so its times tell it apart."""
    return _open_once(folder.resolve(), (folder / "run.json").stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_once(folder: Path, _: int) -> Run:
    return open_run(folder)


@functools.lru_cache(maxsize=1)
def load_explainer(run: Run, model: Model) -> tuple[Detector, GradCAM]:
    """The model on its device, warm between the shards of one process, and opened to be explained: nobody else has it."""
    wanted = next(detector for detector in run.config.detectors if detector.name == model.detector)
    detector = load_model(wanted, model.checkpoint, model.seed, len(run.classes))
    if detector.weights_sha256 != model.weights_sha256:
        raise CheckpointError(f"{model.checkpoint} has changed since the run began; put it back, or start a new run")
    detector.model.to(run.config.compute.device).to(memory_format=torch.channels_last)
    if run.config.compute.compile:
        noise = torch.randint(
            0, 256, (largest_batch(run), 3, *detector.input_size), generator=torch.Generator().manual_seed(0)
        )
        images = detector.preprocess(noise.to(torch.uint8).to(run.config.compute.device))
        autocast = torch.autocast(
            images.device.type, torch.bfloat16, enabled=run.config.compute.precision == "bfloat16"
        )
        with exact_convolutions(images), autocast:
            compile_before(detector.model, images, wanted.layer)
    return detector, GradCAM(detector.model, layer=wanted.layer).__enter__()


def largest_batch(run: Run) -> int:
    """The largest batch of a run."""
    return min(int(run.config.compute.batch_size), run.config.compute.shard_size)


def explain_rows(
    run: Run,
    model: Model,
    rows: Sequence[int],
    *,
    precision: str,
    crashing: Collection[int],
    on_batch: Callable[[int, float], None] | None = None,
) -> tuple[pa.Table, list[dict[str, object]]]:
    """Explain some images of one model under every condition: rows of a part file, and the images that failed."""
    started = time.monotonic()
    detector, cam = load_explainer(run, model)
    conditions = conditions_for(run.config.measures, detector.input_size)
    refused: list[dict[str, object]] = []
    results: dict[Condition, list[tuple[Batch, Explained]]] = {condition: [] for condition in conditions}
    explain: Explain = functools.partial(_explain, detector, cam, run, precision)
    if run.config.compute.compile:
        explain = functools.partial(_padded, explain, largest_batch(run))
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
        exact_convolutions(images),
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


def exact_convolutions(images: Tensor) -> contextlib.AbstractContextManager[None]:
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
