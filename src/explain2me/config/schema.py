"""One TOML file configures a run; pydantic checks it and refuses unknown keys with the nearest right one."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from explain2me.config.fields import (
    BatchSize,
    Finite,
    Level,
    Name,
    Positive,
    Sample,
    Section,
    Side,
    check_device,
    without_repeats,
)
from explain2me.config.training import TrainingConfig


class DataConfig(Section):
    """Which images, which classes, and which class counts as positive."""

    manifest: str
    """CSV with the columns path[, label, source, split, salience, image_id, sha256], or a folder label/source/*.jpg, with
    splits split/label/source/*.jpg; or a .tar (WebDataset), .parquet or .arrow file, a folder of these, or what
    ``datasets`` saved to disk, see :mod:`explain2me.images.containers`. Relative to the TOML file."""
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
        return without_repeats(value)


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
        return without_repeats(value)


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
        return check_device(value)


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
