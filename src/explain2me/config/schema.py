"""The tables of a config. Pydantic checks them and refuses unknown keys; the message offers the nearest right key.

The fields of ``[measures]`` are derived from the rows of ``statistics/scores.py``, and ``salience.method`` is a row of
``salience/methods.py``.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, create_model, field_validator, model_validator

from explain2me.config.fields import (
    BatchSize,
    Device,
    Differing,
    Finite,
    Label,
    Level,
    Name,
    Positive,
    Sample,
    Section,
    Side,
    repeated,
)
from explain2me.config.training import TrainingConfig
from explain2me.salience.methods import METHODS
from explain2me.statistics.scores import MEASURES, Measure
from explain2me.text import nearest, shorten


class DataConfig(Section):
    """The images, their classes, and the positive class."""

    manifest: str
    """The images, in one of these forms; relative to the TOML file.

    - A CSV file with the columns path[, label, source, split, salience, image_id, sha256].
    - A folder label/source/*.jpg, with splits split/label/source/*.jpg.
    - A .tar (WebDataset), .parquet or .arrow file, a folder of these, or the folder that ``Dataset.save_to_disk`` of
      ``datasets`` wrote: see :mod:`explain2me.images.containers`.
    """
    split: str | None = None
    """Takes the rows of this split, or the subfolder of this name; None takes every row."""
    positive: Label = "fake"
    """The positive class: AUROC ranks images by its softmax probability."""
    sample: Sample = None
    """Number of images drawn from each source, seeded, without replacement: one number for all sources, or a table from
    source to number. None takes every image, and so does a source that is not in the table."""
    classes: Annotated[tuple[Label, ...] | None, Differing] = None
    """Labels in the order of the model's logits. None: two labels are ordered (other, positive), more are sorted. A
    numeric label of a container file is an index of this list, unless the file names its classes."""
    max_pixels: int = Field(default=64_000_000, ge=1)
    """Images with more pixels are quarantined before they are decoded."""
    allowed_quarantine: float = Field(default=0.01, ge=0, le=1)
    """The exit code is 3 when a larger share of the images is quarantined."""


class DetectorConfig(Section):
    """One detector: an architecture and one checkpoint per training run."""

    name: Name
    architecture: str
    """``timm:NAME`` or ``torchvision:NAME``."""
    checkpoints: str | Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """A path, a pattern, or a list of these, relative to the TOML file. Each file is one training run; the files are
    sorted by name."""
    pretrained: bool = False
    """Takes the pretrained weights of timm or torchvision, which download them, instead of checkpoints."""
    random_runs: int | None = Field(default=None, ge=1, le=1000)
    """Takes this many runs with random weights instead of checkpoints, for a trial."""
    layer: str = "auto"
    """The explained layer: ``auto`` (the tensor that enters global pooling), or a dotted module name."""
    input_size: Side | tuple[Side, Side] | None = None
    """Height and width in pixels; None takes those of the model."""
    mean: tuple[Finite, Finite, Finite] | None = None
    """Subtracted from each channel, which is in [0, 1]; None takes that of the model."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Divides each channel, which is in [0, 1]; None takes that of the model."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    """Interpolation that resizes the whole image to input_size; None takes that of the model."""

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
    """The method that makes the maps, and the class that they explain."""

    method: str = next(iter(METHODS))
    """A row of :data:`explain2me.salience.methods.METHODS`."""
    target: str = "predicted"
    """``predicted``, ``true`` (the label), or the name of one class."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"unknown value {shorten(repr(value))}; {nearest(value, METHODS)}")
        return value


class NoiseConfig(Section):
    """One kind of image corruption at one or more levels (section 3.2)."""

    kind: Literal["salt_pepper", "gaussian", "uniform_blend", "turbulence"] = "salt_pepper"
    """See :mod:`explain2me.measures.noise`."""
    levels: tuple[Level, ...] = Field(default=(0.05,), min_length=1)
    """Meaning of a level: salt_pepper: share of the channel values that are replaced; gaussian: standard deviation as a
    fraction of 255; uniform_blend: weight of the noise; turbulence: root mean square of the displacement in pixels, for
    an image of 224 pixels."""

    @model_validator(mode="after")
    def _levels_fit(self) -> Self:
        if len(set(self.levels)) != len(self.levels):
            raise ValueError(f"expected different levels, got {list(self.levels)}; remove the repeated one")
        if self.kind in ("salt_pepper", "uniform_blend") and max(self.levels) > 1:
            raise ValueError(f"expected levels in [0, 1] for {self.kind}, got {max(self.levels)}")
        return self


def _one_or_many(value: Any) -> Any:
    if isinstance(value, bool):
        return (NoiseConfig(),) if value else ()
    return (value,) if isinstance(value, Mapping) else value


Noises = Annotated[tuple[NoiseConfig, ...], BeforeValidator(_one_or_many)]
"""One table ``{kind, levels}``, a list of these, true (the default one) or false."""

if TYPE_CHECKING:

    class _Switches(Section): ...

else:
    _fields = {row.name: (Noises, (NoiseConfig(),)) if row.has_levels else (bool, True) for row in MEASURES.values()}
    _Switches = create_model("_Switches", __base__=Section, **_fields)


class MeasuresConfig(_Switches):
    """The measures to take: one field for each row of MEASURES. A measure that is left out has its default, which is on."""

    similarity: Annotated[
        tuple[Literal["ssim", "spearman", "pearson", "top_k_iou", "ssim_windowed"], ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
        Differing,
    ] = Field(default=("ssim",), min_length=1)
    """Similarities of two maps. ssim is eq. 4; the others check that a conclusion does not depend on this choice."""

    @property
    def chosen(self) -> tuple[Measure, ...]:
        """The rows of the measures to take, in the order of the paper."""
        return tuple(measure for measure in MEASURES.values() if self.settings_of(measure))

    def settings_of(self, measure: Measure) -> bool | tuple[NoiseConfig, ...]:
        """The field of one measure: true or false, or its corruptions."""
        return getattr(self, measure.name)


class SummaryConfig(Section):
    """How scores become tables."""

    bootstrap: int = Field(default=1000, ge=0, le=100_000)
    """Number of bootstrap resamples for the 95 % interval of each score; 0 leaves these intervals out. Intervals of
    differences use no bootstrap."""


class ReportConfig(Section):
    """Content of the report."""

    after_run: bool = True
    """Whether `run`, `study` and `demo` write a report at their end; `explain2me report` writes one at any time."""
    images: int = Field(default=4, ge=1, le=50)
    """Number of images shown for each score: so many with the lowest values, so many with the highest, and so many with
    the largest differences between detectors."""
    colormap: Literal["viridis", "cividis", "magma", "inferno", "plasma", "jet", "turbo"] = "viridis"
    """Colour map of the salience maps. The paper uses jet, a rainbow, which misleads readers and most of all those who
    are colour-blind."""


class ComputeConfig(Section):
    """The device of the forward passes, and the processes that run them."""

    device: Device = "auto"
    """``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``."""
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_size: BatchSize = 32
    """Images of a forward pass. ``"auto"`` measures a fast size when the run begins; the run keeps this size, because the
    last bits of the maps depend on it."""
    compile: bool = False
    """Compiles the part of the model before the explained layer with torch.compile. This takes a minute or more for each
    model and process, and a C++ compiler on a CPU. It changes the last bits of the maps, so a run keeps this setting."""
    shard_size: int = Field(default=256, ge=1, le=65536)
    """Images per part file."""
    workers: int = Field(default=1, ge=1, le=1024)
    """Number of processes; each takes whole shards."""
    executor: Literal["local", "ray"] = "local"
    """local: this process, or with workers > 1 processes on this machine; ray: a Ray cluster (needs the extra ``ray``)."""
    ray_address: str | None = None
    """ray: ``auto``, or ``ray://HOST:PORT`` of a cluster; None starts a cluster on this machine."""
    gpus_per_worker: float = Field(default=1.0, ge=0, le=64)
    """ray: share of a GPU that each worker requests, where the device is cuda, or auto on a driver with a GPU."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of each process on a CPU. None takes cores / workers when the run begins. The run keeps this number, because
    the last bits of a forward pass depend on it."""


class Config(Section):
    """All settings of a run."""

    name: Name
    """Name of the run or study; the default folder is runs/NAME."""
    seed: int = Field(default=7, ge=0, lt=2**63)
    """Seed of all random numbers: samples, noise, chance partners, resamples. Training run i has seed + i."""
    data: DataConfig
    detectors: tuple[DetectorConfig, ...] = ()
    """Compared with each other, and with the trained detectors where there is a table [training]."""
    training: TrainingConfig | None = None
    salience: SalienceConfig = SalienceConfig()
    measures: MeasuresConfig = MeasuresConfig()
    summary: SummaryConfig = SummaryConfig()
    compute: ComputeConfig = ComputeConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [detector.name for detector in self.detectors]
        if twice := repeated(names):
            raise ValueError(f"expected different detector names, got {twice[0]!r} twice; rename one")
        if not names and self.training is None:
            raise ValueError("detectors is missing; add one or more tables [[detectors]], or a table [training]")
        return self
