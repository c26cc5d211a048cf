"""Check a config against the files it names, before anything runs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from explain2me.config.compare import digest
from explain2me.config.schema import Config, DetectorConfig
from explain2me.detectors.cards import reading_warnings
from explain2me.detectors.load import Detector
from explain2me.detectors.runs import load_model, weights_of
from explain2me.errors import CheckpointError, ConfigError, Explain2MeError, ManifestError
from explain2me.images.listing import (
    check_labels,
    list_images,
    missing_files,
    sample_images,
    splits_of,
    unread_containers,
)
from explain2me.run.conditions import conditions_for
from explain2me.run.record import Model
from explain2me.run.schema import ALL, SCHEMA_VERSION
from explain2me.salience.gradcam import GradCAM
from explain2me.statistics.cells import FEW_CELLS
from explain2me.text import nearest


def check(config: Config) -> tuple[pa.Table, dict[str, Any]]:
    """Validate a config against the files it names; computes nothing and writes nothing.

    Returns:
        The listed images, and the start of run.json.

    Raises:
        Explain2MeError: the first thing that is wrong.
    """
    images, classes = check_images(config)
    sizes = check_models(config, len(classes) or None)
    models = list(sizes)
    if not classes:
        classes = tuple(str(i) for i in range(models[0].num_classes))
    if config.salience.target not in ("predicted", "true", *classes):
        raise ConfigError(
            f"salience.target: expected predicted, true or a class, got {config.salience.target!r}; "
            f"{nearest(config.salience.target, ['predicted', 'true', *classes])}"
        )
    record = {
        "schema": SCHEMA_VERSION,
        "config": json.loads(config.model_dump_json()),
        "classes": list(classes),
        "models": json.loads(json.dumps([asdict(model) for model in models])),
        "map_sizes": {model.name: list(size) for model, size in sizes.items()},
        "listed": digest(images.to_pylist()),
    }
    return images, record


def check_images(config: Config) -> tuple[pa.Table, tuple[str, ...]]:
    """The listed images and their classes in the order of the logits; opens no image.

    Raises:
        Explain2MeError: the first thing that is wrong.
    """
    images = list_images(Path(config.data.manifest), split=config.data.split, classes=config.data.classes)
    for name in ("label", "source"):
        if ALL in images[name].to_pylist():
            raise ManifestError(f"{config.data.manifest!r}: the {name} {ALL!r} means all of them; rename it")
    images = sample_images(images, config.data.sample, seed=config.seed)
    labelled = images["label"].null_count < len(images)
    if not labelled and config.salience.target == "true":
        raise ConfigError("salience.target = 'true' needs labels, the manifest has none; use 'predicted'")
    return images, class_names(config, images, repr(config.data.manifest))


def warnings_of(
    config: Config,
    models: Sequence[Model],
    images: pa.Table,
    *,
    classes: Sequence[str] = (),
    map_sizes: Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """What is allowed and probably not meant.

    Args:
        config: of the run.
        models: of it.
        images: that are listed; of a manifest some are looked for, none is opened.
        classes: in the order of the logits.
        map_sizes: height and width of the maps of each model in cells, by its name.
    """
    found = reading_warnings(models, classes)
    sizes = {(model.architecture, tuple((map_sizes or {})[model.name])) for model in models} if map_sizes else set()
    found += [
        f"the maps of {architecture} have only {size[0]} x {size[1]} cells: they say little of where a model looks; a larger "
        f"input_size {'gives' if config.training else 'or an earlier layer gives'} finer maps"
        for architecture, size in sorted(sizes)
        if math.prod(size) < FEW_CELLS
    ]
    missing, looked = missing_files(Path(config.data.manifest), images)
    if missing:
        of_them = (
            f"{looked} images"
            if looked == len(images)
            else f"{looked} images that were looked for ({len(images)} in all)"
        )
        found.append(
            f"no file where the manifest says it is, for {len(missing)} of {of_them}, first {missing[0]!r}: paths are relative to the "
            f"folder of the manifest, or absolute"
        )
    if "positive" in config.data.model_fields_set and images["label"].null_count == len(images):
        found.append(
            f"data.positive = {config.data.positive!r} is set, but no image has a label (column 'label' of a manifest, the folders "
            f"of a folder), so there is no AUROC"
        )
    splits = splits_of(Path(config.data.manifest))
    if config.data.split is None and len(splits) > 1:
        named = ", ".join(f"{name!r} ({count})" for name, count in sorted(splits.items()))
        found.append(f"data.split is not set, so the rows of all splits are taken: {named}")
    unread = unread_containers(Path(config.data.manifest))
    if unread:
        found.append(
            f"data.manifest is read as a folder of images, so its {len(unread)} container files are left out, first {unread[0]!r}"
        )
    return found


def class_names(
    config: Config,
    images: pa.Table,
    where: str,
    *,
    alone: str = "add images of another label, without which there is no AUROC, or name in data.classes all labels that "
    "the model knows, in the order of its logits",
) -> tuple[str, ...]:
    """Labels in the order of the logits: two labels are (other, positive), more are sorted; () without labels.

    Args:
        config: says which class is positive, and perhaps the order.
        images: with the column label.
        where: they are listed, for errors.
        alone: what to do where all have one label, for errors.

    Raises:
        ManifestError: a label that is not among data.classes.
        ConfigError: data.positive is not a class.
    """
    found = sorted(set(images["label"].drop_null().to_pylist()))
    classes, positive = config.data.classes, config.data.positive
    folded = {label.casefold().strip() for label in found}
    if len(folded) < len(found):
        raise ManifestError(
            f"{where}: expected labels that differ by more than case and spaces, got {found}; write each "
            f"class in one way"
        )
    if classes is not None:
        check_labels(images, classes)
    elif len(found) == 1:
        raise ConfigError(f"{where}: expected images of at least two labels, got only {found[0]!r}; {alone}")
    else:
        classes = tuple(sorted(found, key=lambda label: (label == positive and len(found) == 2, label)))
    if classes and positive not in classes:
        raise ConfigError(
            f"data.positive: expected one of the labels {', '.join(map(repr, classes))} of {where}, got {positive!r}; "
            f"{nearest(positive, classes)}"
        )
    return classes


def check_models(config: Config, num_classes: int | None) -> dict[Model, tuple[int, int]]:
    """Load every checkpoint once, and check its classes, layer and conditions.

    Returns:
        Every model, and height and width of its maps in cells.

    Raises:
        CheckpointError, LayerError, ConfigError: the first detector that cannot be used.
    """
    if not config.detectors:
        raise ConfigError(
            "detectors: this config has none but trains its own ([training]); call `explain2me study` with it, which "
            "trains and then runs"
        )
    sizes: dict[Model, tuple[int, int]] = {}
    for wanted in config.detectors:
        runs = weights_of(wanted, config.seed)
        if config.measures.stability and len(runs) < 2:
            raise ConfigError(
                f"measures.stability compares training runs and needs at least 2 of each detector, {wanted.name!r} has "
                f"{len(runs)}; add checkpoints, or set measures.stability = false"
            )
        found = dict(_check_model(config, wanted, *weights, num_classes) for weights in runs)
        _refuse_copies(wanted.name, list(found))
        sizes |= found
    heads = {model.num_classes for model in sizes}
    if len(heads) > 1:
        raise ConfigError(
            f"detectors: expected the same number of classes in all, got {sorted(heads)}; compare like with like"
        )
    return sizes


def _refuse_copies(detector: str, models: Sequence[Model]) -> None:
    """The same weights twice are no two training runs: they would agree perfectly."""
    seen: dict[str, Model] = {}
    for model in models:
        first = seen.setdefault(model.weights_sha256, model)
        if first is not model:
            raise CheckpointError(
                f"detector {detector!r}: {first.checkpoint or first.run!r} and {model.checkpoint or model.run!r} hold the "
                f"same weights, so they are not two training runs; list one of them"
            )


def _check_model(
    config: Config, wanted: DetectorConfig, run: str, checkpoint: str | None, seed: int, num_classes: int | None
) -> tuple[Model, tuple[int, int]]:
    detector = load_model(wanted, checkpoint, seed, num_classes)
    conditions_for(config.measures, detector.input_size)
    blank = torch.zeros(1, 3, *detector.input_size, dtype=torch.uint8)
    with GradCAM(detector.model, layer=wanted.layer) as cam:
        try:
            maps, _ = cam(detector.preprocess(blank))
        except Explain2MeError as error:
            raise type(error)(f"detector {wanted.name!r}: {error}") from None
        except Exception:
            _refuse_size(wanted, detector, blank)
            raise
        layer = cam.layer
    model = Model(
        detector=wanted.name,
        run=run,
        architecture=wanted.architecture,
        checkpoint=checkpoint,
        seed=seed,
        weights_sha256=detector.weights_sha256,
        layer=layer,
        input_size=detector.input_size,
        num_classes=detector.num_classes,
        mean=tuple(detector.mean),
        std=tuple(detector.std),
        interpolation=detector.interpolation,
    )
    return model, (maps.shape[-2], maps.shape[-1])


def _refuse_size(wanted: DetectorConfig, detector: Detector, blank: torch.Tensor) -> None:
    """Raise ConfigError where the model alone fails as well: then its input has not the size that it needs."""
    try:
        with torch.no_grad():
            detector.model(detector.preprocess(blank))
    except Exception as error:
        height, width = detector.input_size
        reason = str(error).split("\n", maxsplit=1)[0][:160]
        raise ConfigError(
            f"detector {wanted.name!r}: {wanted.architecture} does not take images of {height} x {width} pixels ({reason}); "
            f"change input_size or leave it out"
        ) from None
