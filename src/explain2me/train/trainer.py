"""One training, on Lightning: from random or pretrained weights to a checkpoint with a card, resumable after any epoch."""

import contextlib
import gc
import hashlib
import io
import json
import logging
import math
import pickle
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from safetensors.torch import save
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.utils.data import DataLoader
from torchmetrics.utilities.distributed import gather_all_tensors

from explain2me import errors
from explain2me.config.compare import flat, was_and_is
from explain2me.config.schema import Config
from explain2me.config.training import OptimizerConfig, StrategyConfig, TrainingConfig
from explain2me.detectors.architectures import classifier_of
from explain2me.detectors.cards import CARD
from explain2me.detectors.load import Detector, load_detector, sha256_without_head
from explain2me.errors import CheckpointError, ConfigError, DivergedError, Explain2MeError
from explain2me.run.files import atomic_path, write_json
from explain2me.run.leftovers import remove_leftovers
from explain2me.run.provenance import provenance
from explain2me.salience.gradcam import predicted_classes
from explain2me.statistics.bootstrap import weighted_auroc
from explain2me.train.cams import FeatureReader, class_activation_maps, find_features
from explain2me.train.data import (
    EpochSampler,
    Example,
    Examples,
    HumanMaps,
    Splits,
    class_weights,
    list_splits,
    listed_digest,
    read_human_maps,
    read_splits,
    training_classes,
)
from explain2me.train.loggers import log_epoch, open_loggers
from explain2me.train.losses import cross_entropy, guided_loss
from explain2me.workers.device import real_device
from explain2me.workers.schedule import torch_threads

DIVERGED = "diverged.txt"
"""Why a training could not end, for the process that began it."""

BEST, LAST, RESUME, METRICS = "best.safetensors", "last.safetensors", "resume.ckpt", "metrics.csv"
HIGHER_IS_BETTER = {"accuracy": True, "auroc": True, "loss": False}

NEXT_BEST = "best-of-epoch-{}.safetensors"
"""Weights that become the best ones once resume.ckpt says so: an epoch made again on a GPU may end elsewhere."""
BEGUN, LOCK = "training.json", ".lock"
NO_MATTER = {"threads", "listed"}
"""What may differ from what a training was begun with."""

UNRECORDED = (
    "architectures", "strategies", "runs", "workers", "loaders", "device", "manifest", "checkpoint", "loggers",
)  # fmt: skip
"""Of the table [training]: what decides no weight, or is told otherwise."""

CHECK_STEPS = 10
"""Steps between two looks at whether the loss was finite."""

LIGHTNING_LOGS = tuple(map(logging.getLogger, ("lightning", "lightning.pytorch", "lightning.fabric")))

WAIT = "wait for it, or end it, and call the same command again"

OnStep = Callable[[int, int, str], None]
"""Called with the steps done, of how many, and a short text about the last epoch."""


class HeldError(ConfigError):
    """Another process is at this training."""


@dataclass(frozen=True)
class Training:
    """One run of one detector: an architecture, a strategy, and a seed. Files go to ``folder``.

    ``best.safetensors``, ``last.safetensors``, ``metrics.csv`` (a line an epoch), ``resume.ckpt`` while it is not
    finished, and last of all ``card.json``: config, data, versions, metrics and curve.
    """

    config: Config
    architecture: str
    strategy: StrategyConfig
    run: int
    folder: Path

    def __hash__(self) -> int:
        return hash((self.detector, self.run, self.folder))  # a config may hold dicts

    @property
    def detector(self) -> str:
        """Name of the detector."""
        return f"{self.architecture.partition(':')[2]}-{self.strategy.name}"

    @property
    def settings(self) -> TrainingConfig:
        """The table [training]."""
        assert self.config.training is not None
        return self.config.training

    @property
    def seed(self) -> int:
        """Of the weights, the order and the augmentation; the same for run i of every detector."""
        return self.config.seed + self.run

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return (self.folder / CARD).exists()

    @property
    def diverged(self) -> bool:
        """Whether it stopped, when it was last tried, because its loss or weights were not finite."""
        return (self.folder / DIVERGED).exists() and not self.done

    @property
    def checkpoint(self) -> Path:
        """The weights that a study evaluates."""
        return self.folder / (BEST if self.settings.checkpoint == "best" else LAST)

    def epochs_committed(self) -> int:
        """Epochs after which it goes on, where it is begun and not finished; 0 where it starts, or nothing can be read."""
        try:
            return int(torch.load(self.folder / RESUME, map_location="cpu", weights_only=True, mmap=True)["epoch"]) + 1
        except Exception:  # what is wrong with the file is told when it is needed
            return 0

    def outcome(self) -> str:
        """In a line: how it ended, why it could not, or that another process is at it."""
        if self.diverged:
            return (self.folder / DIVERGED).read_text(encoding="utf-8")
        try:
            card = json.loads((self.folder / CARD).read_text(encoding="utf-8"))
        except FileNotFoundError:  # which a network disk may show late
            return self.held()
        shown = epoch_text({name: value for name, value in card["metrics"].items() if value is not None})
        return f"{self.detector} run {self.run}, best of {card['epochs']} epochs: {shown}"

    def held(self) -> str:
        """That another process is at it."""
        return f"{self.detector} run {self.run} is being trained by another process already; {WAIT}"


def check_architecture(training: Training) -> None:
    """Build it once, before anything is trained.

    Raises:
        Explain2MeError: it is unknown, takes no such input or number of classes, or cannot be guided.
    """
    detector = _build(training, len(training_classes(training.config, training.settings)))
    if training.strategy.guided:
        find_features(detector.model, detector.input_size)


def train_if_possible(training: Training, on_step: OnStep | None = None) -> None:
    """:func:`train_detector`, where what is wrong with this training alone does not end others.

    One that diverges leaves a note in its folder instead, and one that another process is at is left to it.
    """
    with contextlib.suppress(HeldError):
        try:
            train_detector(training, on_step)
        except DivergedError as error:
            with atomic_path(training.folder / DIVERGED) as temporary:
                temporary.write_text(str(error), encoding="utf-8")


def train_detector(training: Training, on_step: OnStep | None = None) -> None:
    """Train one detector, or go on where an interrupt left it, and write its files; does nothing when it is finished.

    On a CPU an interrupted and resumed training gives the same bytes as one without a break. The global random state
    stays as it was.

    Raises:
        Explain2MeError: wrong config, images or human maps; the loss is not finite; ``folder`` holds another training.
    """
    settings = training.settings
    device = training_device(settings)
    splits = read_splits(training.config, settings)
    detector = _build(training, len(splits.classes))
    human_maps = read_human_maps(training.strategy, splits.training, detector.input_size)
    record = _record(training, splits, human_maps)
    if settings.pretrained:
        record["initial_weights"] = sha256_without_head(detector.model)
    training.folder.mkdir(parents=True, exist_ok=True)
    with _alone(training):
        (training.folder / DIVERGED).unlink(missing_ok=True)
        begun = _begin(training, record, listed_digest(splits.listing, training.strategy))
        record["threads"] = begun.get("threads", torch.get_num_threads())
        if training.done:
            (training.folder / RESUME).unlink(missing_ok=True)  # a process was killed right after it wrote the card
            return
        remove_leftovers(training.folder)
        _train(
            _Module(training, detector, splits, human_maps),
            _Files(training, detector, record, provenance("lightning", "safetensors"), on_step=on_step),
            device,
        )
    gc.collect()  # Lightning's trainer, its module and callbacks are one cycle, and hold the images


def _train(module: "_Module", files: "_Files", device: str) -> None:
    training, settings = files.training, files.training.settings
    kind, _, index = device.partition(":")
    resume = training.folder / RESUME
    with (
        _quiet(),
        _cudnn_benchmark(),
        _first_of_its_own(),
        torch_threads(files.record["threads"]),
        torch.random.fork_rng(_cuda_devices(kind)),
        open_loggers(
            settings.loggers,
            training.folder,
            project=training.config.name,
            name=f"{training.detector}-run{training.run:02d}",
            settings=_settings_record(training),
            goes_on=resume.exists() or not (training.folder / METRICS).exists(),
        ) as loggers,
    ):
        trainer = L.Trainer(
            accelerator={"cuda": "gpu"}.get(kind, kind),
            devices=_devices(settings.devices, kind, index),
            strategy="auto" if settings.devices == 1 else "ddp_spawn",
            precision="bf16-mixed" if settings.precision == "bfloat16" else "32-true",
            max_epochs=settings.epochs,
            gradient_clip_val=settings.optimizer.gradient_clip,
            benchmark=kind == "cuda",
            plugins=[_OwnProcesses(), _StraightToItsPlace()],
            logger=loggers,
            callbacks=[files],
            default_root_dir=training.folder,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        _fit(trainer, module, resume)


def training_device(settings: TrainingConfig) -> str:
    """Where to train on this machine.

    Raises:
        ConfigError: the device, or so many of them, are not there.
    """
    device = real_device(settings.device, "training.device")
    if device == "cuda" and settings.devices > torch.cuda.device_count():
        raise ConfigError(
            f"training.devices = {settings.devices}: {torch.cuda.device_count()} CUDA devices are visible here; use a smaller number"
        )
    return device


def _cuda_devices(kind: str) -> range:
    return range(torch.cuda.device_count() if kind == "cuda" else 0)


def _devices(count: int, kind: str, index: str) -> int | list[int]:
    """One device is named by its number, else Lightning takes the first for every worker."""
    if count > 1 or kind != "cuda":
        return count
    return [int(index) if index else torch.cuda.current_device()]


@contextlib.contextmanager
def _alone(training: Training) -> Iterator[None]:
    """Hold the folder while this process trains; refuse where another process is at it. A lock ends with its process."""
    try:
        lock = FileLock(training.folder / LOCK).acquire(timeout=0)
    except Timeout:
        raise HeldError(training.held()) from None
    with lock:
        yield


@contextlib.contextmanager
def _first_of_its_own() -> Iterator[None]:
    """What a scheduler counts (SLURM_PROCID, RANK) are tasks, not processes of this training: nobody else would log."""
    before = getattr(rank_zero_only, "rank", None)
    rank_zero_only.rank = 0  # type: ignore[attr-defined]
    try:
        yield
    finally:
        rank_zero_only.rank = before  # type: ignore[attr-defined]


@contextlib.contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    """Lightning leaves the global switch as it set it."""
    before = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _check_resume(path: Path) -> None:
    """After a failure: tell a damaged file from a device that fails."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it to start this training again") from None


def _fit(trainer: L.Trainer, module: L.LightningModule, resume: Path) -> None:
    """Lightning ends the process on Ctrl-C; we stop as everything else does."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, ckpt_path=resume if resume.exists() else None, weights_only=True)
    except SystemExit:
        raise KeyboardInterrupt from None
    except Explain2MeError as error:  # a loader's process puts its whole trace into the message
        raise (_as_raised(error) if "\n" in str(error) else error) from None
    except ProcessRaisedException as error:
        _check_resume(resume)
        raise _as_raised(error) from None
    except ProcessExitedException as error:
        raise Explain2MeError(
            f"a process of the training of several devices ended by itself ({error}; out of memory?); the epochs that were "
            f"whole are kept: call the same command again"
        ) from None
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(str(error)) from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
        _check_resume(resume)
        raise
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, handler)


def _as_raised(error: Exception) -> Exception:
    """What another process raised, of which the text of its trace is all that comes back."""
    last = str(error).strip().rpartition("\n")[2]
    name, _, message = last.removeprefix("explain2me.errors.").partition(": ")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, Explain2MeError):
        return kind(message)
    if name.endswith("OutOfMemoryError"):
        return _out_of_memory(message)
    of_the_system = re.match(r"\w*Error: \[Errno (\d+)\] (.*)", last)
    return OSError(int(of_the_system[1]), of_the_system[2]) if of_the_system else error


def _out_of_memory(text: str) -> Explain2MeError:
    return Explain2MeError(
        f"{text.partition(chr(10))[0]}; the epochs that were whole are kept. Free the device and call the same command again, "
        f"or give a new folder with a smaller training.batch_size"
    )


class _Module(L.LightningModule):
    """What Lightning needs to know: the loss of a batch, the validation, the optimiser and the batches."""

    _class_weights: Tensor | None
    _first_bad_step: Tensor

    def __init__(self, training: Training, detector: Detector, splits: Splits, human_maps: HumanMaps | None) -> None:
        super().__init__()
        # Lightning keeps the mode that it finds, and a detector comes in evaluation mode
        self.model = detector.model.to(memory_format=torch.channels_last).train()
        self._training = training
        self._detector = detector
        self._splits = splits
        self._human_maps = human_maps
        self._reader: FeatureReader | None = None
        if training.strategy.guided:
            self._reader = find_features(self.model, detector.input_size)
        labels = splits.training.labels
        weights = class_weights(labels, len(splits.classes)) if training.settings.class_balance == "weights" else None
        self.register_buffer("_class_weights", weights, persistent=False)
        positive = training.config.data.positive
        self._positive = splits.classes.index(positive)
        self._ranked: list[Tensor] = []
        self._sums = {"train": _Sums(), "val": _Sums()}
        self.register_buffer("_first_bad_step", torch.tensor(-1), persistent=False)
        self.epoch_metrics: dict[str, float] = {}

    def training_step(self, batch: Example, batch_idx: int) -> Tensor:
        strategy = self._training.strategy
        inputs, labels = self._detector.preprocess(batch.image), batch.label
        if self._reader is None:
            logits = self.model(inputs)
            loss = cross_entropy(logits, labels, class_weights=self._class_weights)
        else:
            logits, features = self._reader(inputs)
            with torch.autocast(features.device.type, enabled=False):
                classes = labels if strategy.cam_class == "true" else predicted_classes(logits.detach())
                loss = guided_loss(
                    logits,
                    labels,
                    cams=class_activation_maps(features, classifier_of(self.model)[1].weight.flatten(1), classes),
                    human_maps=None if self._human_maps is None else batch.human_map,
                    alpha=strategy.alpha,
                    entropy_weight=strategy.entropy_weight,
                    class_weights=self._class_weights,
                )
        self._sums["train"].add(loss.detach(), logits.detach(), labels)
        first = self._first_bad_step
        self._first_bad_step = torch.where((first < 0) & ~loss.detach().isfinite(), batch_idx, first)
        if batch_idx % CHECK_STEPS == CHECK_STEPS - 1:
            self.check_loss()
        return loss

    def check_loss(self) -> None:
        """Stop a training that has diverged; looked at now and then, since looking waits for the device."""
        step = int(self._first_bad_step)
        if step >= 0:
            raise self._diverged(f"the loss is not finite in epoch {self.current_epoch + 1}, step {step + 1}")

    def check_weights(self) -> None:
        """Refuse to keep an epoch whose last steps have spoilt the weights, though its losses were finite."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise self._diverged(f"{name!r} is not finite after epoch {self.current_epoch + 1}")

    def _diverged(self, what: str) -> DivergedError:
        kept = "The last whole epoch is kept" if self.current_epoch else "No epoch was whole"
        return DivergedError(
            f"{self._training.detector} run {self._training.run}: {what}; lower training.optimizer.learning_rate or set its "
            f"gradient_clip (in a new folder, or delete {str(self._training.folder)!r}). {kept}"
        )

    def validation_step(self, batch: Example, batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):  # 8 bits of a logit would tie images
            logits = self.model(self._detector.preprocess(batch.image)).float()
        score = ranking(logits, self._positive)
        self._ranked.append(torch.stack([score, (batch.label == self._positive).to(score)], 1))
        self._sums["val"].add(cross_entropy(logits, batch.label), logits, batch.label)

    def on_train_batch_start(self, batch: Example, batch_idx: int) -> None:
        # dropout and the like: keyed by the step, so that neither an interrupt nor what else draws changes anything
        key = [self._training.seed, 3, self.current_epoch, batch_idx, self.global_rank]
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of all devices of the caller
        if self.device.type in ("cuda", "mps"):
            getattr(torch, self.device.type).manual_seed(seed)

    def on_train_epoch_start(self) -> None:
        self.epoch_metrics = {"learning_rate": float(self.trainer.optimizers[0].param_groups[0]["lr"])}

    def on_validation_epoch_end(self) -> None:
        found = {f"val_{name}": value for name, value in self._averages("val").items()}
        ranked = torch.cat(self._ranked)
        self._ranked = []
        if self.trainer.world_size > 1:
            ranked = torch.cat(gather_all_tensors(ranked))
        scores, positive = ranked.cpu().double().numpy().T
        # exact, so that epochs that order the images alike tie; NaN where there is one class only, or a score is no number
        auroc = weighted_auroc(scores, positive == 1, np.ones((1, len(scores))))[0]
        found["val_auroc"] = float(auroc) if np.isfinite(scores).all() else math.nan
        self.epoch_metrics |= found

    def end_epoch(self) -> dict[str, float]:
        """The metrics of the epoch that is over."""
        return self.epoch_metrics | {f"train_{name}": value for name, value in self._averages("train").items()}

    def configure_optimizers(self) -> Any:
        settings = self._training.settings
        wanted = settings.optimizer
        optimizer: torch.optim.Optimizer
        if wanted.name == "sgd":
            optimizer = torch.optim.SGD(
                self.parameters(), wanted.learning_rate, momentum=wanted.momentum, weight_decay=wanted.weight_decay
            )
        else:
            optimizer = torch.optim.AdamW(self.parameters(), wanted.learning_rate, weight_decay=wanted.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: learning_rate_factor(wanted, epoch, settings.epochs)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}

    def train_dataloader(self) -> DataLoader[Example]:
        training, rows = self._training, self._splits.training
        settings = training.settings
        examples = self._examples(rows, self._human_maps, augmented=True)
        balanced = rows.labels if settings.class_balance == "sampling" else None
        sampler = EpochSampler(
            len(rows.files),
            training.seed,
            class_of=balanced,
            rank=self.global_rank,
            world=self.trainer.world_size,
            # Lightning begins to read before it sets the epoch; current_epoch is the last one when a training goes on
            epoch=self.trainer.fit_loop.epoch_progress.current.processed,  # type: ignore[attr-defined]
        )
        return self._loader(examples, sampler, drop_last=True)  # batch statistics of a rest of one or two are noise

    def val_dataloader(self) -> DataLoader[Example] | list[Any]:
        rows = self._splits.validation
        if rows is None:
            return []
        sampler = EpochSampler(len(rows.files), 0, shuffle=False, rank=self.global_rank, world=self.trainer.world_size)
        return self._loader(self._examples(rows, None, augmented=False), sampler, drop_last=False)

    def _examples(self, rows: Any, human_maps: HumanMaps | None, *, augmented: bool) -> Examples:
        training, detector = self._training, self._detector
        return Examples(
            rows,
            detector.input_size,
            detector.interpolation,
            human_maps=human_maps,
            augmentation=training.settings.augmentation if augmented else None,
            seed=training.seed,
            max_pixels=training.config.data.max_pixels,
        )

    def _loader(self, examples: Examples, sampler: EpochSampler, *, drop_last: bool) -> DataLoader[Example]:
        settings = self._training.settings
        return DataLoader(
            examples,
            settings.batch_size,
            sampler=sampler,
            num_workers=settings.loaders,
            persistent_workers=settings.loaders > 0,
            multiprocessing_context="spawn" if settings.loaders else None,
            generator=torch.Generator().manual_seed(
                0
            ),  # what the loader draws for itself is not drawn from the model's
            pin_memory=self.device.type == "cuda",
            drop_last=drop_last,
        )

    def _averages(self, stage: str) -> dict[str, float]:
        """Over all images of all ranks."""
        sums = self._sums[stage]
        totals = torch.tensor(sums.values(), dtype=_widest(self.device), device=self.device)
        if self.trainer.world_size > 1:
            totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
        self._sums[stage] = _Sums()
        loss, correct, count = totals.tolist()
        return {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1)}


@dataclass
class _Sums:
    """Sums over the images of an epoch; kept on the device until the epoch is over, so that no step waits for it."""

    loss: Tensor | float = 0.0
    correct: Tensor | float = 0.0
    count: int = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """One batch: its mean loss, its logits and labels."""
        self.loss = self.loss + loss.to(_widest(loss.device)) * len(labels)
        self.correct = self.correct + (predicted_classes(logits) == labels).sum()
        self.count += len(labels)

    def values(self) -> list[float]:
        """loss, correct, count."""
        return [float(self.loss), float(self.correct), float(self.count)]


def _widest(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class _Files(L.Callback):
    """Writes the files of a training: after each epoch all that going on needs, at the end the card."""

    training: Training
    detector: Detector
    record: dict[str, Any]
    made_with: dict[str, Any]
    """Versions, git state and hardware of this process."""
    on_step: OnStep | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    """What each stretch of epochs was made with."""
    seconds: float = 0.0
    _started: float = 0.0
    _steps: int = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Several processes share the threads of the training; Lightning gives them all cores."""
        torch.set_num_threads(max(1, self.record["threads"] // trainer.world_size))

    def state_dict(self) -> dict[str, Any]:
        """What is kept in resume.ckpt."""
        names = ("curve", "best_epoch", "history", "record")
        return {name: getattr(self, name) for name in names} | {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, unless it is of another training."""
        _refuse_changed(str(self.training.folder / RESUME), _filled(state_dict["record"]), self.record)
        self.curve, self.best_epoch = state_dict["curve"], state_dict["best_epoch"]
        self.history, self.seconds = state_dict.get("history", []), state_dict["seconds"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a training that was stopped after its last epoch has nothing left to do."""
        self._started = time.monotonic()
        self._steps = len(self.curve) * int(trainer.num_training_batches)
        trainer.should_stop = self._exhausted()
        made_with = self.made_with | {"device": str(trainer.strategy.root_device)}
        before = {key: value for each in self.history[-1:] for key, value in each.items() if key != "from_epoch"}
        if made_with != before and not trainer.should_stop:
            self.history.append(made_with | {"from_epoch": len(self.curve) + 1})
        if trainer.is_global_zero:
            self._take_best()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Tell how far it is."""
        self._steps += 1
        if self.on_step:
            self.on_step(self._steps, self.training.settings.epochs * int(trainer.num_training_batches), self._text())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Commit the epoch; resume.ckpt comes last, and an epoch made again gives the same files."""
        assert isinstance(pl_module, _Module)
        pl_module.check_loss()
        pl_module.check_weights()
        metrics = pl_module.end_epoch()
        self.curve.append({"epoch": trainer.current_epoch + 1} | metrics)
        better = self._score(self.curve[-1]) > max(map(self._score, self.curve[:-1]), default=-math.inf)
        if better or len(self.curve) == 1:
            self.best_epoch = trainer.current_epoch + 1
        if trainer.is_global_zero:
            folder = self.training.folder
            if self.best_epoch == trainer.current_epoch + 1:
                self._save(folder / NEXT_BEST.format(self.best_epoch), pl_module)
            self._save(folder / LAST, pl_module)
            _write_curve(self.curve, folder / METRICS)
        with _committed(self.training.folder / RESUME, trainer) as path:
            trainer.save_checkpoint(path)
        if trainer.is_global_zero:  # has renamed resume.ckpt by now; others may be ahead
            self._take_best()
            log_epoch(trainer.loggers, self.curve[-1])
        trainer.should_stop = trainer.should_stop or self._exhausted()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the card, which says that the training is whole."""
        if not trainer.is_global_zero or trainer.interrupted or not self.curve:
            return
        folder = self.training.folder
        self._take_best()
        card = self.record | {
            "best_epoch": self.best_epoch,
            "metrics": self.curve[self.best_epoch - 1],
            "epochs": len(self.curve),
            "curve": self.curve,
            "files": {name: _sha256(folder / name) for name in (BEST, LAST)},
            "seconds": round(self._seconds(), 1),
            "input": {name: list(getattr(self.detector, name)) for name in ("input_size", "mean", "std")}
            | {"interpolation": self.detector.interpolation},
            **(self.history or [self.made_with])[-1],
            **({"earlier": self.history[:-1]} if len(self.history) > 1 else {}),
        }
        write_json(_without_nan(card), folder / CARD)
        (folder / RESUME).unlink(missing_ok=True)

    def _take_best(self) -> None:
        """Take the weights of the best committed epoch for the best ones, and those of an epoch that was not for none."""
        folder = self.training.folder
        with contextlib.suppress(FileNotFoundError):  # done already
            (folder / NEXT_BEST.format(self.best_epoch)).replace(folder / BEST)
        for path in folder.glob(NEXT_BEST.format("*")):
            path.unlink(missing_ok=True)

    def _exhausted(self) -> bool:
        settings = self.training.settings
        waited = settings.patience is not None and len(self.curve) - self.best_epoch >= settings.patience
        return len(self.curve) >= settings.epochs or (bool(self.curve) and waited)

    def _score(self, metrics: dict[str, float]) -> float:
        """Larger is better; without validation the later epoch is. An undefined value is never the best."""
        monitor = self.training.settings.monitor
        value = metrics.get(f"val_{monitor}")
        if value is None:
            return metrics["epoch"]
        if math.isnan(value):
            return -math.inf
        return value if HIGHER_IS_BETTER[monitor] else -value

    def _seconds(self) -> float:
        return self.seconds + (time.monotonic() - self._started if self._started else 0.0)

    def _text(self) -> str:
        return epoch_text(self.curve[-1]) if self.curve else "epoch 1"

    def _save(self, path: Path, module: L.LightningModule) -> None:
        assert isinstance(module.model, nn.Module)
        with atomic_path(path) as temporary:
            # save_file would hide the errors of the disk, and set its own rights
            temporary.write_bytes(
                save({n: v.detach().contiguous().cpu() for n, v in module.model.state_dict().items()})
            )


def ranking(logits: Float[Tensor, "N num_logits"], positive: int) -> Float[Tensor, " N"]:
    """Orders images as the softmax of the positive class does, in (0, 1), also where that is rounded to 1.

    >>> ranking(torch.tensor([[0.0, 0.0], [0.0, 60.0], [0.0, 61.0]]), 1)
    tensor([0.5000, 0.9918, 0.9919], dtype=torch.float64)
    """
    logits = logits.to(_widest(logits.device))
    others = torch.cat([logits[:, :positive], logits[:, positive + 1 :]], 1)
    return (torch.nn.functional.softsign(logits[:, positive] - others.logsumexp(1)) + 1) / 2


def epoch_text(metrics: Mapping[str, float]) -> str:
    """A line of metrics.csv, for people.

    >>> epoch_text({"epoch": 3.0, "train_loss": 0.5, "val_auroc": 0.75})
    'epoch 3: train_loss 0.500, val_auroc 0.750'
    """
    shown = [f"{name} {metrics[name]:.3f}" for name in ("train_loss", "val_accuracy", "val_auroc") if name in metrics]
    return f"epoch {metrics['epoch']:.0f}: {', '.join(shown)}"


def learning_rate_factor(config: OptimizerConfig, epoch: int, num_epochs: int) -> float:
    """What the learning rate of an epoch (from 0) is multiplied with.

    >>> [learning_rate_factor(OptimizerConfig(step_epochs=2), epoch, 6) for epoch in range(4)]
    [1.0, 1.0, 0.1, 0.1]
    """
    warmup = min(1.0, (epoch + 1) / (config.warmup_epochs + 1))
    if config.schedule == "step":
        return warmup * config.step_factor ** (epoch // config.step_epochs)
    if config.schedule == "cosine":
        return warmup * (1 + math.cos(math.pi * epoch / num_epochs)) / 2
    return warmup


def _build(training: Training, num_classes: int) -> Detector:
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


def _record(training: Training, splits: Splits, human_maps: HumanMaps | None) -> dict[str, Any]:
    """The start of the card: everything that decides the weights, and which of them are the best."""
    return json.loads(json.dumps(_settings_record(training) | _data_record(splits, human_maps)))


def _data_record(splits: Splits, human_maps: HumanMaps | None) -> dict[str, Any]:
    return {"data": splits.record, "human_maps": None if human_maps is None else human_maps.record}


def _settings_record(training: Training) -> dict[str, Any]:
    """The part of it that the config alone decides."""
    settings = json.loads(training.settings.model_dump_json(exclude=set(UNRECORDED)))
    strategy = json.loads(training.strategy.model_dump_json())
    strategy["salience"] = training.strategy.salience.partition(":")[0]
    return {
        "detector": training.detector,
        "run": training.run,
        "architecture": training.architecture,
        "seed": training.seed,
        "positive": training.config.data.positive,
        "strategy": strategy,
        "training": settings,
    }


def refuse_other_settings(training: Training) -> None:
    """Raise where a training that is begun or finished has other settings than the config; reads no data."""
    if (old := _begun(training.folder)) is not None:
        record = json.loads(json.dumps(_settings_record(training)))
        _refuse_changed(str(training.folder), {key: old.get(key) for key in record}, record)


def refuse_other_data(trainings: Sequence[Training], splits: Splits | None = None) -> None:
    """Raise where a training that is begun or finished was made with other images, classes or human maps than the config names.

    Args:
        trainings: of one config.
        splits: what the config trains on, where that has been read. None: images are opened only where their list, or
            the name, size or time of a human map, is not what the training was begun with.

    Raises:
        Explain2MeError: which says what changed; or the images or human maps are wrong.
    """
    begun = [(training, old) for training in trainings if (old := _begun(training.folder)) is not None]
    if not begun:
        return
    config, settings = begun[0][0].config, begun[0][0].settings
    if splits is None:
        listing = list_splits(config, settings)
        listed = {training.strategy: listed_digest(listing, training.strategy) for training, _ in begun}
        begun = [(training, old) for training, old in begun if old.get("listed") != listed[training.strategy]]
        if not begun:
            return
        splits = read_splits(config, settings)
    sizes: dict[str, tuple[int, int]] = {}
    maps: dict[tuple[StrategyConfig, tuple[int, int]], HumanMaps | None] = {}
    for training, old in begun:
        if training.architecture not in sizes:
            sizes[training.architecture] = _build(training, len(splits.classes)).input_size
        guide = training.strategy, sizes[training.architecture]
        if guide not in maps:
            maps[guide] = read_human_maps(guide[0], splits.training, guide[1])
        record = json.loads(json.dumps(_data_record(splits, maps[guide])))
        _refuse_changed(str(training.folder), {key: old.get(key) for key in record}, record)


def _begin(training: Training, record: dict[str, Any], listed: str) -> dict[str, Any]:
    """A folder keeps what it was begun with, so that going on cannot mix two trainings; nor can a study mix data."""
    old = _begun(training.folder)
    if old is None:
        for folder in sorted(training.folder.parent.parent.glob("*/run*")):
            other = _begun(folder)
            if other is not None:
                shared = ["data"]
                shared += ["human_maps"] if folder.parent == training.folder.parent else []
                shared += ["initial_weights"] if other.get("architecture") == training.architecture else []
                _refuse_changed(str(folder), *({name: each.get(name) for name in shared} for each in (other, record)))
        old = record | {"threads": torch.get_num_threads(), "listed": listed}
        write_json(old, training.folder / BEGUN)
    _refuse_changed(str(training.folder), old, record)
    return old


def _begun(folder: Path) -> dict[str, Any] | None:
    path = folder / BEGUN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete {str(folder)!r} to train again") from None
    return _filled(found)


def _filled(record: dict[str, Any]) -> dict[str, Any]:
    """A setting that a record does not know yet had the value that is its default now."""
    settings = json.loads(TrainingConfig(architectures=("timm:any",)).model_dump_json(exclude=set(UNRECORDED)))
    strategy = json.loads(StrategyConfig(name="any").model_dump_json())
    return record | _merged({"training": settings, "strategy": strategy}, record)


def _merged(defaults: dict[str, Any], known: Any) -> dict[str, Any]:
    if not isinstance(known, dict):
        return defaults
    inner = {key: _merged(value, known.get(key)) for key, value in defaults.items() if isinstance(value, dict)}
    return defaults | known | inner


def _refuse_changed(where: str, old: dict[str, Any], record: dict[str, Any]) -> None:
    before, after = flat(old), flat(record)
    changed = sorted(key for key in {*before, *after} - NO_MATTER if before.get(key) != after.get(key))
    if changed:
        raise ConfigError(
            f"{where!r} holds a training begun with another config or other data: {was_and_is(before, after, changed[0])}; "
            f"give a new folder with --out, or delete the old one"
        )


def _write_curve(curve: list[dict[str, float]], path: Path) -> None:
    columns = list(dict.fromkeys(name for line in curve for name in line))
    lines = [",".join(columns)]
    lines += [",".join("" if name not in line else f"{line[name]:.10g}" for name in columns) for line in curve]
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _committed(path: Path, trainer: L.Trainer) -> Iterator[Path]:
    """All ranks take part in saving; the first writes, under a temporary name that is renamed at the end."""
    if trainer.is_global_zero:
        with atomic_path(path) as temporary:
            yield temporary
    else:
        yield path.with_suffix(".unused")


class _StraightToItsPlace(TorchCheckpointIO):
    """Lightning writes to the machine's folder of temporary files first, which may be small or another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """The path is a temporary name already."""
        whole = io.BytesIO()
        torch.save(checkpoint, whole)
        Path(path).write_bytes(whole.getbuffer())


class _OwnProcesses(LightningEnvironment):
    """Processes are this training's own, never a scheduler's, whose tasks are other trainings; and they keep quiet too."""

    def set_global_rank(self, rank: int) -> None:
        """The first call in each of several processes."""
        super().set_global_rank(rank)
        _silence()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints about hardware and loaders; errors still come through."""
    levels = [logger.level for logger in LIGHTNING_LOGS]
    try:
        with warnings.catch_warnings():
            _silence()
            yield
    finally:
        for logger, level in zip(LIGHTNING_LOGS, levels, strict=True):
            logger.setLevel(level)


def _silence() -> None:
    for logger in LIGHTNING_LOGS:
        logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*|torch\.utils\.data.*|torchmetrics\..*")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
