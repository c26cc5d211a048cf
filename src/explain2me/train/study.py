"""A study: every detector that a config trains, and the run that compares them."""

import contextlib
import csv
import functools
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from explain2me.config.load import training_of
from explain2me.config.schema import ComputeConfig, Config, DataConfig, DetectorConfig
from explain2me.config.training import TrainingConfig
from explain2me.detectors.architectures import settings_of_weights
from explain2me.detectors.runs import refuse_single_runs
from explain2me.errors import ConfigError, DivergedError, ImageError, MachineError, RunFolderError
from explain2me.images.listing import image_root, list_images, resolve
from explain2me.images.reading import read_file
from explain2me.run.checks.links import refuse_links
from explain2me.stages.check import check
from explain2me.stages.refusals import other_than_run
from explain2me.train.data import ListedSplits, Splits, cached_table, list_splits, read_splits, size_and_time
from explain2me.train.devices import training_device
from explain2me.train.human_maps import listed_digest, read_all_human_maps
from explain2me.train.loop import train_if_possible
from explain2me.train.record import refuse_other_trainings
from explain2me.train.training import METRICS, OnStep, Training, check_architectures, epoch_text
from explain2me.workers import Engine, repeating, run_tasks
from explain2me.workers.device import with_device

OnTrained = Callable[[Training, int, int], None]
"""Called with a training that is over, the number of those that are over, and the number of all."""

LOOK_SECONDS = 1.0
"""Time between two looks at the epochs that other processes have committed."""


@dataclass(frozen=True)
class Study:
    """What a config trains and compares; made by :func:`plan_study`.

    Attributes:
        config: of the study.
        settings: its table [training].
        folder: holds ``training/DETECTOR/runNN`` for each training, and ``run``, the comparison.
        trainings: every run of every detector, in order: architecture x strategy, then run.
    """

    config: Config
    settings: TrainingConfig
    folder: Path
    trainings: tuple[Training, ...]

    @property
    def unfinished(self) -> list[Training]:
        """The trainings that are not finished."""
        return [training for training in self.trainings if not training.done]

    @functools.cached_property
    def listed(self) -> ListedSplits:
        """The images to train on and to validate with; see :func:`explain2me.train.data.list_splits`."""
        return list_splits(self.config.data, self.settings, self.config.seed)

    @property
    def comparison(self) -> Config:
        """The config of the run that compares the trained detectors with each other and with those in ``detectors``.

        The classes are those of the images to train on, in the order of the logits.
        """
        runs_of_each = [list(runs) for _, runs in itertools.groupby(self.trainings, lambda training: training.detector)]
        trained = tuple(
            _detector_config(runs[0], checkpoints=tuple(str(training.checkpoint.resolve()) for training in runs))
            for runs in runs_of_each
        )
        data = self.config.data.model_copy(update={"classes": self.listed.classes})
        detectors = (*trained, *self.config.detectors)
        return self.config.model_copy(update={"data": data, "detectors": detectors, "training": None})


def plan_study(config: Config, folder: Path) -> Study:
    """The trainings of a config; reads no data.

    Raises:
        ConfigError: the config trains nothing, or a detector to train has the name of one in ``detectors``.
        RunFolderError: a link in the folder ``training``.
    """
    settings = training_of(config)
    refuse_links(folder, inside=("training", ".mlflow.lock"), skip=("tensorboard", "wandb"))
    in_study = functools.partial(Training, settings, config.data, config.name, config.seed, folder.resolve())
    trainings = tuple(
        in_study(architecture, strategy, run)
        for architecture in settings.architectures
        for strategy in settings.strategies
        for run in range(settings.runs)
    )
    taken = {detector.name for detector in config.detectors} & {training.detector for training in trainings}
    if taken:
        raise ConfigError(f"detectors: {min(taken)!r} is the name of a detector to train as well; rename it")
    return Study(config, settings, folder, trainings)


def train_missing(
    study: Study,
    *,
    shard: tuple[int, int] = (0, 1),
    on_start: Callable[[Sequence[Training], int], None] | None = None,
    on_step: OnStep | None = None,
    on_trained: OnTrained | None = None,
) -> list[Training]:
    """Train what is not finished; a second call continues where the first stopped.

    Args:
        study: of :func:`plan_study`.
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
    refuse_other_trainings(study.trainings)
    mine = study.trainings[shard[0] :: shard[1]]
    missing = [training for training in mine if not training.done]
    if on_start:
        on_start(missing, len(mine))
    if missing:
        _read_data(missing, study.listed)
        check_devices(study.settings, study.config.compute.executor)
    done = _train(missing, training_engine(study.settings, study.config.compute), on_step)
    for count, training in enumerate(done, start=len(mine) - len(missing) + 1):
        if on_trained:
            on_trained(training, count, len(mine))
    _refuse_unfinished(missing, len(mine))
    unfinished = study.unfinished
    if missing and not unfinished:
        refuse_other_trainings(study.trainings)  # two machines may have begun at the same moment, with different data
    return unfinished


def _read_data(trainings: Sequence[Training], listed: ListedSplits) -> None:
    """Read and check the images and human maps of a study once, before the first training; see ``Training.index``."""
    sizes = check_architectures(trainings, len(listed.classes))
    for strategy in dict.fromkeys(training.strategy for training in trainings):
        listed_digest(listed, strategy)  # raises before a file is written
    first = trainings[0]
    splits = read_splits(listed, first.data.max_pixels, first.index)
    if Path(first.data.manifest).exists():
        _refuse_tested_pictures(first.data, splits, first.index)
    read_all_human_maps(trainings, splits.training, sizes)


def _refuse_tested_pictures(data: DataConfig, splits: Splits, index: Path) -> None:
    """Refuse to test on a picture that was trained on or validated with, under whatever path; by its bytes.

    Files that cannot be read are left to the run that tests. ``index`` keeps the hashes, see :func:`cached_table`.
    """
    root = image_root(Path(data.manifest))
    tested = [resolve(root, path) for path in list_images(Path(data.manifest), split=data.split)["path"].to_pylist()]
    key = [[str(file), *size_and_time(file)] for file in tested]
    hashes = cached_table(
        index, "tested", key, lambda: pa.table({"sha256": pa.array(map(_sha256, tested), pa.string())})
    )
    files = dict(zip(hashes["sha256"].to_pylist(), tested, strict=True))
    for rows in [splits.training, *([splits.validation] if splits.validation else [])]:
        for file, sha256 in zip(rows.files, rows.sha256, strict=True):
            if sha256 in files:
                raise ConfigError(
                    f"training: {str(file)!r} and {str(files[sha256])!r}, which is tested, are the same picture; remove one"
                )


def _sha256(file: Path) -> str | None:
    try:
        return hashlib.sha256(read_file(file)).hexdigest()
    except MachineError:
        raise
    except ImageError:
        return None


def _train(missing: Sequence[Training], engine: Engine, on_step: OnStep | None) -> Iterator[Training]:
    """Yield each training when it is over."""
    one_device = all(training.settings.devices == 1 for training in missing)
    here = engine.executor == "local" and (engine.workers == 1 or len(missing) < 2) and one_device
    work = functools.partial(train_if_possible, on_step=on_step) if here else train_if_possible
    to_lower = "training.workers, or give a new folder with a smaller training.batch_size"
    with contextlib.nullcontext() if here or on_step is None else _epochs_reported(missing, on_step):
        yield from run_tasks(work, missing, engine, after_death=repeating(to_lower))


def _refuse_unfinished(tried: Sequence[Training], num_mine: int) -> None:
    """Raise where a training diverged, or another process is training it."""
    if diverged := [training.outcome() for training in tried if training.diverged]:
        count = f"{len(diverged)} of {num_mine} trainings diverged, the others are finished. " if num_mine > 1 else ""
        raise DivergedError(count + diverged[0])
    if locked := [training for training in tried if not training.done]:
        count = f" ({len(locked)} of {num_mine} trainings are locked, the others are finished)" if num_mine > 1 else ""
        raise ConfigError(locked[0].locked_message() + count)


def check_study(study: Study) -> None:
    """Check, before hours of training, that the comparison can be made after them; opens no image.

    Raises:
        Explain2MeError: the images to test or the runs cannot be compared, or the folder holds another comparison.
    """
    check_runs(study)
    if study.unfinished:
        check_devices(study.settings, study.config.compute.executor)
        check_comparison(study)
    refuse_other_study(study)


def check_runs(study: Study) -> None:
    """Raise a ConfigError where a measure compares training runs and each detector has only one."""
    runs = study.settings.runs
    refuse_single_runs(study.config.measures, runs, count=f"got training.runs = {runs}", remedy="raise it")


def check_devices(settings: TrainingConfig, executor: str) -> None:
    """Check the devices of this machine; the nodes of a Ray cluster check their own.

    Raises:
        ConfigError: a device is absent, or trainings side by side would all take the first GPUs.
    """
    if executor == "local" and training_device(settings) == "cuda" and min(settings.workers, settings.devices) > 1:
        raise ConfigError(
            f"training.workers = {settings.workers} with training.devices = {settings.devices}: the trainings would share "
            f"their GPUs; set one of the two to 1, or start the command once for each group of GPUs with "
            f"CUDA_VISIBLE_DEVICES and --shard"
        )


def check_comparison(study: Study) -> tuple[pa.Table, dict[str, Any]]:
    """Check the comparison with random weights of each architecture in place of those to be trained.

    Returns:
        The images to test, and the start of run.json, as :func:`explain2me.stages.check.check` does.

    Raises:
        Explain2MeError: images, measures, salience, device or a detector would stop the comparison.
    """
    rehearsed = tuple(
        _detector_config(training, random_runs=min(study.settings.runs, 2))
        for training in study.trainings
        if training.run == 0 and training.strategy == study.settings.strategies[0]
    )
    detectors = (*rehearsed, *study.config.detectors)
    return check(with_device(study.comparison.model_copy(update={"detectors": detectors})))


def refuse_other_study(study: Study, splits: Splits | None = None) -> None:
    """Raise where the folder holds trainings with other settings or data, or the comparison of another study.

    Args:
        study: to compare with.
        splits: its images, where they have been read; see :func:`refuse_other_trainings`.

    Raises:
        ConfigError, RunFolderError: the message says what changed.
    """
    refuse_other_trainings(study.trainings, splits)
    folder = study.folder / "run"
    change = other_than_run(study.comparison, folder)
    if change is not None:
        raise RunFolderError(
            f"{str(folder)!r} holds the comparison of this study as it was before: {change}. Move that folder away, and "
            f"the comparison is made again (what was trained stays), or give a new folder with --out"
        )


@contextlib.contextmanager
def _epochs_reported(trainings: Sequence[Training], on_step: OnStep) -> Iterator[None]:
    """Meanwhile call ``on_step`` whenever a worker, on this machine or another, has finished an epoch."""
    num_epochs = {training: _finished_epochs(training)[0] for training in trainings}
    num_all = sum(training.settings.epochs for training in trainings)
    over = threading.Event()

    def look() -> None:
        for training in trainings:
            count, text = _finished_epochs(training)
            count = training.settings.epochs if training.done else count  # patience may have ended it
            if count > num_epochs[training]:
                num_epochs[training] = count
                on_step(sum(num_epochs.values()), num_all, f"{training.name}, {text}")

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            look()
        look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _finished_epochs(training: Training) -> tuple[int, str]:
    """Number of epochs in metrics.csv, and the last one in words."""
    try:
        lines = list(csv.DictReader((training.folder / METRICS).read_text(encoding="utf-8").splitlines()))
        return len(lines), epoch_text({name: float(value) for name, value in lines[-1].items() if value})
    except (OSError, ValueError, TypeError, LookupError):  # no file yet, or a network disk shows half of it
        return 0, ""


def training_engine(settings: TrainingConfig, compute: ComputeConfig) -> Engine:
    """The workers of the trainings."""
    threads = compute.threads or max(1, torch.get_num_threads() // settings.workers)
    on_gpus = settings.device.startswith("cuda") or (settings.device == "auto" and torch.cuda.is_available())
    gpus = 0.0 if not on_gpus else compute.gpus_per_worker if settings.devices == 1 else float(settings.devices)
    return Engine(compute.executor, settings.workers, threads, compute.ray_address, gpus)


def _detector_config(training: Training, **weights: Any) -> DetectorConfig:
    """A trained detector, with what differs from the architecture's own way to read images."""
    reading = settings_of_weights(training.architecture, training.settings.pretrained)
    if training.settings.input_size is not None:
        reading |= {"input_size": training.settings.input_size}
    return DetectorConfig(name=training.detector, architecture=training.architecture, **weights, **reading)
