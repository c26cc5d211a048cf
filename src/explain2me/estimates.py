"""By how much two detectors differ in a mean score, with an interval: over other images and over other training runs.

Both detectors are measured on the same images, so these are paired; their training runs are independent. The variances over
images and over the runs of each detector add up, and the interval is Student's t with as many degrees of freedom as they
have together (Satterthwaite). It is that of Welch where only runs vary and that of a paired t-test where only images do;
where each image has runs of its own liking it is somewhat wide, since that part is counted with both.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from explain2me.store import Stretch


class Estimate(NamedTuple):
    """A mean over images and training runs, and what its error follows from.

    Attributes:
        mean: NaN where there is no value.
        images: (N,) influence of each image on the mean; they sum up to 0.
        runs: (R,) jackknife pseudo-values, one a run; none where there is one run, or one pair of runs, which says nothing of
            others.
    """

    mean: float
    images: np.ndarray
    runs: np.ndarray


class Difference(NamedTuple):
    """Of two means: its value and standard error, degrees of freedom, 95 % interval, and p of none (two-sided).

    NaN where it is not defined; ``df`` is infinite where nothing varies.
    """

    value: float
    std_error: float
    df: float
    low: float
    high: float
    p: float


class Totals(NamedTuple):
    """Sums of the values of a score, which is all that its estimates over any sources need.

    Attributes:
        sums, counts: (N,) of each image over the units (runs, or pairs of runs).
        by_unit: (2, U, S) sums and counts of each unit over the images of each stretch.
        units: of each unit the runs that it is of.
        stretches: S of them, all N images.
    """

    sums: np.ndarray
    counts: np.ndarray
    by_unit: np.ndarray
    units: Sequence[Sequence[int]]
    stretches: Sequence[Stretch]


def totals(values: np.ndarray, units: Sequence[Sequence[int]], stretches: Sequence[Stretch]) -> Totals:
    """Of values (U, N), NaN where there is none."""
    defined = ~np.isnan(values)
    known = np.where(defined, values, 0.0)
    by_unit = [[side[:, s.start : s.stop].sum(1, dtype=np.float64) for s in stretches] for side in (known, defined)]
    return Totals(known.sum(0), defined.sum(0), np.array(by_unit).swapaxes(1, 2), units, stretches)


def estimate(found: Totals, chosen: Sequence[int]) -> Estimate:
    """The mean of all values of the chosen stretches, by their positions; each image and unit weighs the same.

    >>> two_runs = totals(np.array([[0.1, 0.3], [0.5, 0.7]]), [[0], [1]], [Stretch(None, "a", 0, 2)])
    >>> mean, images, runs = estimate(two_runs, [0])
    >>> round(mean, 3), images.round(3), runs.round(3)
    (0.4, array([-0.05,  0.05]), array([0.2, 0.6]))
    """
    parts = [slice(found.stretches[i].start, found.stretches[i].stop) for i in chosen]
    sums, counts = (np.concatenate([side[part] for part in parts]) for side in (found.sums, found.counts))
    of_units = found.by_unit[:, :, list(chosen)].sum(2)  # 2, U
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.divide(*of_units.sum(1))
        images = (sums - counts * mean) / counts.sum()
        num_runs = 1 + max(max(unit) for unit in found.units)
        others = [[run not in unit for unit in found.units] for run in range(num_runs)]
        without = np.array([np.divide(*of_units[:, kept].sum(1)) for kept in others])
    if not np.any(others, axis=1).all():
        return Estimate(float(mean), images, np.empty(0))
    return Estimate(float(mean), images, num_runs * mean - (num_runs - 1) * without)


def auroc_estimate(scores: np.ndarray, positive: np.ndarray) -> Estimate:
    """Mean over runs of the area under the ROC curve; a tie counts one half. Influences: DeLong et al. 1988.

    Args:
        scores: (R, N), higher means more positive; NaN where an image has none in this run, which leaves it out there.
        positive: bool (N,).

    >>> auroc_estimate(np.array([[0.1, 0.4, 0.4]]), np.array([False, False, True])).mean
    0.75
    """
    areas, images = np.full(len(scores), np.nan), np.zeros(scores.shape)
    for run, score in enumerate(scores):
        known = ~np.isnan(score)
        sides = [np.flatnonzero(known & positive), np.flatnonzero(known & ~positive)]
        if not all(map(len, sides)):
            continue
        both = np.concatenate(sides)
        ranks = stats.rankdata(score[both])
        below = [ranks[: len(sides[0])] - stats.rankdata(score[sides[0]])]  # negatives below each positive
        below.append(ranks[len(sides[0]) :] - stats.rankdata(score[sides[1]]))
        areas[run] = below[0].mean() / len(sides[1])
        images[run, sides[0]] = (below[0] / len(sides[1]) - areas[run]) / len(sides[0])
        images[run, sides[1]] = (1 - below[1] / len(sides[0]) - areas[run]) / len(sides[1])
    return Estimate(float(areas.mean()), images.mean(0), areas if len(areas) > 1 else np.empty(0))


def above_chance(value: Estimate, chance: Estimate) -> Estimate:
    """(value - chance) / (1 - chance): 1 is perfect, 0 no better than chance; NaN where chance is 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        rest = 1 - chance.mean or math.nan
        images = value.images / rest + chance.images * (value.mean - 1) / rest**2
        mean, num_runs = (value.mean - chance.mean) / rest, len(value.runs)
        if not num_runs:
            return Estimate(float(mean), images, np.empty(0))
        without, chance_without = ((num_runs * each.mean - each.runs) / (num_runs - 1) for each in (value, chance))
        of_others = (without - chance_without) / (1 - chance_without)
    return Estimate(float(mean), images, num_runs * mean - (num_runs - 1) * of_others)


def difference(a: Estimate, b: Estimate, sizes: Sequence[int]) -> Difference:
    """Of the means, ``a`` less ``b``.

    Args:
        a: of one detector.
        b: of another, over the same images.
        sizes: of the sources, in the order of the images, which are drawn within them.
    """
    value = a.mean - b.mean
    of_sources = np.split(a.images - b.images, np.cumsum(sizes)[:-1])
    # variance and degrees of freedom of each part
    parts = [(sum(n * _variance(each) for n, each in zip(sizes, of_sources, strict=True)), sum(sizes) - len(sizes))]
    parts += [(_variance(each.runs) / len(each.runs), len(each.runs) - 1) for each in (a, b) if len(each.runs)]
    parts = [part for part in parts if part[1]]
    variance = sum(part[0] for part in parts)
    if not parts or not math.isfinite(variance) or not math.isfinite(value):
        return Difference(value, *[math.nan] * 5)
    if variance == 0:
        return Difference(value, 0.0, math.inf, value, value, float(value == 0))
    error, df = math.sqrt(variance), variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf(0.975, df)) * error
    return Difference(value, error, df, value - half, value + half, 2 * float(stats.t.sf(abs(value) / error, df)))


def _variance(values: np.ndarray) -> float:
    """0 of a single value, as the bootstrap has it: a source of one image is always drawn as it is."""
    return float(values.var(ddof=1)) if len(values) > 1 else 0.0
