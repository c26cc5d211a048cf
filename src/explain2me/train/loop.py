"""One training on Lightning Fabric: read this file first, and in it :func:`train`."""

import contextlib
import functools
import itertools
import math
import time
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from explain2me.config.training import OptimizerConfig
from explain2me.detectors.architectures import classifier_of
from explain2me.detectors.load import Detector
from explain2me.errors import DivergedError
from explain2me.run.files import atomic_path
from explain2me.run.leftovers import remove_leftovers
from explain2me.run.provenance import provenance
from explain2me.salience.gradcam import predicted_classes
from explain2me.train.cams import class_activation_maps, find_features
from explain2me.train.data import (
    EpochSampler,
    Example,
    Examples,
    HumanMaps,
    Rows,
    Splits,
    class_weights,
    list_splits,
    read_splits,
)
from explain2me.train.devices import run_on_devices, training_device
from explain2me.train.human_maps import listed_digest, read_human_maps
from explain2me.train.loggers import log_epoch, open_loggers
from explain2me.train.losses import cross_entropy, guided_loss
from explain2me.train.metrics import EpochSums, validate
from explain2me.train.record import begin, full_record, refuse_changed, settings_record, with_defaults, write_card
from explain2me.train.training import (
    DIVERGED,
    METRICS,
    RESUME,
    LockedError,
    OnStep,
    Progress,
    Training,
    build_detector,
    commit_epoch,
    load_resume,
    promote_best,
)
from explain2me.workers.schedule import torch_threads

CHECK_STEPS = 10
"""Number of steps between two checks that the loss is finite; each check waits for the device."""


def train_if_possible(training: Training, on_step: OnStep | None = None) -> None:
    """One of many trainings: if it diverges, it leaves a note in its folder; if another process has it, it is left out."""
    with contextlib.suppress(LockedError):
        try:
            train_detector(training, on_step)
        except DivergedError as error:
            with atomic_path(training.folder / DIVERGED) as temporary:
                temporary.write_text(str(error), encoding="utf-8")


def train_detector(training: Training, on_step: OnStep | None = None) -> None:
    """Train one detector and write its files; an interrupted training continues, a finished one is left alone.

    On a CPU an interrupted and continued training gives the same bytes as one without a break. The global random state
    stays as it was.

    Raises:
        Explain2MeError: wrong config, images or human maps; the loss is not finite; ``folder`` holds another training.
    """
    settings, folder = training.settings, training.folder
    device = training_device(settings)
    listed = list_splits(training.data, settings, training.study_seed)
    splits = read_splits(listed, training.data.max_pixels, training.index)
    detector = build_detector(training, len(splits.classes))
    human_maps = read_human_maps(training.strategy, splits.training, detector.input_size, training.index)
    record = full_record(training, splits, human_maps, detector)
    folder.mkdir(parents=True, exist_ok=True)
    with training.locked():
        (folder / DIVERGED).unlink(missing_ok=True)
        begun = begin(training, record, listed_digest(listed, training.strategy))
        if training.done:
            (folder / RESUME).unlink(missing_ok=True)  # the process was killed right after it wrote the card
            return
        remove_leftovers(folder)
        record["threads"] = begun.get("threads", torch.get_num_threads())
        environment = provenance("lightning", "safetensors")
        job = Job(training, detector, splits, human_maps, record, environment, on_step)
        with open_loggers(
            settings.loggers,
            folder,
            project=training.study,
            name=f"{training.detector}-run{training.run:02d}",
            settings=settings_record(training),
            continues=(folder / RESUME).exists() or not (folder / METRICS).exists(),
        ) as loggers:
            run_on_devices(functools.partial(train, job=job), settings, device, loggers)


@dataclass(frozen=True)
class Job:
    """A training with all that it reads.

    ``detector`` has its first weights; ``record`` is what the training was begun with; ``environment`` the versions, git
    state and hardware of this process.
    """

    training: Training
    detector: Detector
    splits: Splits
    human_maps: HumanMaps | None
    record: dict[str, Any]
    environment: dict[str, Any]
    on_step: OnStep | None = None

    @property
    def class_weights(self) -> Tensor | None:
        """Weight of each class in the loss; None: all alike."""
        if self.training.settings.class_balance != "weights":
            return None
        return class_weights(self.splits.training.labels, len(self.splits.classes))


def train(fabric: Fabric, job: Job) -> None:
    """Train from the last committed epoch to the end, then write the card. Runs in the process of each device."""
    training, settings, splits = job.training, job.training.settings, job.splits
    with torch_threads(max(1, job.record["threads"] // fabric.world_size)):
        network, optimizer = make_network(fabric, job)
        batches = make_batches(fabric, job, splits.training, train=True)
        held_out = None if splits.validation is None else make_batches(fabric, job, splits.validation, train=False)
        positive, num_held_out = (
            splits.classes.index(training.data.positive),
            len(splits.validation.files if splits.validation else ()),
        )
        progress = restore(fabric, job, network, optimizer)
        start = time.monotonic() - progress.seconds

        while not progress.is_finished(settings):
            rate = learning_rate(settings.optimizer, progress.epochs, settings.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            metrics = {"epoch": progress.epochs + 1, "learning_rate": rate}
            sums = train_epoch(fabric, job, network, optimizer, batches, progress)
            check_weights(training, network.module.model, progress.epochs)
            if held_out is not None:
                metrics |= validate(fabric, network, held_out, positive=positive, num_images=num_held_out)
            progress.add(metrics | sums.means(fabric, "train"), settings)
            progress.seconds = time.monotonic() - start
            if fabric.is_global_zero:
                commit_epoch(training.folder, progress, network.module.model, optimizer, job.record)
                log_epoch(fabric.loggers, progress.curve[-1])

        if fabric.is_global_zero:
            write_card(training, job.record, progress, job.detector)
            (training.folder / RESUME).unlink(missing_ok=True)


def train_epoch(
    fabric: Fabric, job: Job, network: nn.Module, optimizer: Optimizer, batches: DataLoader[Example], progress: Progress
) -> EpochSums:
    """One pass over the images to train on; a DivergedError where the loss is not finite."""
    settings, epoch, sums = job.training.settings, progress.epochs, EpochSums()
    weights = fabric.to_device(job.class_weights)
    cast(EpochSampler, batches.sampler).set_epoch(epoch)
    network.train()
    for step, cpu_batch in enumerate(batches):
        batch: Example = fabric.to_device(cpu_batch)
        seed_step(fabric, job.training.seed, epoch, step)
        logits, features = network(batch.image)
        loss = loss_of(job, batch, logits, features, weights)
        optimizer.zero_grad()
        fabric.backward(loss)
        if largest := settings.optimizer.gradient_clip:
            fabric.clip_gradients(network, optimizer, max_norm=largest, error_if_nonfinite=False)
        optimizer.step()
        sums.add(loss, logits, batch.label)
        if (step + 1) % CHECK_STEPS == 0:
            check_loss(job.training, sums, epoch)
        if job.on_step and fabric.is_global_zero:
            job.on_step(epoch * len(batches) + step + 1, settings.epochs * len(batches), progress.text)
    check_loss(job.training, sums, epoch)
    return sums


def loss_of(
    job: Job, batch: Example, logits: Tensor, features: Tensor | None, class_weights: Tensor | None
) -> Float[Tensor, ""]:
    """The mean loss of a batch: cross-entropy, or with guidance by the class activation maps of the same pass."""
    strategy = job.training.strategy
    if features is None:
        return cross_entropy(logits, batch.label, class_weights=class_weights)
    classes = batch.label if strategy.cam_class == "true" else predicted_classes(logits.detach())
    head = classifier_of(job.detector.model)[1].weight.flatten(1)
    return guided_loss(
        logits,
        batch.label,
        cams=class_activation_maps(features, head, classes),
        human_maps=None if job.human_maps is None else batch.human_map,
        alpha=strategy.alpha,
        entropy_weight=strategy.entropy_weight,
        class_weights=class_weights,
    )


class Network(nn.Module):
    """The model with its preprocessing: images (N, 3, H, W) uint8 -> logits, and the features that guidance reads.

    The features are None without guidance and in evaluation mode. Evaluation is in float32 in any precision: 8 bits of a
    logit would make images tie.
    """

    def __init__(self, detector: Detector, *, guided: bool) -> None:
        super().__init__()
        self.model = detector.model.to(memory_format=torch.channels_last)
        self.detector = detector
        self.reader = find_features(self.model, detector.input_size) if guided else None

    def forward(
        self, images: UInt8[Tensor, "N 3 H W"]
    ) -> tuple[Float[Tensor, "N num_logits"], Float[Tensor, "N C h w"] | None]:
        """Logits and features, with gradients in training mode."""
        inputs = self.detector.preprocess(images)
        if not self.training:
            with torch.autocast(images.device.type, enabled=False):
                return self.model(inputs), None
        return (self.model(inputs), None) if self.reader is None else self.reader(inputs)


def make_network(fabric: Fabric, job: Job) -> tuple[Any, Any]:
    """The network and its optimiser on the device, wrapped by Fabric: autocast, and gradients averaged over devices."""
    network = Network(job.detector, guided=job.training.strategy.guided)
    if fabric.world_size > 1:  # spawned processes share the memory of the tensors that they are sent
        for tensor in itertools.chain(network.parameters(), network.buffers()):
            tensor.data = tensor.data.clone()
    return fabric.setup(network, make_optimizer(network, job.training.settings.optimizer))


def make_optimizer(network: nn.Module, config: OptimizerConfig) -> Optimizer:
    """The optimiser of all parameters, at the full learning rate."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        return torch.optim.SGD(network.parameters(), momentum=config.momentum, **options)
    return torch.optim.AdamW(network.parameters(), **options)


def restore(fabric: Fabric, job: Job, network: Any, optimizer: Any) -> Progress:
    """Load the last committed epoch into the network and the optimiser; an empty progress where there is none.

    Raises:
        CheckpointError: resume.ckpt is damaged, or of another version.
        ConfigError: it is of another training.
    """
    progress, path = Progress(), job.training.folder / RESUME
    state = load_resume(path)
    if state is not None:
        refuse_changed(path, with_defaults(state["record"]), job.record)
        network.module.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
    if not progress.is_finished(job.training.settings):
        progress.note_environment(job.environment | {"device": str(fabric.device)})
    if fabric.is_global_zero:
        promote_best(path.parent, progress.best_epoch)
    fabric.barrier()  # the first process removes resume.ckpt when it is finished; all have read it by now
    return progress


def learning_rate(config: OptimizerConfig, epoch: int, num_epochs: int) -> float:
    """Learning rate of an epoch (from 0); it depends on nothing else, so an interrupt changes nothing.

    >>> [learning_rate(OptimizerConfig(learning_rate=0.5, step_epochs=2), epoch, 6) for epoch in range(4)]
    [0.5, 0.5, 0.05, 0.05]
    """
    factor = min(1.0, (epoch + 1) / (config.warmup_epochs + 1))
    if config.schedule == "step":
        factor *= config.step_factor ** (epoch // config.step_epochs)
    if config.schedule == "cosine":
        factor = factor * (1 + math.cos(math.pi * epoch / num_epochs)) / 2
    return config.learning_rate * factor


def seed_step(fabric: Fabric, seed: int, epoch: int, step: int) -> None:
    """Seed dropout and the like by the step, so that neither an interrupt nor other random draws change anything."""
    key = [seed, 3, epoch, step, fabric.global_rank]
    value = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    torch.default_generator.manual_seed(value)  # torch.manual_seed would seed all devices of the caller
    if fabric.device.type in ("cuda", "mps"):
        getattr(torch, fabric.device.type).manual_seed(value)


def check_loss(training: Training, sums: EpochSums, epoch: int) -> None:
    """Stop a training whose loss is not finite. Waits for the device."""
    if (step := int(sums.bad_batch)) >= 0:
        raise _diverged(training, epoch, f"the loss is not finite in epoch {epoch + 1}, step {step + 1}")


def check_weights(training: Training, model: nn.Module, epoch: int) -> None:
    """Stop a training whose last steps have spoilt the weights, though its losses were finite."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise _diverged(training, epoch, f"{name!r} is not finite after epoch {epoch + 1}")


def _diverged(training: Training, epoch: int, problem: str) -> DivergedError:
    kept = "The last committed epoch is kept" if epoch else "No epoch was finished"
    return DivergedError(
        f"{training.name}: {problem}; lower training.optimizer.learning_rate or set its gradient_clip (in a new folder, or "
        f"with {str(training.folder)!r} moved away). {kept}"
    )


def make_batches(fabric: Fabric, job: Job, rows: Rows, *, train: bool) -> DataLoader[Example]:
    """To train: augmented, in a new order each epoch, without an incomplete last batch: its statistics are noise.

    To validate: all images in order.
    """
    training, settings, detector = job.training, job.training.settings, job.detector
    sampler = EpochSampler(
        len(rows.files),
        training.seed,
        shuffle=train,
        class_of=rows.labels if train and settings.class_balance == "sampling" else None,
        rank=fabric.global_rank,
        world=fabric.world_size,
    )
    examples = Examples(
        rows,
        detector.input_size,
        detector.interpolation,
        human_maps=job.human_maps if train else None,
        augmentation=settings.augmentation if train else None,
        seed=training.seed,
        max_pixels=training.data.max_pixels,
    )
    return DataLoader(
        examples,
        settings.batch_size,
        sampler=sampler,
        num_workers=settings.loaders,
        persistent_workers=settings.loaders > 0,
        multiprocessing_context="spawn" if settings.loaders else None,
        generator=torch.Generator().manual_seed(0),  # of its own, so that it draws none of the model's random numbers
        pin_memory=fabric.device.type == "cuda",
        drop_last=train,
    )
