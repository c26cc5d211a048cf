"""List the training runs of a configured detector, and load their models. Imports PyTorch only to load one."""

import os
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from explain2me.config.schema import DetectorConfig, MeasuresConfig
from explain2me.errors import CheckpointError, ConfigError, Explain2MeError
from explain2me.statistics.scores import ALL
from explain2me.text import is_utf8, shorten

if TYPE_CHECKING:
    from explain2me.detectors.load import Detector

MOST_NAME_BYTES = 211
"""Of ``DETECTOR__RUN``. A disk takes 255 of a file name, and the longest is ``explain-DETECTOR__RUN-part-00012-KEY.parquet``."""


def weights_of(detector: DetectorConfig, seed: int) -> list[tuple[str, str | None, int]]:
    """Run name, checkpoint (or None) and seed of random weights of each run of a detector.

    A run is named by its checkpoint file. Where names repeat, or one is reserved, the names are ``run00``, ``run01``
    and so on. Run i of ``random_runs`` gets ``seed + i``.

    Raises:
        CheckpointError: a pattern matches no file.
    """
    if detector.checkpoints is None:
        if detector.random_runs is None:
            return [("pretrained", None, seed)]
        return [(f"random{i}", None, seed + i) for i in range(detector.random_runs)]
    patterns = (detector.checkpoints,) if isinstance(detector.checkpoints, str) else detector.checkpoints
    paths: list[str] = []
    for pattern in patterns:
        paths += [path for path in _matches(pattern, detector.name) if path not in paths]
    stems = [Path(path).stem.replace("__", "_").lstrip(".") for path in paths]
    if len(set(stems)) < len(stems) or ALL in stems:
        stems = [f"run{i:02d}" for i in range(len(paths))]
    return [(stem, path, seed) for stem, path in zip(stems, paths, strict=True)]


def check_runs(detectors: Iterable[DetectorConfig], measures: MeasuresConfig, seed: int) -> None:
    """Check that the checkpoints of each detector are there, and enough for the measures of pairs; loads none.

    Raises:
        CheckpointError: a pattern matches no file, or one whose name no run can have.
        ConfigError: too few runs, see :func:`refuse_single_runs`.
    """
    for detector in detectors:
        runs = weights_of(detector, seed)
        for name, checkpoint, _ in runs:
            _refuse_name(detector.name, name, checkpoint)
        names = [name for name, _, _ in runs]
        count = f"{detector.name!r} has {len(names)} ({', '.join(names)})"
        refuse_single_runs(measures, len(names), count=count, remedy="add checkpoints")


def _refuse_name(detector: str, run: str, checkpoint: str | None) -> None:
    """Refuse a run whose files could not be written: checkpoints give runs their names, and runs their files."""
    place = f"detector {detector!r}: checkpoint {shorten(ascii(run))}"
    if checkpoint is not None and not is_utf8(checkpoint):
        raise CheckpointError(f"{place}: expected a path in UTF-8, got {checkpoint!a}; rename it")
    count = len(f"{detector}__{run}".encode())
    if count > MOST_NAME_BYTES:
        raise CheckpointError(
            f"{place}: expected at most {MOST_NAME_BYTES} bytes in the names of detector and checkpoint together, with '__' between "
            f"them, got {count}: files of the run have both in their names; rename one"
        )


def refuse_single_runs(measures: MeasuresConfig, num_runs: int, *, count: str, remedy: str) -> None:
    """Refuse measures of pairs of training runs where a detector has a single run.

    Raises:
        ConfigError: such a measure is on, and there are fewer than two runs. The message says ``count``, the number of
            runs in words, and ``remedy``, a way to get more.
    """
    for measure in measures.chosen:
        if num_runs < measure.runs_per_value:
            raise ConfigError(
                f"measures.{measure.name} compares training runs and needs at least {measure.runs_per_value} of each "
                f"detector, {count}; {remedy}, or set measures.{measure.name} = false"
            )


def _matches(pattern: str, detector: str) -> list[str]:
    """The file of this name, or the sorted files that match the pattern."""
    exists = os.path.exists(pattern)  # noqa: PTH110 - False, without an error, for a name that no file can have
    paths = [pattern] if exists else sorted(glob(pattern, recursive=True))  # noqa: PTH207 - patterns may be absolute
    if not paths:
        raise CheckpointError(
            f"detector {detector!r}: no file matches checkpoints = {pattern!r}; give a path or a pattern, such as "
            f"weights/*.safetensors, relative to the TOML file"
        )
    return paths


def load_model(detector: DetectorConfig, checkpoint: str | None, seed: int, num_classes: int | None) -> "Detector":
    """Load one run of a detector; errors as of :func:`load_detector`, beginning with the name of the detector."""
    from explain2me.detectors.load import load_detector

    names = ("architecture", "pretrained", "input_size", "mean", "std", "interpolation")
    settings = {name: getattr(detector, name) for name in names}
    try:
        return load_detector(checkpoint=checkpoint or None, num_classes=num_classes, seed=seed, **settings)
    except Explain2MeError as error:
        raise type(error)(f"detector {detector.name!r}: {error}") from None
