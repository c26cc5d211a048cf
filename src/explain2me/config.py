"""One TOML file configures a run; pydantic checks it and refuses unknown keys with the nearest right one."""

import glob
import hashlib
import itertools
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from explain2me.errors import ConfigError, nearest

MAX_BYTES = 2**20
MAX_DEPTH = 20
MAX_VALUES = 100_000
MAX_CHARACTERS = 2000
"""Of a name or a text; longer paths do not work everywhere."""
MOST_MISTAKES = 8
"""Of a config that are told at once."""
LONG_KEY = re.compile(  # possessive, and only where a name begins: its time grows with the text alone
    rf"""(?:(?<![\w-])[\w-]++|"[^"\n]*+"|'[^'\n]*+')(?:[ \t]*+\.[ \t]*+(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')){{{MAX_DEPTH},}}+"""
)
NAME_PATTERN = re.compile(r"[^\x00-\x1f\x7f/\\]{1,100}")
SIMILARITY_NAMES = ("ssim", "spearman", "pearson", "top_k_iou", "ssim_windowed")


def _safe_name(name: str) -> str:
    """Names become parts of file names: no separator, no control character, no leading dot."""
    if not NAME_PATTERN.fullmatch(name) or name.startswith(".") or "__" in name:
        raise ValueError(
            f"expected 1 to 100 printable characters without '/', '\\', '__' or a leading dot, got "
            f"{_short(repr(name))}; rename it"
        )
    return name


Name = Annotated[str, AfterValidator(_safe_name)]
Level = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=1, le=65536)] | Literal["auto"]
Side = Annotated[int, Field(ge=8, le=4096)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sample = Count | dict[str, Count] | None


class Section(BaseModel):
    """Base of every table of the config: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _without_repeats(names: tuple[str, ...] | None) -> tuple[str, ...] | None:
    if twice := sorted({name for name in names or () if (names or ()).count(name) > 1}):
        raise ValueError(f"expected different names, got {_short(repr(twice[0]))} twice; remove one")
    return names


class DataConfig(Section):
    """Which images, which classes, and which class counts as positive."""

    manifest: str
    """CSV with the columns path[, label, source, split, salience, image_id, sha256], or a folder label/source/*.jpg, with
    splits split/label/source/*.jpg; or a .tar (WebDataset), .parquet or .arrow file, a folder of these, or what
    ``datasets`` saved to disk, see :mod:`explain2me.packed`. Relative to the TOML file."""
    split: str | None = None
    """Rows of this split only, or the subfolder of this name; None takes every row."""
    positive: str = "fake"
    """The class whose softmax probability is the AUROC score."""
    sample: Sample = None
    """Images drawn of each source without replacement, seeded: a number for all sources, or a table with a number for
    some; None, and a source not in the table, takes every image."""
    classes: tuple[str, ...] | None = None
    """Labels in the order of the model's logits. None: two labels are (other, positive), more are sorted. In container
    files a label that is a number is a place in this list, unless the file names its classes itself."""
    max_pixels: int = Field(default=64_000_000, ge=1)
    """Larger images are quarantined before they are decoded."""
    allowed_quarantine: float = Field(default=0.01, ge=0, le=1)
    """Share of images that may be quarantined before the exit code is 3."""

    @field_validator("classes")
    @classmethod
    def _differ(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return _without_repeats(value)


class DetectorConfig(Section):
    """One detector: an architecture and one checkpoint per training run."""

    name: Name
    architecture: str
    """``timm:NAME`` or ``torchvision:NAME``."""
    checkpoints: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """A path, a pattern, or a list of them, relative to the TOML file; one file per run, in sorted order."""
    pretrained: bool = False
    """Without checkpoints: the library's own pretrained weights (downloaded by timm or torchvision)."""
    random_runs: int | None = Field(default=None, ge=1, le=1000)
    """Without checkpoints: this many runs with random weights, for trying things out."""
    layer: str = "auto"
    """``auto`` (the tensor that enters global pooling) or a dotted module name."""
    input_size: Side | tuple[Side, Side] | None = None
    """Height and width in pixels; None takes the model's own."""
    mean: tuple[Finite, Finite, Finite] | None = None
    """Of each channel in [0, 1], subtracted; None takes the model's own."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Of each channel in [0, 1], divided by; None takes the model's own."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """Of the resize of the whole image to input_size; None takes the model's own."""

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        given = [self.checkpoints is not None, self.pretrained, self.random_runs is not None]
        if sum(given) != 1:
            raise ValueError(
                f"detector {self.name!r}: expected exactly one of checkpoints, pretrained = true, random_runs; "
                f"got {sum(given)} of them"
            )
        return self


class SalienceConfig(Section):
    """How a map is made, and the class that it explains."""

    method: Literal["gradcam"] = "gradcam"
    target: str = "predicted"
    """``predicted``, ``true`` (the label), or the name of one class."""


class NoiseConfig(Section):
    """One kind of noise at one or more levels (section 3.2)."""

    kind: Literal["salt_pepper", "gaussian", "uniform_blend", "turbulence"] = "salt_pepper"
    """See :mod:`explain2me.measures.noise`."""
    levels: tuple[Level, ...] = Field(default=(0.05,), min_length=1)
    """salt_pepper: share of the channel values replaced; gaussian: standard deviation as a fraction of 255; uniform_blend: share
    of the noise; turbulence: displacement (root mean square) in pixels of an image of 224 pixels."""

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if len(set(self.levels)) != len(self.levels):
            raise ValueError(f"expected different levels, got {list(self.levels)}; remove the repeated one")
        if self.kind in ("salt_pepper", "uniform_blend") and max(self.levels) > 1:
            raise ValueError(f"expected levels in [0, 1] for {self.kind}, got {max(self.levels)}")
        return self


class MeasuresConfig(Section):
    """Which of the five measures to take; what is left out of the table is taken with its defaults."""

    entropy: bool = True
    noise: tuple[NoiseConfig, ...] = (NoiseConfig(),)
    """One table ``{kind, levels}``, a list of them, or false."""
    resilience: bool = True
    focus: bool = True
    stability: bool = True
    similarity: tuple[Literal["ssim", "spearman", "pearson", "top_k_iou", "ssim_windowed"], ...] = Field(
        default=("ssim",), min_length=1
    )
    """ssim is eq. 4; the others check that a conclusion does not depend on it."""

    @field_validator("noise", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if value is False:
            return ()
        if value is True:
            return (NoiseConfig(),)
        return (value,) if isinstance(value, Mapping) else value

    @field_validator("similarity", mode="before")
    @classmethod
    def _one_or_many_names(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("similarity")
    @classmethod
    def _differ(cls, value: tuple[str, ...]) -> tuple[str, ...] | None:
        return _without_repeats(value)


class SummaryConfig(Section):
    """How tables are made from scores."""

    bootstrap: int = Field(default=1000, ge=0, le=100_000)
    """Resamples behind the 95 % interval of each score; 0 leaves these intervals out. Those of differences need none."""


class ReportConfig(Section):
    """What the report shows."""

    after_run: bool = True
    """Whether `run`, `study` and `demo` end with it; `explain2me report` writes it at any time."""
    images: int = Field(default=4, ge=1, le=50)
    """Of each score, so many images with the lowest values, the highest, and the largest differences between detectors."""
    colormap: Literal["viridis", "cividis", "magma", "inferno", "plasma", "jet", "turbo"] = "viridis"
    """Of maps; jet is the paper's rainbow, which misleads the eye and colour-blind readers."""


class ComputeConfig(Section):
    """Where and how the forward passes run."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_size: BatchSize = 32
    """Images of a forward pass; ``"auto"``: found when the run begins, and that number ever after, since the last bits
    depend on it."""
    compile: bool = False
    """torch.compile what comes before the layer that is explained. Costs a minute or more for each model and process, and
    needs a C++ compiler on a CPU; changes the last bits, so it belongs to the run."""
    shard_size: int = Field(default=256, ge=1, le=65536)
    """Images per part file."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Processes; each takes whole shards."""
    executor: Literal["local", "ray"] = "local"
    """local: this process, or with workers > 1 processes of this machine; ray: a Ray cluster (extra ``ray``)."""
    ray_address: str | None = None
    """ray: ``auto``, or ``ray://HOST:PORT`` of a cluster; None starts one on this machine."""
    gpus_per_worker: float = Field(default=1.0, ge=0, le=64)
    """ray: share of a GPU that each worker asks for, where the device is cuda, or auto and the driver has a GPU."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of each process on a CPU. The last bits of a forward pass depend on it, so it belongs to the run: None
    takes cores / workers when the run begins, and that number ever after."""

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        return _check_device(value)


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,4})?", value):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, got {_short(repr(value))}")
    return value


class StrategyConfig(Section):
    """What a training minimises, and where its human maps come from."""

    name: Name
    loss: Literal["cross-entropy", "cyborg"] = "cross-entropy"
    alpha: float = Field(default=0.5, ge=0, le=1)
    """cyborg: weight of cross-entropy; the rest weighs the difference to the human map."""
    cam_class: Literal["predicted", "true"] = "predicted"
    """The class whose activation map is guided: the predicted one as released with CYBORG, or the true one."""
    entropy_weight: float = Field(default=0.0, ge=0, le=1000)
    """Weight of the entropy of that map, with either loss; 0 leaves it out."""
    salience: str = "manifest"
    """cyborg: ``manifest`` (its column salience, a map or a table of fixations for each image), or ``mean-of:FOLDER``,
    one average map for all images; relative to the TOML file."""

    @model_validator(mode="after")
    def _salience_is_known(self) -> Self:
        if self.salience != "manifest" and not re.fullmatch("mean-of:.+", self.salience):
            raise ValueError(f"salience: expected 'manifest' or 'mean-of:FOLDER', got {self.salience!r}")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        reads: dict[str, bool] = {"alpha": self.loss == "cyborg", "salience": self.loss == "cyborg"}
        reads["cam_class"] = self.loss == "cyborg" or self.entropy_weight > 0
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
        """Whether training reads class activation maps."""
        return (self.loss == "cyborg" and self.alpha < 1) or self.entropy_weight > 0


class OptimizerConfig(Section):
    """The optimiser and its learning rate; the defaults are those released with the paper."""

    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(default=0.005, gt=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd only."""
    weight_decay: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    schedule: Literal["step", "cosine", "constant"] = "step"
    """step: times step_factor every step_epochs epochs; cosine: down to 0 after the last epoch."""
    step_epochs: int = Field(default=12, ge=1)
    step_factor: float = Field(default=0.1, gt=0, le=1)
    warmup_epochs: int = Field(default=0, ge=0)
    """Epochs over which the learning rate rises linearly."""
    gradient_clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient."""


class AugmentationConfig(Section):
    """What is done to an image, and to its human map with it, each time it is seen in training."""

    flip: bool = False
    """Mirrored half of the time."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """The smallest share of the area that a random crop keeps (aspect 3:4 to 4:3), resized to the input size; 1: none."""
    shift: float = Field(default=0.0, ge=0, le=0.5)
    """The largest shift as a fraction of the side, edges repeated."""


class TrainingConfig(Section):
    """Detectors to train: every architecture with every strategy, ``runs`` times each. Defaults: the paper's, but for
    ``pretrained``, which downloads."""

    architectures: tuple[str, ...] = Field(min_length=1)
    """``timm:NAME`` or ``torchvision:NAME``."""
    strategies: tuple[StrategyConfig, ...] = Field(default=(StrategyConfig(name="cross-entropy"),), min_length=1)
    runs: int = Field(default=10, ge=1, le=1000)
    """Independently trained copies of each detector; run i of all strategies starts from the same weights."""
    manifest: str | None = None
    """Images to train on and to validate with, in any form of data.manifest; None: data.manifest. Relative to the TOML
    file."""
    split: str | None = None
    """Rows to train on; None: every row."""
    validation_split: str | None = None
    """Rows to validate with. Without it and validation_share the last epoch is the best one."""
    validation_share: float = Field(default=0.0, ge=0, lt=1)
    """Instead of validation_split: the share of each label and source that is held out of the rows to train on."""
    sample: Sample = None
    """Images of each source to train on, drawn as for data.sample."""
    pretrained: bool | str = False
    """Start from the library's weights (downloaded by timm or torchvision) instead of random ones: true, its default ones,
    or a name that torchvision gives some, such as ``IMAGENET1K_V1``."""
    input_size: Side | tuple[Side, Side] | None = None
    """Height and width in pixels; None takes the model's own."""
    epochs: int = Field(default=50, ge=1, le=100_000)
    batch_size: int = Field(default=20, ge=1, le=65536)
    """Images of a step; of each device where ``devices`` share a training."""
    optimizer: OptimizerConfig = OptimizerConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    class_balance: Literal["none", "weights", "sampling"] = "none"
    """weights: of the loss, by the inverse share of a class; sampling: classes drawn alike, with replacement."""
    monitor: Literal["accuracy", "auroc", "loss"] = "accuracy"
    """What makes an epoch the best, on the validation split."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many epochs without a better one."""
    checkpoint: Literal["best", "last"] = "best"
    """Which weights a study evaluates."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed, as Lightning's bf16-mixed. float32 on CUDA is PyTorch's: its convolutions are in TF32 there."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``; of the trainings, as compute.device is of the comparison."""
    devices: int = Field(default=1, ge=1, le=1024)
    """Devices that share one training (Lightning's data parallel strategy); batch_size is that of each."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Trainings at a time, each in a process of its own."""
    loaders: int = Field(default=0, ge=0, le=256)
    """Processes of each training that read images to train on, and as many for those to validate with; 0 reads in its own.
    Each of them keeps up to 2 GiB of images decoded, and as much of human maps."""
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Beside the CSV file that is always written; each must be installed.

    W&B and MLflow read their own environment variables; MLflow writes to ``mlflow.db`` in the output folder where
    ``MLFLOW_TRACKING_URI`` is not set.
    """

    @field_validator("architectures")
    @classmethod
    def _known_libraries(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name.startswith(("timm:", "torchvision:")):
                raise ValueError(
                    f"expected timm:NAME or torchvision:NAME, such as torchvision:resnet50, got {_short(name)!r}"
                )
        return value

    @field_validator("pretrained", mode="before")
    @classmethod
    def _known_weights(cls, value: Any) -> Any:
        if not isinstance(value, bool | str) or value == "":
            raise ValueError(f"expected true, false or a name of weights, got {_short(repr(value))}")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        return _check_device(value)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [strategy.name for strategy in self.strategies]
        if twice := sorted({name for name in names if names.count(name) > 1}):
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
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected different architectures, got {twice[0]!r} twice; remove one")
        for name, strategy in itertools.product(names, self.strategies):
            _safe_name(f"{name}-{strategy.name}")  # the detector, and its folder
        return self


class Config(Section):
    """Everything that decides the numbers of a run."""

    name: Name
    """Of the run or study; the default folder is runs/NAME."""
    seed: int = Field(default=7, ge=0, lt=2**63)
    """Of everything that is drawn: samples, noise, chance partners, resamples; training run i has seed + i."""
    data: DataConfig
    detectors: tuple[DetectorConfig, ...] = ()
    """With a table [training] these are compared beside the detectors that are trained."""
    training: TrainingConfig | None = None
    salience: SalienceConfig = SalienceConfig()
    measures: MeasuresConfig = MeasuresConfig()
    summary: SummaryConfig = SummaryConfig()
    compute: ComputeConfig = ComputeConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [detector.name for detector in self.detectors]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"expected different detector names, got {twice[0]!r} twice; rename one")
        if not names and self.training is None:
            raise ValueError("detectors is missing; add one or more tables [[detectors]], or a table [training]")
        return self


MEASURING_FIELDS = (
    ("measures", "similarity"),
    ("measures", "entropy"),
    ("measures", "stability"),
    ("summary",),
    ("report",),
)
"""Fields that stage 1 does not read: they may change between two calls on one run folder."""
ENGINE_FIELDS = tuple(("compute", name) for name in ("workers", "executor", "ray_address", "gpus_per_worker"))
"""Who carries the shards; no result depends on it."""
FREE_FIELDS = (*MEASURING_FIELDS, *ENGINE_FIELDS, ("data", "allowed_quarantine"), ("name",), ("training",))


def load_config(path: Path, sets: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply ``--set`` overrides, make its paths absolute, and check it.

    Args:
        path: the TOML file.
        sets: overrides such as ``measures.noise.levels=[0,0.1]``; the right side is TOML, or else a plain string.

    Raises:
        ConfigError: the file is missing or not TOML, or a key or value is wrong; the message names the key.
    """
    where = f"config {str(path)!r}"
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ConfigError(f"{where} is a pipe or a device; give a TOML file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{where} is larger than {MAX_BYTES} bytes; give a TOML file")
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{where} does not exist; give the path of a TOML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{where} is a folder; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read as UTF-8 text: {error}") from None
    try:
        tree = _parse_toml(text)
    except (ValueError, RecursionError) as error:  # ValueError: not TOML, or a number of thousands of digits
        raise ConfigError(f"{where} is not valid TOML: {_short(str(error))}") from None
    _apply_sets(tree, sets)
    return _absolute(parse_config(tree), path.resolve().parent)


def _parse_toml(text: str) -> dict[str, Any]:
    """As tomllib, which takes minutes and all memory for a key of 100,000 names."""
    if LONG_KEY.search(text):
        raise ValueError(f"a key of more than {MAX_DEPTH} names; no field is so deep")
    return tomllib.loads(text)


def parse_config(tree: Mapping[str, Any]) -> Config:
    """Check a parsed config; the mistakes become one line of a ConfigError."""
    _check_tree(tree)
    try:
        return Config.model_validate(_tuples(tree))
    except ValidationError as error:
        mistakes = [_plain(dict(mistake)) for mistake in error.errors() if mistake["loc"][-1:] != ("literal['auto']",)]
        inner = [mistake for mistake in mistakes if mistake["type"] != "too_short"]  # follows from a wrong item
        lines = list(dict.fromkeys(_explain_mistake(mistake) for mistake in inner or mistakes))
        more = f"; and {len(lines) - MOST_MISTAKES} more" if len(lines) > MOST_MISTAKES else ""
        raise ConfigError("config: " + "; ".join(lines[:MOST_MISTAKES]) + more) from None


def _check_tree(tree: Mapping[str, Any]) -> None:
    """Refuse what no field can mean and what those who read on cannot take: depth, size, NUL and endless numbers."""
    level: list[tuple[str, Any]] = [("", tree)]
    count = 0
    for _ in range(MAX_DEPTH):
        below: list[tuple[str, Any]] = []
        for where, value in level:
            _check_value(where, value)
            children = (
                value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
            )
            for key, child in children:
                _check_value(where, key)
                below.append((f"{where}.{_short(key)}" if where else _short(key), child))
        count += len(below)
        if count > MAX_VALUES:
            raise ConfigError(f"config: expected at most {MAX_VALUES} values, got more; is it a config of explain2me?")
        if not below:
            return
        level = below
    raise ConfigError(
        f"{_short(level[0][0])}: tables and arrays are nested more than {MAX_DEPTH} deep; no field needs that"
    )


def _check_value(where: str, value: Any) -> None:
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        raise ConfigError(f"{where or 'config'}: a text of {len(value)} characters, expected at most {MAX_CHARACTERS}")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where or 'config'}: {_short(repr(value))} holds a NUL character; take it out")
    if isinstance(value, int) and abs(value) >= 2**64:
        raise ConfigError(
            f"{where}: expected a number below 2^64, got one of {value.bit_length()} bits; give a smaller one"
        )


def _short(text: Any) -> str:
    """A name or value of any length as part of a message."""
    shown = str(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def override(config: Config, sets: Sequence[str]) -> Config:
    """The same config with ``--set`` overrides applied; paths in it are kept as they are."""
    if not sets:
        return config
    tree = json.loads(config.model_dump_json())
    _apply_sets(tree, sets)
    return parse_config(tree)


def fingerprint(config: Config) -> dict[str, Any]:
    """The part of the config that decides the maps, as a flat dict ``{"measures.noise.0.levels.0": 0.05, ...}``."""
    tree = json.loads(config.model_dump_json())
    for *parents, last in FREE_FIELDS:
        node = tree
        for parent in parents:
            node = node[parent]
        del node[last]
    return flat(tree)


def digest(value: Any) -> str:
    """A short stable hash (16 hex digits) of anything that JSON can hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dicts and lists as ``{"a.0.b": value}``."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def was_and_is(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    """What a field of two flat configs was and is, in the words of a TOML file.

    >>> was_and_is({}, {"detectors.0.input_size": 96}, "detectors.0.input_size")
    'detectors.0.input_size was not set, is 96'
    """
    values = (before.get(key), after.get(key))
    was, now = ("not set" if v is None else str(v).lower() if isinstance(v, bool) else repr(v) for v in values)
    return f"{key} was {was}, is {now}"


def _tuples(tree: Any) -> Any:
    """TOML arrays of scalars to tuples: the models are strict and frozen."""
    if isinstance(tree, Mapping):
        return {key: _tuples(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return tuple(_tuples(value) for value in tree)
    return tree


def _apply_sets(tree: dict[str, Any], sets: Sequence[str]) -> None:
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set: expected key=value, e.g. compute.batch_size=16, got {_short(repr(item))}")
        keys = key.strip().split(".")
        if len(keys) > MAX_DEPTH:
            raise ConfigError(f"--set {_short(item)}: {len(keys)} names in one key; no field is so deep")
        _set(tree, keys, _parse_value(text, item), _short(item))


def _set(node: Any, keys: list[str], value: Any, item: str) -> None:
    for i, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            if (index := _index(key, node)) is not None:
                node = node[index]
            elif len(node) == 1 and isinstance(node[0], dict):  # measures.noise.levels when there is one kind of noise
                _set(node[0], keys[i:], value, item)
                return
            else:
                raise ConfigError(
                    f"--set {item}: {_short(key)!r} is not an index of a list of {len(node)}; give 0 to {len(node) - 1}"
                )
        else:
            node = node.setdefault(key, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {item}: {_short('.'.join(keys[: i + 1]))} is a value, not a table")
    if isinstance(node, list):
        if len(node) == 1 and isinstance(node[0], dict):
            node = node[0]
        elif (index := _index(keys[-1], node)) is not None:
            node[index] = value
            return
        else:
            raise ConfigError(f"--set {item}: {_short(keys[-1])!r} is not an index of a list of {len(node)}")
    node[keys[-1]] = value


def _parse_value(text: str, item: str) -> Any:
    try:
        return _parse_toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()
    except (ValueError, RecursionError) as error:  # TOML, but thousands of digits or brackets
        raise ConfigError(f"--set {_short(item)}: the value cannot be read: {_short(error)}") from None


def _index(key: str, node: Sequence[Any]) -> int | None:
    """The place in a list that a part of a key names."""
    return int(key) if re.fullmatch("[0-9]{1,9}", key) and int(key) < len(node) else None


def _plain(mistake: dict[str, Any]) -> dict[str, Any]:
    """Where a field takes a number or a word, the mistake is about the number."""
    return mistake | {"loc": tuple(part for part in mistake["loc"] if part != "constrained-int")}


def _explain_mistake(mistake: dict[str, Any]) -> str:
    where = ".".join(_short(part) for part in mistake["loc"])
    kind = mistake["type"]
    if kind == "extra_forbidden":
        key = str(mistake["loc"][-1])
        return f"unknown key {where!r}: {nearest(key, _known_keys(mistake['loc'][:-1]))}"
    if kind == "missing":
        return f"{where} is missing; add it"
    shown = _short(repr(mistake.get("input")))
    if kind == "literal_error":
        known = re.findall(r"'([^']*)'", str(mistake["ctx"]["expected"]))
        return f"{where}: unknown value {shown}; {nearest(str(mistake['input']), known)}"
    message = str(mistake["msg"]).removeprefix("Value error, ")
    message = message if len(message) <= 400 else f"{message[:397]}..."
    if kind == "tuple_type":
        message = (
            'Must be a list, such as [1, 2] or ["a", "b"] (behind --set all of it in quotation marks of the shell)'
        )
    if not where:
        return message
    return (
        f"{where}: {message}" if kind == "value_error" else f"{where}: {message[0].lower()}{message[1:]}, got {shown}"
    )


def _known_keys(path: Sequence[str | int]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "data": DataConfig,
        "detectors": DetectorConfig,
        "training": TrainingConfig,
        "strategies": StrategyConfig,
        "optimizer": OptimizerConfig,
        "augmentation": AugmentationConfig,
        "salience": SalienceConfig,
        "measures": MeasuresConfig,
        "noise": NoiseConfig,
        "summary": SummaryConfig,
        "report": ReportConfig,
        "compute": ComputeConfig,
    }
    names = [part for part in path if isinstance(part, str)]
    return sorted((sections[names[-1]] if names else Config).model_fields)


def _absolute(config: Config, folder: Path) -> Config:
    """Paths in the TOML file are relative to it; a run folder must not depend on where it was started from."""
    data = config.data.model_copy(update={"manifest": str(folder / config.data.manifest)})
    detectors = []
    for detector in config.detectors:
        paths = detector.checkpoints
        if paths is not None:
            paths = _below(folder, paths) if isinstance(paths, str) else tuple(_below(folder, p) for p in paths)
        detectors.append(detector.model_copy(update={"checkpoints": paths}))
    training = config.training
    if training is not None:
        strategies = tuple(_absolute_strategy(strategy, folder) for strategy in training.strategies)
        manifest = None if training.manifest is None else str(folder / training.manifest)
        training = training.model_copy(update={"strategies": strategies, "manifest": manifest})
    return config.model_copy(update={"data": data, "detectors": tuple(detectors), "training": training})


def _below(folder: Path, pattern: str) -> str:
    """A path or pattern below a folder, whose own name is no pattern."""
    path = folder / pattern
    exists = os.path.exists(path)  # noqa: PTH110 - False for a name that no file can have
    return str(path) if exists or Path(pattern).is_absolute() else str(Path(glob.escape(str(folder))) / pattern)


def _absolute_strategy(strategy: StrategyConfig, folder: Path) -> StrategyConfig:
    kind, colon, path = strategy.salience.partition(":")
    return strategy.model_copy(update={"salience": f"{kind}:{folder / path}"}) if colon else strategy
