"""The chance level: which other image stands beside each one, and the score above it."""

from typing import Any

import numpy as np
import pyarrow as pa

from explain2me.config.compare import digest
from explain2me.run.folder import stretches_of


def partners(images: pa.Table, predicted: np.ndarray, *, seed: int) -> np.ndarray:
    """For each image another one for the chance level: (N,), -1 where there is none.

    Of the same source, label, and class that the model predicts for the clean image: a map of another class answers
    another question, so that a model with one fixed map for each class would seem to look at the image. Each group is
    rotated by a seeded distance, which is a permutation without fixed points.

    Args:
        images: images.parquet.
        predicted: (N,) class of each clean image, -1 where it is missing.
        seed: of the run.
    """
    result = np.full(len(images), -1, dtype=np.int64)
    for label, source, start, stop in stretches_of(images):
        for wanted in np.unique(predicted[start:stop]):
            group = start + np.flatnonzero(predicted[start:stop] == wanted)
            if wanted >= 0 and len(group) > 1:
                distance = 1 + int(digest([seed, "chance", label, source]), 16) % (len(group) - 1)
                result[group] = np.roll(group, -distance)
    return result


def corrected(value: Any, chance: Any) -> Any:
    """(S - chance) / (1 - chance); NaN where chance is 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        result = (np.asarray(value) - chance) / (1 - np.asarray(chance))
    result = np.where(np.isfinite(result), result, np.nan)
    return float(result) if result.ndim == 0 else result
