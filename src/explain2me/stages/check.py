"""Check a config against the files it names, before stage 1 runs."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from explain2me.config.compare import digest
from explain2me.config.schema import Config, DetectorConfig, MeasuresConfig
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
from explain2me.salience.gradcam import choose_predicted
from explain2me.salience.methods import METHODS
from explain2me.statistics.cells import FEW_CELLS
from explain2me.text import nearest


def check(config: Config) -> tuple[pa.Table, dict[str, Any]]:
    """Check a config against the files it names. Computes no scores and writes no file.

    Returns:
        The listed images, and the first fields of run.json.

    Raises:
        Explain2MeError: the first mistake.
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
    """The listed images, and their classes in the order of the logits. Opens no image.

    Raises:
        Explain2MeError: the first mistake.
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
    """Settings that are allowed and probably mistakes.

    Args:
        config: of the run.
        models: of the run.
        images: the listed images. Some files of a manifest are looked up; no image is opened.
        classes: in the order of the logits.
        map_sizes: height and width of the maps in cells, by name of the model.
    """
    return [
        *reading_warnings(models, classes),
        *_coarse_maps(config, models, map_sizes or {}),
        *_missing_files(config, images),
        *_unused_settings(config, images),
    ]


def _coarse_maps(config: Config, models: Sequence[Model], map_sizes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    sizes = {(model.architecture, tuple(map_sizes[model.name])) for model in models} if map_sizes else set()
    for architecture, size in sorted(sizes):
        if math.prod(size) < FEW_CELLS:
            yield (
                f"the maps of {architecture} have only {size[0]} x {size[1]} cells: they say little of where a model looks; a larger "
                f"input_size {'gives' if config.training else 'or an earlier layer gives'} finer maps"
            )


def _missing_files(config: Config, images: pa.Table) -> Iterator[str]:
    missing, looked = missing_files(Path(config.data.manifest), images)
    if missing:
        of_them = (
            f"{looked} images"
            if looked == len(images)
            else f"{looked} images that were looked for ({len(images)} in all)"
        )
        yield (
            f"no file where the manifest says it is, for {len(missing)} of {of_them}, first {missing[0]!r}: paths are relative to the "
            f"folder of the manifest, or absolute"
        )


def _unused_settings(config: Config, images: pa.Table) -> Iterator[str]:
    """Warnings of settings, splits and container files that have no effect on this list of images."""
    if "positive" in config.data.model_fields_set and images["label"].null_count == len(images):
        yield (
            f"data.positive = {config.data.positive!r} is set, but no image has a label (column 'label' of a manifest, the folders "
            f"of a folder), so there is no AUROC"
        )
    splits = splits_of(Path(config.data.manifest))
    if config.data.split is None and len(splits) > 1:
        named = ", ".join(f"{name!r} ({count})" for name, count in sorted(splits.items()))
        yield f"data.split is not set, so the rows of all splits are taken: {named}"
    unread = unread_containers(Path(config.data.manifest))
    if unread:
        yield (
            f"data.manifest is read as a folder of images, so its {len(unread)} container files are left out, first {unread[0]!r}"
        )


def class_names(
    config: Config,
    images: pa.Table,
    where: str,
    *,
    alone: str = "add images of another label, without which there is no AUROC, or name in data.classes all labels that "
    "the model knows, in the order of its logits",
) -> tuple[str, ...]:
    """Labels in the order of the logits: two labels are ordered (other, positive), more are sorted; () without labels.

    Args:
        config: with the positive class, and perhaps the order of the classes.
        images: with the column label.
        where: place of the list of images, for errors.
        alone: advice for images that all have one label, for errors.

    Raises:
        ManifestError: a label that is not among data.classes.
        ConfigError: data.positive is not a class.
    """
    labels = sorted(set(images["label"].drop_null().to_pylist()))
    classes, positive = config.data.classes, config.data.positive
    folded = {label.casefold().strip() for label in labels}
    if len(folded) < len(labels):
        raise ManifestError(
            f"{where}: expected labels that differ by more than case and spaces, got {labels}; write each "
            f"class in one way"
        )
    if classes is not None:
        check_labels(images, classes)
    elif len(labels) == 1:
        raise ConfigError(f"{where}: expected images of at least two labels, got only {labels[0]!r}; {alone}")
    else:
        classes = tuple(sorted(labels, key=lambda label: (label == positive and len(labels) == 2, label)))
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
    for settings in config.detectors:
        runs = weights_of(settings, config.seed)
        refuse_single_runs(
            config.measures, len(runs), count=f"{settings.name!r} has {len(runs)}", remedy="add checkpoints"
        )
        sizes_of_runs = dict(_check_model(config, settings, *weights, num_classes) for weights in runs)
        _refuse_copies(settings.name, list(sizes_of_runs))
        sizes |= sizes_of_runs
    heads = {model.num_classes for model in sizes}
    if len(heads) > 1:
        raise ConfigError(
            f"detectors: expected the same number of classes in all, got {sorted(heads)}; compare like with like"
        )
    return sizes


def refuse_single_runs(measures: MeasuresConfig, num_runs: int, *, count: str, remedy: str) -> None:
    """Refuse measures of pairs of training runs where a detector has a single run.

    Args:
        measures: of the config.
        num_runs: of the detector.
        count: the number of runs in words, for the error.
        remedy: a way to get more runs, for the error.

    Raises:
        ConfigError: such a measure is on, and there are fewer than two runs.
    """
    for measure in measures.chosen:
        if num_runs < measure.runs_per_value:
            raise ConfigError(
                f"measures.{measure.name} compares training runs and needs at least {measure.runs_per_value} of each "
                f"detector, {count}; {remedy}, or set measures.{measure.name} = false"
            )


def _refuse_copies(detector: str, models: Sequence[Model]) -> None:
    """Refuse two runs with the same weights: these are not two training runs, and they would agree perfectly."""
    seen: dict[str, Model] = {}
    for model in models:
        first = seen.setdefault(model.weights_sha256, model)
        if first is not model:
            raise CheckpointError(
                f"detector {detector!r}: {first.checkpoint or first.run!r} and {model.checkpoint or model.run!r} hold the "
                f"same weights, so they are not two training runs; list one of them"
            )


def _check_model(
    config: Config, settings: DetectorConfig, run: str, checkpoint: str | None, seed: int, num_classes: int | None
) -> tuple[Model, tuple[int, int]]:
    """Load one model and explain a blank image; gives the model, and height and width of its maps in cells."""
    detector = load_model(settings, checkpoint, seed, num_classes)
    conditions_for(config.measures, detector.input_size)
    blank = torch.zeros(1, 3, *detector.input_size, dtype=torch.uint8)
    with METHODS[config.salience.method].load()(detector.model, settings.layer) as explainer:
        try:
            maps, _ = explainer.explain(detector.preprocess(blank), choose_predicted)
        except Explain2MeError as error:
            raise type(error)(f"detector {settings.name!r}: {error}") from None
        except Exception:
            _refuse_size(settings, detector, blank)
            raise
        layer = explainer.layer
    model = Model(
        detector=settings.name,
        run=run,
        architecture=settings.architecture,
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


def _refuse_size(settings: DetectorConfig, detector: Detector, blank: torch.Tensor) -> None:
    """Raise ConfigError where the model alone fails too: then it does not take images of this size."""
    try:
        with torch.no_grad():
            detector.model(detector.preprocess(blank))
    except Exception as error:
        height, width = detector.input_size
        reason = str(error).split("\n", maxsplit=1)[0][:160]
        raise ConfigError(
            f"detector {settings.name!r}: {settings.architecture} does not take images of {height} x {width} pixels ({reason}); "
            f"change input_size or leave it out"
        ) from None
