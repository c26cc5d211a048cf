"""Percentile bootstrap. It resamples images within their source, and training runs as clusters."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from explain2me.config.compare import digest
from explain2me.run.folder import Stretch

BLOCK = 200_000
"""Number of resampling weights in memory at a time."""


class Interval(NamedTuple):
    """Limits of a 95 % interval; NaN where it is not defined."""

    low: float
    high: float


def image_weights(stretches: Sequence[Stretch], *, seed: int, resamples: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the resampling weights of the images, block by block: (slice of resamples, float64 (b, N)).

    A weight counts how often an image is drawn. The draws of a stretch depend on the seed and on its label and source
    alone. So every measure and detector has the same resamples, and differences between detectors are paired.
    """
    generators = [_generator(seed, "images", stretch.label, stretch.source) for stretch in stretches]
    step = max(1, BLOCK // max(stretch.stop for stretch in stretches))
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        weights = []
        for generator, stretch in zip(generators, stretches, strict=True):
            count = stretch.stop - stretch.start
            drawn = generator.integers(0, count, size=(rows, count)) + np.arange(rows)[:, None] * count
            weights.append(np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count))
        yield slice(first, first + rows), np.concatenate(weights, axis=1).astype(np.float64)


def run_weights(num_runs: int, *, seed: int, resamples: int) -> np.ndarray:
    """Resampling weights of the runs (resamples, num_runs): how often each is drawn. All ones for a single run."""
    if num_runs == 1:
        return np.ones((resamples, 1))
    drawn = _generator(seed, "runs", num_runs).integers(0, num_runs, size=(resamples, num_runs))
    return np.stack([(drawn == run).sum(1) for run in range(num_runs)], axis=1).astype(np.float64)


def pair_weights(num_runs: int, *, seed: int, resamples: int) -> np.ndarray:
    """Resampling weights of the pairs (0, 1), (0, 2), ... of runs: (resamples, pairs).

    The weight of a pair is the product of the weights of its runs. All ones for a single pair: two runs do not show how
    much a third run would differ.
    """
    pairs = list(itertools.combinations(range(num_runs), 2))
    if len(pairs) == 1:
        return np.ones((resamples, 1))
    weights = run_weights(num_runs, seed=seed, resamples=resamples)
    return np.stack([weights[:, a] * weights[:, b] for a, b in pairs], axis=1)


def interval(estimates: np.ndarray) -> Interval:
    """The 2.5th and the 97.5th percentile of the resampled estimates that are defined."""
    defined = estimates[np.isfinite(estimates)]
    if not len(defined):
        return Interval(float("nan"), float("nan"))
    low, high = np.percentile(defined, [2.5, 97.5])
    return Interval(float(low), float(high))


def weighted_auroc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of weights. A tie counts one half. NaN where a class has no weight.

    Args:
        scores: (N,), higher means more positive.
        positive: bool (N,).
        weights: (B, N), non-negative.

    >>> weighted_auroc(np.array([0.1, 0.4, 0.4]), np.array([False, False, True]), np.ones((1, 3)))
    array([0.75])
    """
    order = np.argsort(scores, kind="stable")
    _, first = np.unique(scores[order], return_index=True)
    sorted_weights = weights[:, order]
    by_value = [np.add.reduceat(sorted_weights * side[order], first, axis=1) for side in (positive, ~positive)]
    below = np.cumsum(by_value[1], axis=1) - 0.5 * by_value[1]
    total = by_value[0].sum(1) * by_value[1].sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (by_value[0] * below).sum(1) / total


def _generator(seed: int, *purpose: object) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=int(digest([seed, "bootstrap", *purpose]), 16)))
