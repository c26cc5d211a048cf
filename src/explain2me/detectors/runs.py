"""The training runs of a detector in a config: which weights, loaded how."""

import os
from glob import glob
from pathlib import Path

from explain2me.config.schema import DetectorConfig
from explain2me.detectors.load import Detector, load_detector
from explain2me.errors import CheckpointError, Explain2MeError
from explain2me.run.schema import ALL


def weights_of(detector: DetectorConfig, seed: int) -> list[tuple[str, str | None, int]]:
    """(run name, checkpoint or None, seed of random weights) of each run of a detector.

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
        exists = os.path.exists(pattern)  # noqa: PTH110 - False for a name that no file can have
        found = [pattern] if exists else sorted(glob(pattern, recursive=True))  # noqa: PTH207 - patterns may be absolute
        if not found:
            raise CheckpointError(
                f"detector {detector.name!r}: no file matches checkpoints = {pattern!r}; give a path or a pattern, "
                f"such as weights/*.safetensors, relative to the TOML file"
            )
        paths += [path for path in found if path not in paths]
    stems = [Path(path).stem.replace("__", "_").lstrip(".") for path in paths]
    if len(set(stems)) < len(stems) or ALL in stems:
        stems = [f"run{i:02d}" for i in range(len(paths))]
    return [(stem, path, seed) for stem, path in zip(stems, paths, strict=True)]


def load_model(wanted: DetectorConfig, checkpoint: str | None, seed: int, num_classes: int | None) -> Detector:
    """The detector of one run, on the CPU and in evaluation mode; errors name the detector."""
    size = (wanted.input_size, wanted.input_size) if isinstance(wanted.input_size, int) else wanted.input_size
    try:
        return load_detector(
            wanted.architecture,
            Path(checkpoint) if checkpoint else None,
            num_classes=num_classes,
            pretrained=wanted.pretrained,
            input_size=size,
            mean=wanted.mean,
            std=wanted.std,
            interpolation=wanted.interpolation,
            seed=seed,
        )
    except Explain2MeError as error:
        raise type(error)(f"detector {wanted.name!r}: {error}") from None
