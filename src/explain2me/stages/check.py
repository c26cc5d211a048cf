"""Check a config against the files that it names, before anything runs."""

import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import nn

from explain2me.config.compare import digest
from explain2me.config.schema import Config, DataConfig, DetectorConfig, MeasuresConfig
from explain2me.detectors.cards import reading_warnings
from explain2me.detectors.load import Detector
from explain2me.detectors.runs import check_runs, load_model, weights_of
from explain2me.errors import CheckpointError, ConfigError, Explain2MeError
from explain2me.images.listing import Listing, missing_files
from explain2me.images.select import Selection, refuse_unlabelled_target, select_images
from explain2me.run.conditions import conditions_for
from explain2me.run.record import Model
from explain2me.run.schema import SCHEMA_VERSION
from explain2me.salience.gradcam import choose_predicted
from explain2me.salience.methods import METHODS, Explainer
from explain2me.statistics.cells import FEW_CELLS
from explain2me.text import nearest


def check(config: Config, selection: Selection | None = None) -> tuple[pa.Table, dict[str, Any]]:
    """Check a config against the files that it names. Opens no image, and writes nothing.

    Takes the selection of :func:`explain2me.images.select.select_images` if it was made already. Gives the listed images,
    and the start of run.json.

    Raises:
        Explain2MeError: the first mistake.
    """
    images, classes, _ = selection or select_images(config.data, config.seed)
    refuse_unlabelled_target(config.salience.target, images)
    map_sizes = _check_models(config, len(classes) or None)
    models = list(map_sizes)
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
        "map_sizes": {model.name: list(size) for model, size in map_sizes.items()},
        "listed": digest(images.to_pylist()),
    }
    return images, record


def warnings_of(
    config: Config,
    models: Sequence[Model],
    images: pa.Table,
    listing: Listing,
    *,
    classes: Sequence[str] = (),
    map_sizes: Mapping[str, Sequence[int]] | None = None,
) -> list[str]:
    """What is allowed and probably not meant.

    Args:
        images: that the run takes; some files of a manifest are looked for, none is opened.
        listing: of :func:`explain2me.images.select.list_data`.
        classes: in the order of the logits.
        map_sizes: height and width in cells of the maps of each model, by its name.
    """
    return [
        *reading_warnings(models, classes),
        *_coarse_maps(models, map_sizes or {}, trained_here=config.training is not None),
        *_missing_files(Path(config.data.manifest), images),
        *_listing_warnings(config.data, images, listing),
    ]


def _coarse_maps(
    models: Sequence[Model], map_sizes: Mapping[str, Sequence[int]], *, trained_here: bool
) -> Iterator[str]:
    sizes = {(model.architecture, tuple(map_sizes[model.name])) for model in models if map_sizes}
    for architecture, size in sorted(sizes):
        if math.prod(size) < FEW_CELLS:
            yield (
                f"the maps of {architecture} have only {size[0]} x {size[1]} cells: they say little of where a model looks; "
                f"a larger input_size {'gives' if trained_here else 'or an earlier layer gives'} finer maps"
            )


def _missing_files(manifest: Path, images: pa.Table) -> Iterator[str]:
    missing, num_looked_for = missing_files(manifest, images)
    if missing:
        all_or_some = "" if num_looked_for == len(images) else f" that were looked for ({len(images)} in all)"
        yield (
            f"no file where the manifest says it is, for {len(missing)} of {num_looked_for} images{all_or_some}, first "
            f"{missing[0]!r}: paths are relative to the folder of the manifest, or absolute"
        )


def _listing_warnings(data: DataConfig, images: pa.Table, listing: Listing) -> Iterator[str]:
    if "positive" in data.model_fields_set and images["label"].null_count == len(images):
        yield (
            f"data.positive = {data.positive!r} is set, but no image has a label (column 'label' of a manifest, the folders "
            f"of a folder), so there is no AUROC"
        )
    if data.split is None and len(listing.splits) > 1:
        named = ", ".join(f"{name!r} ({count})" for name, count in sorted(listing.splits.items()))
        yield f"data.split is not set, so the rows of all splits are taken: {named}"
    if names := listing.containers_left_out:
        yield (
            f"data.manifest is read as a folder of images, so its {len(names)} container files are left out, first {names[0]!r}"
        )


def _check_models(config: Config, num_classes: int | None) -> dict[Model, tuple[int, int]]:
    """Load every checkpoint once, and check its classes, layer and conditions; gives height and width of its maps."""
    if not config.detectors:
        raise ConfigError(
            "detectors: this config has none but trains its own ([training]); call `explain2me study` with it, which "
            "trains and then runs"
        )
    check_runs(config.detectors, config.measures, config.seed)
    make_explainer = METHODS[config.salience.method].load()
    sizes: dict[Model, tuple[int, int]] = {}
    for settings in config.detectors:
        sizes_of_runs = dict(
            _check_model(settings, *weights, num_classes, measures=config.measures, make_explainer=make_explainer)
            for weights in weights_of(settings, config.seed)
        )
        _refuse_copies(settings.name, list(sizes_of_runs))
        sizes |= sizes_of_runs
    _refuse_shared_folders(sizes)
    heads = {model.num_classes for model in sizes}
    if len(heads) > 1:
        raise ConfigError(
            f"detectors: expected the same number of classes in all, got {sorted(heads)}; compare like with like"
        )
    return sizes


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


def _refuse_shared_folders(models: Iterable[Model]) -> None:
    """Refuse two runs whose maps would lie in one folder, as ``a_`` + ``__`` + ``b`` and ``a`` + ``__`` + ``_b``.

    Some file systems ignore case or Unicode form.
    """
    seen: dict[str, Model] = {}
    for model in models:
        first = seen.setdefault(unicodedata.normalize("NFC", model.name).casefold(), model)
        if first is not model:
            raise ConfigError(
                f"detectors: run {first.run!r} of {first.detector!r} and run {model.run!r} of {model.detector!r} would share "
                f"the folder maps/model={model.name}; rename a detector or a checkpoint"
            )


def _check_model(
    settings: DetectorConfig,
    run: str,
    checkpoint: str | None,
    seed: int,
    num_classes: int | None,
    *,
    measures: MeasuresConfig,
    make_explainer: Callable[[nn.Module, str], Explainer],
) -> tuple[Model, tuple[int, int]]:
    """Load one model and explain a blank image; gives the model, and height and width of its maps in cells."""
    detector = load_model(settings, checkpoint, seed, num_classes)
    conditions_for(measures, detector.input_size)
    blank = torch.zeros(1, 3, *detector.input_size, dtype=torch.uint8)
    with make_explainer(detector.model, settings.layer) as explainer:
        try:
            maps, _ = explainer.explain(detector.preprocess(blank), choose_predicted)
        except Explain2MeError as error:
            raise type(error)(f"detector {settings.name!r}: {error}") from None
        except Exception:
            _refuse_size(settings, detector, blank)
            raise
    model = Model(
        detector=settings.name,
        run=run,
        architecture=settings.architecture,
        checkpoint=checkpoint,
        seed=seed,
        weights_sha256=detector.weights_sha256,
        layer=explainer.layer,
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
            f"detector {settings.name!r}: {settings.architecture} fails on a blank image of {height} x {width} pixels "
            f"({reason}); look whether it takes images of that size, which input_size sets"
        ) from None
