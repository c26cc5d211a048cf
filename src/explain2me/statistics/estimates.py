"""The difference of two detectors in a mean score, with an interval over other images and other training runs.

Both detectors are measured on the same images, so the images are paired; the training runs of the two detectors are
independent. The variances over the images of each source and over the runs of each detector add up. The interval is
Student's t with the degrees of freedom of Satterthwaite. It equals the interval of Welch's test where only runs vary, and
of the paired t-test where only the images of one source vary. It is too wide where images and runs interact, because
both variances then hold that interaction.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from explain2me.run.folder import Stretch

ROUNDING = 1e-12
"""A difference of at most this size is rounding, so it counts as none."""


class Estimate(NamedTuple):
    """A mean over images and training runs, and the terms of its variance.

    Attributes:
        mean: NaN where there is no value.
        images: (N,) influence of each image on the mean; NaN where it has no value. The influences add up to 0.
        runs: jackknife pseudo-values, one for each run with values. Empty for a single run, or a single pair of runs: it
            does not show how much other runs would differ.
        num_runs: number of runs with values.
    """

    mean: float
    images: np.ndarray
    runs: np.ndarray
    num_runs: int


class Difference(NamedTuple):
    """A difference of two means: value, standard error, degrees of freedom, 95 % interval, two-sided p.

    NaN where it is not defined. Where nothing varies, as in AUROCs of exactly 1, ``df`` is infinite and the interval has
    no width.
    """

    value: float
    std_error: float
    df: float
    low: float
    high: float
    p: float


class Totals(NamedTuple):
    """Sums of the values of a score. Estimates over any sources need no more than these.

    Attributes:
        sums, counts: (N,) sum and number of the values of each image over the units (runs, or pairs of runs).
        by_unit: (2, U, S) sum and number of the values of each unit over the images of each stretch.
        units: the runs of each unit.
        stretches: the S stretches of the N images.
    """

    sums: np.ndarray
    counts: np.ndarray
    by_unit: np.ndarray
    units: Sequence[Sequence[int]]
    stretches: Sequence[Stretch]


def totals(values: np.ndarray, units: Sequence[Sequence[int]], stretches: Sequence[Stretch]) -> Totals:
    """The totals of values (U, N), NaN where there is no value."""
    defined = ~np.isnan(values)
    known = np.where(defined, values, 0.0)
    by_unit = [[side[:, s.start : s.stop].sum(1, dtype=np.float64) for s in stretches] for side in (known, defined)]
    return Totals(known.sum(0), defined.sum(0, dtype=np.int32), np.array(by_unit).swapaxes(1, 2), units, stretches)


def estimate(score: Totals, chosen: Sequence[int]) -> Estimate:
    """The mean of all values of the chosen stretches, given by their positions; each value has the same weight.

    >>> two_runs = totals(np.array([[0.1, 0.3], [0.5, 0.7]]), [[0], [1]], [Stretch(None, "a", 0, 2)])
    >>> mean = estimate(two_runs, [0])
    >>> round(mean.mean, 3), mean.images.round(3), mean.runs.round(3)
    (0.4, array([-0.05,  0.05]), array([0.2, 0.6]))
    """
    parts = [slice(score.stretches[i].start, score.stretches[i].stop) for i in chosen]
    sums, counts = (np.concatenate([side[part] for part in parts]) for side in (score.sums, score.counts))
    of_units = score.by_unit[:, :, list(chosen)].sum(2)  # 2, U
    if not counts.any():
        return Estimate(math.nan, np.full(len(sums), math.nan), np.empty(0), 0)
    mean = float(np.divide(*of_units.sum(1)))
    images = np.where(counts > 0, sums - counts * mean, math.nan) / counts.sum()
    known = of_units[1] > 0
    names = sorted({run for unit, has in zip(score.units, known, strict=True) if has for run in unit})
    others = np.array([[run not in unit for unit in score.units] for run in names]) & known
    if not others.any(1).all():
        return Estimate(mean, images, np.empty(0), len(names))
    without = np.array([np.divide(*of_units[:, kept].sum(1)) for kept in others])
    return Estimate(mean, images, len(names) * mean - (len(names) - 1) * without, len(names))


def auroc_estimate(scores: np.ndarray, positive: np.ndarray) -> Estimate:
    """Mean area under the ROC curve over the runs where it is defined. A tie counts one half.

    The influences of the images are those of DeLong et al. 1988.

    Args:
        scores: (R, N), higher means more positive; NaN leaves an image out of a run.
        positive: bool (N,).

    >>> auroc_estimate(np.array([[0.1, 0.4, 0.4]]), np.array([False, False, True])).mean
    0.75
    """
    areas, images = np.full(len(scores), np.nan), np.full(scores.shape, np.nan)
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
    has = ~np.isnan(areas)
    if not has.any():
        return Estimate(math.nan, images[0], np.empty(0), 0)
    areas, images = areas[has], images[has]
    influence = np.where(np.isnan(images).all(0), math.nan, np.nan_to_num(images).mean(0))
    return Estimate(float(areas.mean()), influence, areas if len(areas) > 1 else np.empty(0), len(areas))


def above_chance(value: Estimate, chance: Estimate) -> Estimate:
    """(value - chance) / (1 - chance): 1 is perfect, 0 is no better than chance. NaN where chance is 1.

    The variance takes the images as independent, although the chance level of an image depends on its partner.
    """
    rest = 1 - chance.mean or math.nan
    images = _sum(value.images / rest, chance.images * (value.mean - 1) / rest**2)
    mean, num_runs = (value.mean - chance.mean) / rest, value.num_runs
    if not len(value.runs) or len(value.runs) != len(chance.runs):
        return Estimate(mean, images, np.empty(0), num_runs)
    without, chance_without = ((num_runs * each.mean - each.runs) / (num_runs - 1) for each in (value, chance))
    of_others = (without - chance_without) / np.where(chance_without == 1, math.nan, 1 - chance_without)
    return Estimate(mean, images, num_runs * mean - (num_runs - 1) * of_others, num_runs)


def difference(a: Estimate, b: Estimate, sizes: Sequence[int]) -> Difference:
    """The difference of the means of two detectors over the same images, ``a`` minus ``b``.

    ``sizes``: number of images of each source, in the order of the images.
    """
    value = a.mean - b.mean
    of_sources = np.split(_sum(a.images, -b.images), np.cumsum(sizes)[:-1])
    known = [each[~np.isnan(each)] for each in of_sources]
    # variance and degrees of freedom of each part; a source of one image adds none, as in the bootstrap
    parts = [(len(each) * each.var(ddof=1), len(each) - 1) for each in known if len(each) > 1]
    parts += [(each.runs.var(ddof=1) / len(each.runs), len(each.runs) - 1) for each in (a, b) if len(each.runs)]
    variance = float(sum(part for part, _ in parts))
    if not parts or not math.isfinite(variance) or not math.isfinite(value):
        return Difference(value, *[math.nan] * 5)
    if variance <= ROUNDING**2:
        value = 0.0 if abs(value) <= ROUNDING else value
        return Difference(value, 0.0, math.inf, value, value, float(value == 0))
    error, df = math.sqrt(variance), variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(special.stdtrit(df, 0.975)) * error  # scipy.stats.t gives the same numbers in twenty times the time
    return Difference(value, error, df, value - half, value + half, 2 * float(special.stdtr(df, -abs(value) / error)))


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sum of two arrays, where NaN counts as 0; NaN where both are NaN."""
    return np.where(np.isnan(a) & np.isnan(b), math.nan, np.nan_to_num(a) + np.nan_to_num(b))
