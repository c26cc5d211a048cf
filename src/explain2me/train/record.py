"""What a training was begun with: the record in training.json, refusals of another one, and the card at the end."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from explain2me.config.compare import flat, was_and_is
from explain2me.config.training import StrategyConfig, TrainingConfig
from explain2me.detectors.cards import CARD
from explain2me.detectors.load import Detector, sha256_without_head
from explain2me.errors import CheckpointError, ConfigError
from explain2me.run.files import write_json
from explain2me.train.data import HumanMaps, Splits, list_splits, read_splits
from explain2me.train.human_maps import listed_digest, read_all_human_maps
from explain2me.train.training import BEGUN, BEST, LAST, Progress, Training, check_architectures

MAY_DIFFER = {"threads", "listed"}
"""Keys of the record that do not tell two trainings apart."""

UNRECORDED = (
    "architectures", "strategies", "runs", "workers", "loaders", "device", "manifest", "checkpoint", "loggers",
)  # fmt: skip
"""Keys of the table [training] that decide no weight, or that the record holds under another name."""


def full_record(training: Training, splits: Splits, human_maps: HumanMaps | None, detector: Detector) -> dict[str, Any]:
    """Everything that decides the weights and the best epoch; the start of the card."""
    record = settings_record(training) | _data_record(splits, human_maps)
    if training.settings.pretrained:
        record["initial_weights"] = sha256_without_head(detector.model)
    return record


def settings_record(training: Training) -> dict[str, Any]:
    """The part of the record that the config alone decides."""
    strategy = json.loads(training.strategy.model_dump_json())
    strategy["salience"] = training.strategy.salience.partition(":")[0]
    return {
        "detector": training.detector,
        "run": training.run,
        "architecture": training.architecture,
        "seed": training.seed,
        "positive": training.data.positive,
        "strategy": strategy,
        "training": _settings_as_json(training.settings),
    }


def _settings_as_json(settings: TrainingConfig) -> dict[str, Any]:
    return json.loads(settings.model_dump_json(exclude=set(UNRECORDED)))


def _data_record(splits: Splits, human_maps: HumanMaps | None) -> dict[str, Any]:
    return {"data": splits.record, "human_maps": None if human_maps is None else human_maps.record}


def begin(training: Training, record: dict[str, Any], listed: str) -> dict[str, Any]:
    """Write the record of a new training, or compare it with the record of one that was begun.

    Args:
        training: its folder exists.
        record: of :func:`full_record`.
        listed: of :func:`explain2me.train.human_maps.listed_digest`.

    Returns:
        The record in the folder, with the number of threads that the training was begun with.

    Raises:
        ConfigError: the folder holds another training, or the study has a training on other data.
    """
    begun = read_record(training.folder)
    if begun is None:
        _refuse_other_study_data(training, record)
        begun = record | {"threads": torch.get_num_threads(), "listed": listed}
        write_json(begun, training.folder / BEGUN)
    refuse_changed(training.folder, begun, record)
    return begun


def _refuse_other_study_data(training: Training, record: dict[str, Any]) -> None:
    """All trainings of a study share images, those of a detector human maps, those of an architecture the first weights."""
    for folder in sorted(training.folder.parent.parent.glob("*/run*")):
        other = read_record(folder)
        if other is not None:
            shared = ["data"]
            shared += ["human_maps"] if folder.parent == training.folder.parent else []
            shared += ["initial_weights"] if other.get("architecture") == training.architecture else []
            _refuse_changed_part(folder, other, {key: record.get(key) for key in shared})


def refuse_other_trainings(trainings: Sequence[Training], splits: Splits | None = None) -> None:
    """Raise where a training was begun with other settings, images, classes or human maps than the config names.

    Args:
        trainings: of one study.
        splits: the images of the study, where they have been read. None: they are read only if the list of images, or
            the name, size or time of a human map, has changed since the training was begun.

    Raises:
        Explain2MeError: the message says what changed; or the images or human maps are wrong.
    """
    begun = {training: record for training in trainings if (record := read_record(training.folder)) is not None}
    for training, record in begun.items():
        _refuse_changed_part(training.folder, record, settings_record(training))
    if splits is None and begun:
        first = trainings[0]
        listed = list_splits(first.data, first.settings, first.study_seed)
        digests = {strategy: listed_digest(listed, strategy) for strategy in {each.strategy for each in begun}}
        begun = {each: record for each, record in begun.items() if record.get("listed") != digests[each.strategy]}
        splits = read_splits(listed, first.data.max_pixels, first.index) if begun else None
    if splits is None or not begun:
        return
    sizes = check_architectures(list(begun), len(splits.classes))
    human_maps = read_all_human_maps(list(begun), splits.training, sizes)
    for training, record in begun.items():
        data = _data_record(splits, human_maps[training.strategy, training.architecture])
        _refuse_changed_part(training.folder, record, data)


def _refuse_changed_part(where: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Compare only what ``after`` has."""
    refuse_changed(where, {key: before.get(key) for key in after}, after)


def refuse_changed(where: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise a ConfigError with the first key in which two records differ."""
    was, now = flat(before), flat(after)
    changed = sorted(key for key in {*was, *now} - MAY_DIFFER if was.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"{str(where)!r} holds a training begun with another config or other data: {was_and_is(was, now, changed[0])}; "
            f"give a new folder with --out, or move the old one away"
        )


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a training that was begun; None where none was. A CheckpointError where the file is damaged."""
    path = folder / BEGUN
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__}")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); move {str(folder)!r} away to train again") from None
    return with_defaults(record)


def with_defaults(record: dict[str, Any]) -> dict[str, Any]:
    """A record with the settings that were added since: they had the values that are the defaults now."""
    settings = _settings_as_json(TrainingConfig(architectures=("timm:any",)))
    strategy = json.loads(StrategyConfig(name="any").model_dump_json())
    return record | _merged({"training": settings, "strategy": strategy}, record)


def _merged(defaults: dict[str, Any], known: Any) -> dict[str, Any]:
    if not isinstance(known, dict):
        return defaults
    inner = {key: _merged(value, known.get(key)) for key, value in defaults.items() if isinstance(value, dict)}
    return defaults | known | inner


def write_card(training: Training, record: dict[str, Any], progress: Progress, detector: Detector) -> None:
    """Write the card, which says that the training is finished."""
    folder = training.folder
    card = record | {
        "best_epoch": progress.best_epoch,
        "metrics": progress.curve[progress.best_epoch - 1],
        "epochs": progress.epochs,
        "curve": progress.curve,
        "files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (BEST, LAST)},
        "seconds": round(progress.seconds, 1),
        "input": {name: list(getattr(detector, name)) for name in ("input_size", "mean", "std")}
        | {"interpolation": detector.interpolation},
        **progress.history[-1],
        **({"earlier": progress.history[:-1]} if len(progress.history) > 1 else {}),
    }
    write_json(_without_nan(card), folder / CARD)


def _without_nan(value: Any) -> Any:
    """JSON has no number that is not finite: null stands for it."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
