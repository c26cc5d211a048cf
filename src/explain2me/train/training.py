"""One training and its folder: names, seed, lock, and the files that commit an epoch."""

import contextlib
import io
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save
from torch import nn

from explain2me.config.schema import DataConfig
from explain2me.config.training import StrategyConfig, TrainingConfig
from explain2me.detectors.architectures import classifier_of
from explain2me.detectors.cards import CARD
from explain2me.detectors.load import Detector, load_detector
from explain2me.errors import CheckpointError, ConfigError
from explain2me.run.files import atomic_path
from explain2me.train.cams import find_features

BEST, LAST, RESUME, METRICS = "best.safetensors", "last.safetensors", "resume.ckpt", "metrics.csv"
NEXT_BEST = "best-of-epoch-{}.safetensors"
"""Weights of a better epoch until resume.ckpt commits that epoch. A GPU may not repeat an epoch bit by bit."""

BEGUN, LOCK, DIVERGED = "training.json", ".lock", "diverged.txt"
RESUME_FORMAT = 2
"""Version of the contents of resume.ckpt."""

OnStep = Callable[[int, int, str], None]
"""Called with the number of steps done, the number of all steps, and a short text about the last epoch."""


class LockedError(ConfigError):
    """Another process is training this."""


@dataclass(frozen=True)
class Training:
    """One run of one detector: an architecture, a strategy, and a seed.

    Its folder holds ``training.json`` (what it was begun with), ``best.safetensors``, ``last.safetensors``,
    ``metrics.csv`` (a line an epoch), ``resume.ckpt`` until it is finished, and last of all ``card.json``: config, data,
    versions, metrics and curve.

    ``study`` is the name of its study; ``study_seed`` draws the images, and is the seed of run 0.
    """

    settings: TrainingConfig = field(hash=False)  # may hold a dict
    data: DataConfig = field(hash=False)
    study: str
    study_seed: int
    study_folder: Path
    architecture: str
    strategy: StrategyConfig
    run: int

    @property
    def detector(self) -> str:
        """Name of the detector."""
        return f"{self.architecture.partition(':')[2]}-{self.strategy.name}"

    @property
    def name(self) -> str:
        """Detector and run, for messages."""
        return f"{self.detector} run {self.run}"

    @property
    def seed(self) -> int:
        """Seed of the weights, the order and the augmentation; the same for run i of every detector."""
        return self.study_seed + self.run

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.study_folder / "training" / self.detector / f"run{self.run:02d}"

    @property
    def index(self) -> Path:
        """Folder of what the trainings of a study know about their images; see :func:`explain2me.train.data.cached_table`."""
        return self.study_folder / "training" / "index"

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return (self.folder / CARD).exists()

    @property
    def diverged(self) -> bool:
        """Whether the last attempt stopped because the loss or the weights were not finite."""
        return (self.folder / DIVERGED).exists() and not self.done

    @property
    def checkpoint(self) -> Path:
        """The weights that a study evaluates."""
        return self.folder / (BEST if self.settings.checkpoint == "best" else LAST)

    def epochs_committed(self) -> int:
        """Number of epochs in resume.ckpt; 0 where there is none, or none that can be read."""
        try:
            return int(torch.load(self.folder / RESUME, map_location="cpu", weights_only=True, mmap=True)["epochs"])
        except Exception:  # load_resume raises when the file is needed
            return 0

    def outcome(self) -> str:
        """One line: the result, why the training stopped, or that another process is training this."""
        if self.diverged:
            return (self.folder / DIVERGED).read_text(encoding="utf-8")
        try:
            card = json.loads((self.folder / CARD).read_text(encoding="utf-8"))
        except FileNotFoundError:  # a network disk may show it late
            return self.locked_message()
        metrics = {name: value for name, value in card["metrics"].items() if value is not None}
        return f"{self.name}, best of {card['epochs']} epochs: {epoch_text(metrics)}"

    def locked_message(self) -> str:
        """Message: another process is training this."""
        return f"another process is training {self.name}; wait for it or stop it, then call the same command again"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder, or raise a LockedError; the system frees it when the process ends."""
        try:
            lock = FileLock(self.folder / LOCK).acquire(timeout=0)
        except Timeout:
            raise LockedError(self.locked_message()) from None
        with lock:
            yield


@dataclass
class Progress:
    """What the committed epochs of a training came to."""

    curve: list[dict[str, float]] = field(default_factory=list)
    """Metrics of each epoch."""
    best_epoch: int = 0
    """Counted from 1; 0 before the first."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Versions, git state and device, once for each process that made epochs with others than before."""
    seconds: float = 0.0

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return len(self.curve)

    @property
    def text(self) -> str:
        """The last epoch in words."""
        return epoch_text(self.curve[-1]) if self.curve else "epoch 1"

    def add(self, metrics: dict[str, float], settings: TrainingConfig) -> None:
        """Append an epoch; it becomes the best one if its monitored metric is strictly better than all before."""
        scores = [_score(each, settings.monitor) for each in [*self.curve, metrics]]
        self.curve.append(metrics)
        if self.epochs == 1 or scores[-1] > max(scores[:-1]):
            self.best_epoch = self.epochs

    def is_finished(self, settings: TrainingConfig) -> bool:
        """Whether the last epoch is made, or patience has run out."""
        waited = settings.patience is not None and self.epochs - self.best_epoch >= settings.patience
        return self.epochs >= settings.epochs or (self.epochs > 0 and waited)

    def note_environment(self, environment: dict[str, Any]) -> None:
        """Record versions, git state and device for the epochs to come, unless they are as before."""
        before = {key: value for each in self.history[-1:] for key, value in each.items() if key != "from_epoch"}
        if environment != before:
            self.history.append(environment | {"from_epoch": self.epochs + 1})


def _score(metrics: Mapping[str, float], monitor: str) -> float:
    """Larger is better; without validation the later epoch is better. An undefined metric is never the best."""
    value = metrics.get(f"val_{monitor}")
    if value is None:
        return metrics["epoch"]
    if math.isnan(value):
        return -math.inf
    return -value if monitor == "loss" else value


def build_detector(training: Training, num_classes: int) -> Detector:
    """The detector before its first step; an Explain2MeError if there is none with this input and number of classes."""
    settings = training.settings
    detector = load_detector(
        training.architecture,
        num_classes=num_classes,
        pretrained=settings.pretrained,
        input_size=settings.input_size,
        seed=training.seed,
        new_head=True,
    )
    if classifier_of(detector.model)[1].weight.shape[0] != num_classes:
        raise ConfigError(f"architecture {training.architecture!r} cannot be given {num_classes} classes; take another")
    return detector


def check_architectures(trainings: Sequence[Training], num_classes: int) -> dict[str, tuple[int, int]]:
    """Height and width of the input of each architecture; each is built once.

    Raises:
        Explain2MeError: one is unknown, takes no such input or number of classes, or cannot be guided where it should be.
    """
    sizes: dict[str, tuple[int, int]] = {}
    guided = {training.architecture for training in trainings if training.strategy.guided}
    for training in trainings:
        if training.architecture not in sizes:
            detector = build_detector(training, num_classes)
            sizes[training.architecture] = detector.input_size
            if training.architecture in guided:
                find_features(detector.model, detector.input_size)
    return sizes


def commit_epoch(
    folder: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]
) -> None:
    """Write the files of the last epoch; resume.ckpt commits it. An interrupt before that repeats the epoch."""
    weights = {name: value.detach().contiguous().cpu() for name, value in model.state_dict().items()}
    if progress.best_epoch == progress.epochs:
        write_bytes(save(weights), folder / NEXT_BEST.format(progress.best_epoch))
    write_bytes(save(weights), folder / LAST)
    write_bytes(_csv(progress.curve).encode(), folder / METRICS)
    state = {"format": RESUME_FORMAT, "epochs": progress.epochs, "progress": vars(progress), "record": dict(record)}
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(buffer.getbuffer(), folder / RESUME)
    promote_best(folder, progress.best_epoch)


def load_resume(path: Path) -> dict[str, Any] | None:
    """The contents of resume.ckpt, on the CPU; None where there is none.

    Raises:
        CheckpointError: it is damaged, or another version of explain2me wrote it.
        OSError: the machine fails to read it.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        if isinstance(error, OSError) and error.errno:  # of the machine: nothing is known about the file
            raise
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read ({reason}); move it away to start this training again") from None
    if not isinstance(state, dict) or state.get("format") != RESUME_FORMAT:
        raise CheckpointError(
            f"{path} is not as this version of explain2me writes it; continue with the version that wrote it, or move it away "
            f"to start this training again"
        )
    return state


def promote_best(folder: Path, best_epoch: int) -> None:
    """Promote the best committed epoch's weights; delete uncommitted ones."""
    with contextlib.suppress(FileNotFoundError):  # promoted before
        (folder / NEXT_BEST.format(best_epoch)).replace(folder / BEST)
    for path in folder.glob(NEXT_BEST.format("*")):
        path.unlink(missing_ok=True)


def write_bytes(content: bytes | memoryview, path: Path) -> None:
    """Commit a file by one rename. Errors of the disk come as OSError, which save_file and torch.save would hide."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _csv(curve: list[dict[str, float]]) -> str:
    columns = list(dict.fromkeys(name for line in curve for name in line))
    lines = [",".join(columns)]
    lines += [",".join("" if name not in line else f"{line[name]:.10g}" for name in columns) for line in curve]
    return "\n".join(lines) + "\n"


def epoch_text(metrics: Mapping[str, float]) -> str:
    """A line of metrics.csv in words.

    >>> epoch_text({"epoch": 3.0, "train_loss": 0.5, "val_auroc": 0.75})
    'epoch 3: train_loss 0.500, val_auroc 0.750'
    """
    shown = [f"{name} {metrics[name]:.3f}" for name in ("train_loss", "val_accuracy", "val_auroc") if name in metrics]
    return f"epoch {metrics['epoch']:.0f}: {', '.join(shown)}"
