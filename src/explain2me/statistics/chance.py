"""Chance: the partner of each image, and the correction of a score. The level itself is scored in ``stages/measure.py``."""

from typing import Any

import numpy as np
import pyarrow as pa

from explain2me.config.compare import digest
from explain2me.run.folder import stretches_of


def partners(images: pa.Table, predicted: np.ndarray, *, seed: int) -> np.ndarray:
    """The partner of each image for the chance level: (N,), -1 where there is none.

    A partner has the same source, the same label, and the same predicted class of the clean image. A map of another
    class answers another question: with such partners, a model with one constant map for each class would score above
    chance. Each group of images is rotated by a seeded distance, so no image is its own partner.

    Args:
        images: images.parquet.
        predicted: (N,) class of each clean image, -1 where it is missing.
        seed: of the run.
    """
    result = np.full(len(images), -1, dtype=np.int64)
    for label, source, start, stop in stretches_of(images):
        for predicted_class in np.unique(predicted[start:stop]):
            group = start + np.flatnonzero(predicted[start:stop] == predicted_class)
            if predicted_class >= 0 and len(group) > 1:
                distance = 1 + int(digest([seed, "chance", label, source]), 16) % (len(group) - 1)
                result[group] = np.roll(group, -distance)
    return result


def corrected(value: Any, chance: Any) -> Any:
    """The score corrected for chance: (score - chance) / (1 - chance). NaN where chance is 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        result = (np.asarray(value) - chance) / (1 - np.asarray(chance))
    result = np.where(np.isfinite(result), result, np.nan)
    return float(result) if result.ndim == 0 else result
