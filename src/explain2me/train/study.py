"""Train, run, compare: the paper's whole protocol from one config."""

import contextlib
import csv
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
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
from explain2me.train.data import Splits, needs_human_maps, read_human_maps, read_splits, training_classes
from explain2me.train.trainer import (
    METRICS,
    OnStep,
    Training,
    check_architecture,
    epoch_text,
    refuse_other_data,
    refuse_other_settings,
    train_if_possible,
    training_device,
)
from explain2me.workers import Engine, Recovery, run_tasks
from explain2me.workers.device import with_device

OnTrained = Callable[[Training, int, int], None]
"""Called with a training that is over, and how many of how many are."""
LOOK_SECONDS = 1.0
"""Between two looks at the epochs that other processes have finished."""


def trainings(config: Config, out: Path) -> list[Training]:
    """Every run of every detector to train, in order: architecture x strategy, then run.

    Raises:
        ConfigError: the config trains nothing, or a detector that it trains has the name of one that it lists.
    """
    if config.training is None:
        raise ConfigError(
            "training is missing: this config has nothing to train; add a table [training], or call `explain2me run`"
        )
    found = [
        Training(config, architecture, strategy, run, Path())
        for architecture in config.training.architectures
        for strategy in config.training.strategies
        for run in range(config.training.runs)
    ]
    taken = {detector.name for detector in config.detectors} & {training.detector for training in found}
    if taken:
        raise ConfigError(f"detectors: {min(taken)!r} is the name of a detector to train as well; rename it")
    return [_in_folder(training, out) for training in found]


def train_missing(
    config: Config,
    out: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    on_start: Callable[[Sequence[Training], int], None] | None = None,
    on_step: OnStep | None = None,
    on_trained: OnTrained | None = None,
) -> list[Training]:
    """Train what is not finished; a second call goes on where the first stopped.

    Args:
        config: with a table [training].
        out: folder; each training gets ``training/DETECTOR/runNN`` in it.
        shard: (i, N) takes every N-th training, from the i-th: for several machines on one folder.
        on_start: called with the trainings of this shard that are not finished, and how many it has.
        on_step: of :func:`train_detector`; with several workers it is told of epochs, of all trainings, instead of steps.
        on_trained: called after each training, also one that diverged; ``outcome`` says which.

    Returns:
        The trainings that are not finished, of all shards.

    Raises:
        Explain2MeError: wrong input; what was trained before stays.
        ConfigError: another process is at a training; the others were made first.
        DivergedError: a training diverged; the others were made first.
    """
    every = trainings(config, out.resolve())
    for training in every:
        refuse_other_settings(training)
    refuse_other_data(every)
    mine = every[shard[0] :: shard[1]]
    missing = [training for training in mine if not training.done]
    if on_start:
        on_start(missing, len(mine))
    assert config.training is not None
    check_architectures(missing)
    check_human_maps(missing)
    if missing:
        check_devices(config)
    engine = engine_for_training(config)
    here = engine.executor == "local" and (engine.workers == 1 or len(missing) < 2) and config.training.devices == 1
    work = functools.partial(train_if_possible, on_step=on_step) if here else train_if_possible
    recovery: Recovery[Training] = Recovery("training.workers, or give a new folder with a smaller training.batch_size")
    with contextlib.nullcontext() if here else _telling_epochs(missing, on_step):
        done = run_tasks(work, missing, engine, recovery=recovery)
        for count, training in enumerate(done, start=len(mine) - len(missing) + 1):
            if on_trained:
                on_trained(training, count, len(mine))
    diverged = [training.outcome() for training in missing if training.diverged]
    if diverged:
        raise DivergedError(
            f"{len(diverged)} of {len(mine)} trainings diverged, the others are finished. {diverged[0]}"
            if len(mine) > 1
            else diverged[0]
        )
    held = [training for training in missing if not training.done]
    if held:
        raise ConfigError(
            held[0].held()
            + (
                f" ({len(held)} of {len(mine)} trainings are like that, the others are finished)"
                if len(mine) > 1
                else ""
            )
        )
    left = [training for training in every if not training.done]
    if missing and not left:
        refuse_other_data(every)  # two machines may have begun at the same moment, with different data
    return left


def check_architectures(trainings: Sequence[Training]) -> None:
    """Build each architecture once, to be guided where a strategy does, before hours of training.

    Raises:
        Explain2MeError: one is unknown, takes no such input or number of classes, or cannot be guided.
    """
    for architecture in dict.fromkeys(training.architecture for training in trainings):
        of_it = [training for training in trainings if training.architecture == architecture]
        check_architecture(next((each for each in of_it if each.strategy.guided), of_it[0]))


def check_human_maps(trainings: Sequence[Training]) -> None:
    """Read the human maps of each strategy, before the hours of training that come first in a study.

    Raises:
        Explain2MeError: a map is missing or wrong, or an image to train on is.
    """
    strategies = list(dict.fromkeys(training.strategy for training in trainings))
    if any(needs_human_maps(strategy) for strategy in strategies):
        rows = read_splits(trainings[0].config, trainings[0].settings).training
        for strategy in strategies:
            read_human_maps(strategy, rows, (32, 32))


def check_settings(config: Config) -> None:
    """Check the settings that no comparison can work with. Reads no data.

    Raises:
        ConfigError: too few training runs to compare.
    """
    assert config.training is not None
    runs = config.training.runs
    refuse_single_runs(config.measures, runs, count=f"got training.runs = {runs}", remedy="raise it")


def check_devices(config: Config) -> None:
    """Find what this machine cannot train on; where Ray carries the trainings that is for its nodes to say.

    Raises:
        ConfigError: devices that are not there or would be used twice.
    """
    assert config.training is not None
    if config.compute.executor == "local":
        refuse_shared_gpus(config.training)


def check_comparison(config: Config) -> tuple[pa.Table, dict[str, Any]]:
    """Check the comparison with random weights of each architecture in place of those to be trained.

    Returns:
        The images to test, and the start of run.json, as :func:`explain2me.stages.check.check` does.

    Raises:
        Explain2MeError: what would stop the comparison: images, measures, salience, device, or a detector.
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
    """Find, before hours of training, what would stop the comparison after them; opens no image.

    Raises:
        Explain2MeError: the images to test or the runs do not do, or ``out`` holds another comparison.
    """
    every = trainings(config, out)
    check_settings(config)
    if not all(training.done for training in every):
        check_devices(config)
        check_comparison(config)
    refuse_other_study(config, out)


def refuse_other_study(config: Config, out: Path, splits: Splits | None = None) -> None:
    """Raise where ``out`` holds trainings with other settings or data, or the comparison of a study that is not this one.

    Args:
        config: of the study.
        out: its folder.
        splits: what it trains on, where that has been read; see :func:`refuse_other_data`.

    Raises:
        ConfigError, RunFolderError: which says what changed.
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
    """Every training of several devices takes the first ones, so two at a time would be on the same.

    Raises:
        ConfigError: this is asked for, or a device is not there.
    """
    if training_device(settings) == "cuda" and settings.workers > 1 and settings.devices > 1:
        raise ConfigError(
            f"training.workers = {settings.workers} with training.devices = {settings.devices}: the trainings would share "
            f"their GPUs; set one of the two to 1, or start the command once for each group of GPUs with "
            f"CUDA_VISIBLE_DEVICES and --shard"
        )


@contextlib.contextmanager
def _telling_epochs(missing: Sequence[Training], on_step: OnStep | None) -> Iterator[None]:
    """Meanwhile call ``on_step`` for the epochs that workers, here or elsewhere, have written to their folders."""
    if on_step is None:
        yield
        return
    over = threading.Event()

    def look() -> None:
        told = {training: _epochs_done(training)[0] for training in missing}
        last = False
        while not last:
            last = over.wait(LOOK_SECONDS)
            for training in missing:
                epochs, text = _epochs_done(training)
                epochs = training.settings.epochs if training.done else epochs  # patience may have ended it
                if epochs > told[training]:
                    told[training] = epochs
                    on_step(
                        sum(told.values()),
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
    """How many, and what the last one came to."""
    try:
        lines = list(csv.DictReader((training.folder / METRICS).read_text(encoding="utf-8").splitlines()))
        return len(lines), epoch_text({name: float(value) for name, value in lines[-1].items() if value})
    except (OSError, ValueError, TypeError, LookupError):  # nothing there yet, or nothing to be read just now
        return 0, ""


def engine_for_training(config: Config) -> Engine:
    """Who carries the trainings."""
    settings, compute = config.training, config.compute
    assert settings is not None
    threads = compute.threads or max(1, torch.get_num_threads() // settings.workers)
    on_gpus = settings.device.startswith("cuda") or (settings.device == "auto" and torch.cuda.is_available())
    gpus = 0.0 if not on_gpus else compute.gpus_per_worker if settings.devices == 1 else float(settings.devices)
    return Engine(compute.executor, settings.workers, threads, compute.ray_address, gpus)


def evaluation(config: Config, out: Path) -> Config:
    """The config of the run that compares what was trained, beside the detectors that the config lists.

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
    """How what was trained reads images, where that is not as the architecture does by itself."""
    found = settings_of_weights(architecture, settings.pretrained)
    return found if settings.input_size is None else found | {"input_size": settings.input_size}


def _in_folder(training: Training, out: Path) -> Training:
    folder = out / "training" / training.detector / f"run{training.run:02d}"
    return Training(training.config, training.architecture, training.strategy, training.run, folder)
