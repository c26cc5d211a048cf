"""A study: train every detector of a config, then the config of the run that compares them."""

import contextlib
import csv
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from explain2me.config.schema import Config, DetectorConfig
from explain2me.config.training import TrainingConfig
from explain2me.detectors.architectures import settings_of_weights
from explain2me.errors import ConfigError, DivergedError, RunFolderError
from explain2me.stages.check import check, refuse_single_runs
from explain2me.stages.refusals import other_than_run
from explain2me.train.cams import find_features
from explain2me.train.data import Splits, list_splits, read_splits, training_classes
from explain2me.train.devices import training_device
from explain2me.train.human_maps import listed_digest, read_human_maps
from explain2me.train.loop import train_if_possible
from explain2me.train.record import refuse_other_data, refuse_other_settings
from explain2me.train.training import METRICS, OnStep, Training, build_detector, epoch_text
from explain2me.workers import Engine, repeating, run_tasks
from explain2me.workers.device import with_device

OnTrained = Callable[[Training, int, int], None]
"""Called with a training that is over, the number of those that are over, and the number of all."""

LOOK_SECONDS = 1.0
"""Time between two looks at the epochs that other processes have committed."""


def trainings(config: Config, out: Path) -> list[Training]:
    """Every run of every detector to train, in order: architecture x strategy, then run.

    Raises:
        ConfigError: the config trains nothing, or a detector to train has the name of one in ``detectors``.
    """
    settings = config.training
    if settings is None:
        raise ConfigError(
            "training is missing: this config has nothing to train; add a table [training], or call `explain2me run`"
        )
    every = [
        _in_folder(Training(config, architecture, strategy, run, Path()), out)
        for architecture in settings.architectures
        for strategy in settings.strategies
        for run in range(settings.runs)
    ]
    taken = {detector.name for detector in config.detectors} & {training.detector for training in every}
    if taken:
        raise ConfigError(f"detectors: {min(taken)!r} is the name of a detector to train as well; rename it")
    return every


def train_missing(
    config: Config,
    out: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    on_start: Callable[[Sequence[Training], int], None] | None = None,
    on_step: OnStep | None = None,
    on_trained: OnTrained | None = None,
) -> list[Training]:
    """Train what is not finished; a second call continues where the first stopped.

    Args:
        config: with a table [training].
        out: folder; each training gets ``training/DETECTOR/runNN`` in it.
        shard: (i, N) takes every N-th training, from the i-th: for several machines on one folder.
        on_start: called with the trainings of this shard that are not finished, and the number of all of this shard.
        on_step: of :func:`train_detector`; with several workers it counts epochs of all trainings instead of steps.
        on_trained: called after each training, also one that diverged; ``outcome`` says which.

    Returns:
        The trainings that are not finished, of all shards.

    Raises:
        Explain2MeError: wrong input; finished trainings stay.
        ConfigError: another process is training one of these; the others are finished.
        DivergedError: a training diverged; the others are finished.
    """
    every = trainings(config, out.resolve())
    for training in every:
        refuse_other_settings(training)
    refuse_other_data(every)
    mine = every[shard[0] :: shard[1]]
    missing = [training for training in mine if not training.done]
    if on_start:
        on_start(missing, len(mine))
    if missing:
        read_data(missing, check_architectures(missing))
        check_devices(config)
    done = _train(config, missing, on_step)
    for count, training in enumerate(done, start=len(mine) - len(missing) + 1):
        if on_trained:
            on_trained(training, count, len(mine))
    _refuse_unfinished(missing, len(mine))
    left = [training for training in every if not training.done]
    if missing and not left:
        refuse_other_data(every)  # two machines may have begun at the same moment, with different data
    return left


def _train(config: Config, missing: Sequence[Training], on_step: OnStep | None) -> Iterator[Training]:
    """Yield each training when it is over."""
    assert config.training is not None
    engine = engine_for_training(config)
    here = engine.executor == "local" and (engine.workers == 1 or len(missing) < 2) and config.training.devices == 1
    work = functools.partial(train_if_possible, on_step=on_step) if here else train_if_possible
    to_lower = "training.workers, or give a new folder with a smaller training.batch_size"
    with contextlib.nullcontext() if here else _telling_epochs(missing, on_step):
        yield from run_tasks(work, missing, engine, after_death=repeating(to_lower))


def _refuse_unfinished(tried: Sequence[Training], num_mine: int) -> None:
    """Raise where a training diverged, or another process is training it."""
    diverged = [training.outcome() for training in tried if training.diverged]
    if diverged:
        raise DivergedError(
            f"{len(diverged)} of {num_mine} trainings diverged, the others are finished. {diverged[0]}"
            if num_mine > 1
            else diverged[0]
        )
    locked = [training for training in tried if not training.done]
    if locked:
        others = f" ({len(locked)} of {num_mine} trainings are locked, the others are finished)"
        raise ConfigError(locked[0].locked_message() + (others if num_mine > 1 else ""))


def check_architectures(trainings: Sequence[Training]) -> dict[str, tuple[int, int]]:
    """Build each architecture once, and find its features where a strategy guides it, before hours of training.

    Returns:
        Height and width of the input of each architecture.

    Raises:
        Explain2MeError: one is unknown, takes no such input or number of classes, or cannot be guided.
    """
    sizes: dict[str, tuple[int, int]] = {}
    num_classes = len(training_classes(trainings[0].config, trainings[0].settings))
    for architecture in dict.fromkeys(training.architecture for training in trainings):
        same = [training for training in trainings if training.architecture == architecture]
        detector = build_detector(same[0], num_classes)
        if any(training.strategy.guided for training in same):
            find_features(detector.model, detector.input_size)
        sizes[architecture] = detector.input_size
    return sizes


def read_data(trainings: Sequence[Training], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Read and check the images and human maps of a study once, before the first training; see ``Training.index``.

    Args:
        trainings: of one config.
        sizes: height and width of the input of each architecture.

    Raises:
        Explain2MeError: an image or a human map is missing or wrong.
    """
    first = trainings[0]
    listing = list_splits(first.config, first.settings)
    for strategy in dict.fromkeys(training.strategy for training in trainings):
        listed_digest(listing, strategy)  # raises before a file is written
    rows = read_splits(first.config, first.settings, first.index).training
    for strategy, architecture in dict.fromkeys((training.strategy, training.architecture) for training in trainings):
        read_human_maps(strategy, rows, sizes[architecture], first.index)


def check_settings(config: Config) -> None:
    """Find settings that no comparison can have; reads no data.

    Raises:
        ConfigError: too few runs to compare.
    """
    assert config.training is not None
    runs = config.training.runs
    refuse_single_runs(config.measures, runs, count=f"got training.runs = {runs}", remedy="raise it")


def check_devices(config: Config) -> None:
    """Check the devices of this machine; the nodes of a Ray cluster check their own.

    Raises:
        ConfigError: devices that are absent or would be used twice.
    """
    assert config.training is not None
    if config.compute.executor == "local":
        refuse_shared_gpus(config.training)


def check_comparison(config: Config) -> tuple[pa.Table, dict[str, Any]]:
    """Check the comparison with random weights of each architecture in place of those to be trained.

    Returns:
        The images to test, and the start of run.json, as :func:`explain2me.stages.check.check` does.

    Raises:
        Explain2MeError: images, measures, salience, device or a detector would stop the comparison.
    """
    compared, settings = evaluation(config, Path()), config.training
    assert settings is not None
    rehearsed = tuple(
        DetectorConfig(
            name=f"{architecture.partition(':')[2]}-{settings.strategies[0].name}",
            architecture=architecture,
            random_runs=min(settings.runs, 2),
            **_reading(architecture, settings),
        )
        for architecture in settings.architectures
    )
    return check(with_device(compared.model_copy(update={"detectors": (*rehearsed, *config.detectors)})))


def check_study(config: Config, out: Path) -> None:
    """Check, before hours of training, that the comparison can be made after them; opens no image.

    Raises:
        Explain2MeError: the images to test or the runs cannot be compared, or ``out`` holds another comparison.
    """
    every = trainings(config, out)
    check_settings(config)
    if not all(training.done for training in every):
        check_devices(config)
        check_comparison(config)
    refuse_other_study(config, out)


def refuse_other_study(config: Config, out: Path, splits: Splits | None = None) -> None:
    """Raise where ``out`` holds trainings with other settings or data, or the comparison of another study.

    Args:
        config: of the study.
        out: its folder.
        splits: its images, where they have been read; see :func:`refuse_other_data`.

    Raises:
        ConfigError, RunFolderError: the message says what changed.
    """
    every = trainings(config, out)
    for training in every:
        refuse_other_settings(training)
    refuse_other_data(every, splits)
    change = other_than_run(evaluation(config, out), out / "run")
    if change is not None:
        raise RunFolderError(
            f"{str(out / 'run')!r} holds the comparison of this study as it was before: {change}. Delete that folder, and the "
            f"comparison is made again (what was trained stays), or give a new folder with --out"
        )


def refuse_shared_gpus(settings: TrainingConfig) -> None:
    """Refuse several trainings at a time on several GPUs each: all of them would take the first GPUs.

    Raises:
        ConfigError: the config asks for that, or a device is absent.
    """
    if training_device(settings) == "cuda" and settings.workers > 1 and settings.devices > 1:
        raise ConfigError(
            f"training.workers = {settings.workers} with training.devices = {settings.devices}: the trainings would share "
            f"their GPUs; set one of the two to 1, or start the command once for each group of GPUs with "
            f"CUDA_VISIBLE_DEVICES and --shard"
        )


@contextlib.contextmanager
def _telling_epochs(missing: Sequence[Training], on_step: OnStep | None) -> Iterator[None]:
    """Call ``on_step`` for the epochs that workers, here or elsewhere, commit meanwhile."""
    if on_step is None:
        yield
        return
    over = threading.Event()

    def look() -> None:
        committed = {training: _epochs_done(training)[0] for training in missing}
        last = False
        while not last:
            last = over.wait(LOOK_SECONDS)
            for training in missing:
                epochs, text = _epochs_done(training)
                epochs = training.settings.epochs if training.done else epochs  # patience may have ended it
                if epochs > committed[training]:
                    committed[training] = epochs
                    on_step(
                        sum(committed.values()),
                        sum(training.settings.epochs for training in missing),
                        f"{training.detector} run {training.run}, {text}",
                    )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _epochs_done(training: Training) -> tuple[int, str]:
    """Number of committed epochs, and the last one in words."""
    try:
        lines = list(csv.DictReader((training.folder / METRICS).read_text(encoding="utf-8").splitlines()))
        return len(lines), epoch_text({name: float(value) for name, value in lines[-1].items() if value})
    except (OSError, ValueError, TypeError, LookupError):  # no file yet, or a network disk shows half of it
        return 0, ""


def engine_for_training(config: Config) -> Engine:
    """The workers of the trainings."""
    settings, compute = config.training, config.compute
    assert settings is not None
    threads = compute.threads or max(1, torch.get_num_threads() // settings.workers)
    on_gpus = settings.device.startswith("cuda") or (settings.device == "auto" and torch.cuda.is_available())
    gpus = 0.0 if not on_gpus else compute.gpus_per_worker if settings.devices == 1 else float(settings.devices)
    return Engine(compute.executor, settings.workers, threads, compute.ray_address, gpus)


def evaluation(config: Config, out: Path) -> Config:
    """The config of the run that compares the trained detectors with each other and with those in ``detectors``.

    The classes are those of the images to train on, in the order of the logits.
    """
    assert config.training is not None
    names: dict[str, list[Training]] = {}
    for training in trainings(config, out):
        names.setdefault(training.detector, []).append(training)
    trained = tuple(
        DetectorConfig(
            name=name,
            architecture=runs[0].architecture,
            checkpoints=tuple(str(training.checkpoint.resolve()) for training in runs),
            **_reading(runs[0].architecture, runs[0].settings),
        )
        for name, runs in names.items()
    )
    data = config.data.model_copy(update={"classes": training_classes(config, config.training)})
    return config.model_copy(update={"data": data, "detectors": (*trained, *config.detectors), "training": None})


def _reading(architecture: str, settings: TrainingConfig) -> dict[str, Any]:
    """How a trained detector reads images, where that differs from the architecture's own way."""
    reading = settings_of_weights(architecture, settings.pretrained)
    return reading if settings.input_size is None else reading | {"input_size": settings.input_size}


def _in_folder(training: Training, out: Path) -> Training:
    folder = out / "training" / training.detector / f"run{training.run:02d}"
    return Training(training.config, training.architecture, training.strategy, training.run, folder)
