"""The table [training] of a config, with its strategies, optimiser and augmentation."""

import itertools
import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from explain2me.config.fields import Device, Name, Sample, Section, Side, repeated, safe_name
from explain2me.text import shorten


class StrategyConfig(Section):
    """The loss of a training, and the source of its human maps."""

    name: Name
    loss: Literal["cross-entropy", "cyborg"] = "cross-entropy"
    alpha: float = Field(default=0.5, ge=0, le=1)
    """cyborg: weight of the cross-entropy; 1 - alpha is the weight of the difference to the human map."""
    cam_class: Literal["predicted", "true"] = "predicted"
    """Class of the guided activation map: the predicted class, as in the released code of CYBORG, or the true class."""
    entropy_weight: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the entropy of that map in either loss; 0 leaves it out."""
    salience: str = "manifest"
    """cyborg: ``manifest``, whose column salience names a map or a table of fixations for each image; or
    ``mean-of:FOLDER``, one average map for all images, relative to the TOML file."""

    @model_validator(mode="after")
    def _salience_is_known_and_nothing_is_ignored(self) -> Self:
        if self.salience != "manifest" and not re.fullmatch("mean-of:.+", self.salience):
            raise ValueError(f"salience: expected 'manifest' or 'mean-of:FOLDER', got {self.salience!r}")
        cyborg = self.loss == "cyborg"
        reads = {"alpha": cyborg, "salience": cyborg, "cam_class": cyborg or self.entropy_weight > 0}
        for name, read in reads.items():
            value = getattr(self, name)
            if not read and value != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} = {value!r} is for loss = 'cyborg'"
                    + (" or an entropy_weight" if name == "cam_class" else "")
                    + f", and the loss is {self.loss!r}; set loss = 'cyborg', or remove {name}"
                )
        return self

    @property
    def guided(self) -> bool:
        """Whether the loss depends on class activation maps."""
        return (self.loss == "cyborg" and self.alpha < 1) or self.entropy_weight > 0


class OptimizerConfig(Section):
    """The optimiser and its learning rate. The defaults are those of the released code of the paper."""

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.005, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd only."""
    weight_decay: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Of the learning rate. step: multiplied by step_factor every step_epochs epochs; cosine: falls to 0 after the last
    epoch."""
    step_epochs: int = Field(default=12, ge=1)
    step_factor: float = Field(default=0.1, gt=0, le=1)
    warmup_epochs: int = Field(default=0, ge=0)
    """Number of first epochs in which the learning rate rises linearly."""
    gradient_clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; None does not clip."""


class AugmentationConfig(Section):
    """Random changes of an image, and of its human map, each time training reads them."""

    flip: bool = False
    """Mirrors with probability one half."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """Smallest share of the area that a random crop keeps (aspect 3:4 to 4:3), resized to the input size; 1: no crop."""
    shift: float = Field(default=0.0, ge=0, le=0.5)
    """Largest shift as a fraction of the side; the edge pixels are repeated."""


class TrainingConfig(Section):
    """Detectors to train: every architecture with every strategy, ``runs`` times each. The defaults are those of the paper,
    except ``pretrained``, which downloads weights."""

    architectures: tuple[str, ...] = Field(min_length=1)
    """``timm:NAME`` or ``torchvision:NAME``."""
    strategies: tuple[StrategyConfig, ...] = Field(default=(StrategyConfig(name="cross-entropy"),), min_length=1)
    runs: int = Field(default=10, ge=1, le=1000)
    """Number of training runs of each detector. Run i starts from the same weights in every strategy."""
    manifest: str | None = None
    """Images for training and validation, in any form of data.manifest; None: data.manifest. Relative to the TOML file."""
    split: str | None = None
    """Split for training; None: every row."""
    validation_split: str | None = None
    """Split for validation. Without it and without validation_share, the last epoch counts as the best one."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Instead of validation_split: share of each label and source that is held out of the training rows."""
    sample: Sample = None
    """Number of training images of each source, as in data.sample."""
    pretrained: bool | str = False
    """Starts from pretrained weights of timm or torchvision, which download them: true takes the default weights, a name
    takes weights of torchvision, such as ``IMAGENET1K_V1``. false starts from random weights."""
    input_size: Side | tuple[Side, Side] | None = None
    """Height and width in pixels; None takes those of the model."""
    epochs: int = Field(default=50, ge=1, le=100_000)
    batch_size: int = Field(default=20, ge=1, le=65536)
    """Images of a step on each device."""
    optimizer: OptimizerConfig = OptimizerConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    class_balance: Literal["none", "weights", "sampling"] = "none"
    """weights: the loss weighs a class by the inverse of its share; sampling: classes are drawn with equal probability, with
    replacement."""
    monitor: Literal["accuracy", "auroc", "loss"] = "accuracy"
    """The best epoch has the best value of this on the validation split."""
    patience: int | None = Field(default=None, ge=1)
    """Training stops after this many epochs without a better one; None: never."""
    checkpoint: Literal["best", "last"] = "best"
    """Epoch whose weights a study compares."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision, Lightning's bf16-mixed. float32: PyTorch's default, with TF32 convolutions on CUDA."""
    device: Device = "auto"
    """Device of the trainings: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``. compute.device is that of the comparison."""
    devices: int = Field(default=1, ge=1, le=1024)
    """Number of devices that share one training (Lightning's data parallel strategy)."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Number of trainings at a time, each in its own process."""
    loaders: int = Field(default=0, ge=0, le=256)
    """Number of processes of each training that read its training images, and the same number for its validation images; 0
    reads them in the training process. Each process caches up to 2 GiB of decoded images and 2 GiB of human maps."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Loggers beside the CSV file, which is always written. Each must be installed.

    W&B and MLflow read their own environment variables; MLflow writes to ``mlflow.db`` in the output folder where
    ``MLFLOW_TRACKING_URI`` is not set.
    """

    @field_validator("architectures")
    @classmethod
    def _known_libraries(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name.startswith(("timm:", "torchvision:")):
                raise ValueError(
                    f"expected timm:NAME or torchvision:NAME, such as torchvision:resnet50, got {shorten(name)!r}"
                )
        return value

    @field_validator("pretrained", mode="before")
    @classmethod
    def _known_weights(cls, value: Any) -> Any:
        if not isinstance(value, bool | str) or value == "":
            raise ValueError(f"expected true, false or a name of weights, got {shorten(repr(value))}")
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if twice := repeated([strategy.name for strategy in self.strategies]):
            raise ValueError(f"expected different strategy names, got {twice[0]!r} twice; rename one")
        if self.validation_split is not None and self.validation_share:
            raise ValueError("expected one of validation_split and validation_share, got both; remove one")
        if self.patience is not None and self.validation_split is None and not self.validation_share:
            raise ValueError("patience waits for a better epoch, and without validation each is; give validation_split")
        if self.devices > 1 and ":" in self.device:
            raise ValueError(
                f"expected a device without a number for devices = {self.devices}, got {self.device!r}; give 'cuda', and "
                f"choose with CUDA_VISIBLE_DEVICES"
            )
        names = [name.partition(":")[2] for name in self.architectures]
        if twice := repeated(names):
            raise ValueError(f"expected different architectures, got {twice[0]!r} twice; remove one")
        for name, strategy in itertools.product(names, self.strategies):
            safe_name(f"{name}-{strategy.name}")  # the detector, and its folder
        return self
