"""By how much two detectors differ in a mean score, with an interval: over other images and over other training runs.

Both detectors are measured on the same images, so these are paired; their training runs are independent. The variances over
the images of each source and over the runs of each detector add up, and the interval is Student's t with as many degrees of
freedom as they have together (Satterthwaite). It is that of Welch where only runs vary, and that of a paired t-test where
only the images of one source do; where each image has runs of its own liking it is somewhat wide, since that part is counted
with both.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from explain2me.run.folder import Stretch

ROUNDING = 1e-12
"""A difference no larger is none."""


class Estimate(NamedTuple):
    """A mean over images and training runs, and what its error follows from.

    Attributes:
        mean: NaN where there is no value.
        images: (N,) influence of each image on the mean, NaN where it has no value; they sum up to 0.
        runs: jackknife pseudo-values, one a run that has values; none where there is one such run, or one pair, which says
            nothing of others.
        num_runs: runs that have values.
    """

    mean: float
    images: np.ndarray
    runs: np.ndarray
    num_runs: int


class Difference(NamedTuple):
    """Of two means: its value and standard error, degrees of freedom, 95 % interval, and p of none (two-sided).

    NaN where it is not defined. Where nothing varies, as in AUROCs of exactly 1, ``df`` is infinite and the interval has no width.
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
    return Totals(known.sum(0), defined.sum(0, dtype=np.int32), np.array(by_unit).swapaxes(1, 2), units, stretches)


def estimate(found: Totals, chosen: Sequence[int]) -> Estimate:
    """The mean of all values of the chosen stretches, by their positions; each value weighs the same.

    >>> two_runs = totals(np.array([[0.1, 0.3], [0.5, 0.7]]), [[0], [1]], [Stretch(None, "a", 0, 2)])
    >>> found = estimate(two_runs, [0])
    >>> round(found.mean, 3), found.images.round(3), found.runs.round(3)
    (0.4, array([-0.05,  0.05]), array([0.2, 0.6]))
    """
    parts = [slice(found.stretches[i].start, found.stretches[i].stop) for i in chosen]
    sums, counts = (np.concatenate([side[part] for part in parts]) for side in (found.sums, found.counts))
    of_units = found.by_unit[:, :, list(chosen)].sum(2)  # 2, U
    if not counts.any():
        return Estimate(math.nan, np.full(len(sums), math.nan), np.empty(0), 0)
    mean = float(np.divide(*of_units.sum(1)))
    images = np.where(counts > 0, sums - counts * mean, math.nan) / counts.sum()
    known = of_units[1] > 0
    names = sorted({run for unit, has in zip(found.units, known, strict=True) if has for run in unit})
    others = np.array([[run not in unit for unit in found.units] for run in names]) & known
    if not others.any(1).all():
        return Estimate(mean, images, np.empty(0), len(names))
    without = np.array([np.divide(*of_units[:, kept].sum(1)) for kept in others])
    return Estimate(mean, images, len(names) * mean - (len(names) - 1) * without, len(names))


def auroc_estimate(scores: np.ndarray, positive: np.ndarray) -> Estimate:
    """Mean area under the ROC curve over the runs that have one; a tie counts one half. Influences: DeLong et al. 1988.

    Args:
        scores: (R, N), higher means more positive; NaN where an image has none in this run, which leaves it out there.
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
    """(value - chance) / (1 - chance): 1 is perfect, 0 no better than chance; NaN where chance is 1.

    The images are taken as independent, though one is the partner of another in its chance level.
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
    """Of the means, ``a`` less ``b``.

    Args:
        a: of one detector.
        b: of another, over the same images.
        sizes: of the sources, in the order of the images, which are drawn within them.
    """
    value = a.mean - b.mean
    of_sources = np.split(_sum(a.images, -b.images), np.cumsum(sizes)[:-1])
    known = [each[~np.isnan(each)] for each in of_sources]
    # variance and degrees of freedom of each part; the bootstrap always draws a source of one image as it is, too
    parts = [(len(each) * each.var(ddof=1), len(each) - 1) for each in known if len(each) > 1]
    parts += [(each.runs.var(ddof=1) / len(each.runs), len(each.runs) - 1) for each in (a, b) if len(each.runs)]
    variance = float(sum(part for part, _ in parts))
    if not parts or not math.isfinite(variance) or not math.isfinite(value):
        return Difference(value, *[math.nan] * 5)
    if variance <= ROUNDING**2:
        value = 0.0 if abs(value) <= ROUNDING else value
        return Difference(value, 0.0, math.inf, value, value, float(value == 0))
    error, df = math.sqrt(variance), variance**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf(0.975, df)) * error
    return Difference(value, error, df, value - half, value + half, 2 * float(stats.t.sf(abs(value) / error, df)))


def _sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """NaN only where both are."""
    return np.where(np.isnan(a) & np.isnan(b), math.nan, np.nan_to_num(a) + np.nan_to_num(b))
