"""Differences of means against scipy's tests, brute force and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from explain2me.run.folder import Stretch
from explain2me.statistics.bootstrap import image_weights
from explain2me.statistics.estimates import Estimate, above_chance, auroc_estimate, difference, estimate, totals

STRETCHES = [Stretch("fake", "a", 0, 30), Stretch("real", "b", 30, 50)]
SIZES = [30, 20]
ALONE = [(0,)]


def of_runs(values: np.ndarray, *, pairs: bool = False, stretches: list[Stretch] | None = None) -> Estimate:
    """Of values (R, N), or of pairs of R runs; over all stretches, or one."""
    stretches = stretches or [Stretch(None, "a", 0, values.shape[1])]
    units = [(run,) for run in range(len(values))]
    if pairs:
        num_runs = next(n for n in range(99) if n * (n - 1) // 2 == len(values))
        units = list(itertools.combinations(range(num_runs), 2))
    return estimate(totals(values, units, stretches), range(len(stretches)))


def test_where_only_runs_vary_it_is_welchs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.6, 0.1, 4), rng.normal(0.3, 0.3, 6)
    found = difference(*(of_runs(np.repeat(runs[:, None], 9, axis=1)) for runs in (a, b)), [9])
    wanted = stats.ttest_ind(a, b, equal_var=False)
    assert (found.low, found.high) == pytest.approx(wanted.confidence_interval(), rel=1e-9)
    assert found[:3] == pytest.approx((a.mean() - b.mean(), (a.mean() - b.mean()) / wanted.statistic, wanted.df))
    assert found.p == pytest.approx(wanted.pvalue)


def test_of_single_runs_it_is_the_paired_t_test():
    rng = np.random.default_rng(1)
    common = rng.normal(size=40)
    a, b = common + rng.normal(0.2, 0.1, 40), common + rng.normal(0, 0.1, 40)
    found = difference(of_runs(a[None]), of_runs(b[None]), [40])
    wanted = stats.ttest_rel(a, b)
    assert (found.low, found.high) == pytest.approx(wanted.confidence_interval(), rel=1e-9)
    assert (found.df, found.p) == pytest.approx((39, wanted.pvalue))


def test_its_error_over_images_is_that_of_the_bootstrap_within_sources():
    rng = np.random.default_rng(2)
    values = rng.normal(size=(2, 3, 50)) + 2 * np.repeat([0, 1], [30, 20])
    values[rng.random(values.shape) < 0.2] = np.nan
    a, b = (of_runs(each, stretches=STRETCHES)._replace(runs=np.empty(0)) for each in values)
    drawn = []
    for _, weights in image_weights(STRETCHES, seed=0, resamples=4000):
        known = ~np.isnan(values)
        sums = (np.nan_to_num(values)[:, :, None] * weights).sum((1, 3))
        drawn.append(np.subtract(*(sums / (known[:, :, None] * weights).sum((1, 3)))))
    assert difference(a, b, SIZES).std_error == pytest.approx(np.concatenate(drawn).std(), rel=0.05)
    assert np.nansum(a.images) == pytest.approx(0, abs=1e-12)


def test_each_source_has_degrees_of_freedom_of_its_own():
    """Satterthwaite over the strata, each with n of its images that have a value."""
    rng = np.random.default_rng(9)
    values = np.concatenate([rng.normal(size=30), 5 * rng.normal(size=20)])
    values[[0, 40, 41]] = np.nan
    found = difference(
        of_runs(values[None], stretches=STRETCHES), of_runs(np.zeros((1, 50)), stretches=STRETCHES), SIZES
    )
    zeros = difference(
        of_runs(values[None], stretches=STRETCHES), Estimate(0.0, np.full(50, np.nan), np.empty(0), 1), SIZES
    )
    # beside zeros that are known the missing ones still count as images; without them they do not
    parts = [np.var(part[~np.isnan(part)], ddof=1) for part in np.split(values - np.nanmean(values), [30])]
    parts = [29 * parts[0] / 47**2, 18 * parts[1] / 47**2]
    assert zeros.std_error == pytest.approx(sum(parts) ** 0.5)
    assert zeros.df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 28 + parts[1] ** 2 / 17))
    assert zeros.df < found.df < 48


def test_of_few_images_that_count_few_seem_to_differ():
    """As many false alarms as 5 % allows, where an AUROC has 4 positives, or a score 4 images with a value."""
    rng = np.random.default_rng(10)
    positive = np.repeat([True, False], [4, 200])
    seem = []
    for _ in range(400):
        scores = rng.normal(size=(2, 1, 204)) + rng.normal(size=204) + 2 * positive
        values = np.where(positive, scores, np.nan)
        for of in (lambda each: auroc_estimate(each, positive), of_runs):
            both = [of(each) for each in (values if of is of_runs else scores)]
            found = difference(*both, [204] if of is of_runs else [4, 200])
            seem.append(not found.low <= 0 <= found.high)
    assert np.mean(seem[0::2]) < 0.09
    assert np.mean(seem[1::2]) < 0.09


def test_runs_without_a_value_are_none():
    values = np.random.default_rng(11).random((4, 50))
    values[2] = np.nan
    found, wanted = of_runs(values), of_runs(values[[0, 1, 3]])
    np.testing.assert_allclose(found.runs, wanted.runs)
    assert found.num_runs == 3
    alone = of_runs(np.where(np.arange(4)[:, None] == 2, 0.5, np.full((4, 50), np.nan)))
    assert (alone.mean, alone.num_runs, len(alone.runs)) == (0.5, 1, 0)
    pairs = np.full((6, 50), np.nan)
    pairs[1] = values[0]  # runs 0 and 2
    assert (of_runs(pairs, pairs=True).num_runs, len(of_runs(pairs, pairs=True).runs)) == (2, 0)


def test_a_run_is_left_out_with_all_pairs_that_it_is_in():
    rng = np.random.default_rng(3)
    pairs = list(itertools.combinations(range(4), 2))
    values = rng.random((6, 50))
    values[0, :10] = np.nan
    found = of_runs(values, pairs=True, stretches=STRETCHES)
    without = [np.nanmean(values[[r not in pair for pair in pairs]]) for r in range(4)]
    assert found.mean == pytest.approx(np.nanmean(values))
    np.testing.assert_allclose(found.runs, 4 * np.nanmean(values) - 3 * np.array(without))


def test_of_some_sources_it_is_that_of_these_alone():
    values = np.random.default_rng(4).random((3, 50))
    units = [(0,), (1,), (2,)]
    whole = estimate(totals(values, units, STRETCHES), [1])
    alone = of_runs(values[:, 30:])
    for ours, wanted in zip(whole, alone, strict=True):
        np.testing.assert_allclose(ours, wanted)


def test_auroc_and_its_error_are_those_of_delong():
    rng = np.random.default_rng(5)
    positive = np.repeat([True, False], SIZES)
    scores = np.round(rng.normal(size=(2, 3, 50)) + positive, 1)  # with ties
    scores[0, 1, [3, 40]] = np.nan
    found = [auroc_estimate(each, positive) for each in scores]
    known = ~np.isnan(scores)
    wanted = [
        [roc_auc_score(positive[k], s[k]) for s, k in zip(*each, strict=True)]
        for each in zip(scores, known, strict=True)
    ]
    np.testing.assert_allclose([each.runs for each in found], wanted)
    assert found[0].mean == pytest.approx(np.mean(wanted[0]))
    # of one run, without NaN: the placements, pair by pair
    one = [auroc_estimate(scores[d, 2:], positive) for d in (0, 1)]
    placed = [(s[positive, None] > s[~positive]) + 0.5 * (s[positive, None] == s[~positive]) for s in scores[:, 2]]
    variance = sum(np.var(placed[0].mean(axis) - placed[1].mean(axis), ddof=1) / n for axis, n in ((1, 30), (0, 20)))
    assert difference(*one, SIZES).std_error == pytest.approx(variance**0.5)
    assert not len(one[0].runs)
    # an image left out in one run of three weighs less, and all of one class out is undefined
    assert abs(found[0].images[3]) < abs(auroc_estimate(scores[0, [0, 2]], positive).images[3])
    assert np.isnan(auroc_estimate(np.where(positive, np.nan, scores[0]), positive).mean)
    with_dead = auroc_estimate(np.vstack([scores[0], np.full(scores.shape[-1], np.nan)]), positive)
    for ours, theirs in zip(with_dead, found[0], strict=True):  # a run without an AUROC is no run
        assert np.array_equal(ours, theirs, equal_nan=True)


def test_above_chance_follows_from_both():
    rng = np.random.default_rng(6)
    value, chance = rng.random((3, 50)), 0.3 * rng.random((3, 50))
    both = [of_runs(each, stretches=STRETCHES) for each in (value, chance)]
    found = above_chance(*both)

    def corrected(runs: slice | list[int], weights: np.ndarray) -> float:
        means = [np.average(each[runs], axis=1, weights=weights).mean() for each in (value, chance)]
        return (means[0] - means[1]) / (1 - means[1])

    even = np.ones(50)
    assert found.mean == pytest.approx(corrected(slice(None), even))
    np.testing.assert_allclose(
        found.runs, [3 * found.mean - 2 * corrected([r for r in range(3) if r != run], even) for run in range(3)]
    )
    more = even + 1e-6 * np.eye(50)[7]
    assert found.images[7] == pytest.approx((corrected(slice(None), more) - found.mean) / 1e-6, rel=1e-4)
    assert np.isnan(above_chance(both[0], both[1]._replace(mean=1.0)).mean)
    certain = np.array([[0.5], [1.0]]) + np.zeros(50)  # without the first run chance is 1
    of_two = above_chance(of_runs(value[:2]), of_runs(certain))
    assert np.isnan(difference(of_two, of_two, [50]).low)
    alone = above_chance(of_runs(value), of_runs(np.where(np.arange(50) == 7, np.nan, chance)))
    assert not np.isnan(alone.images[7])  # alone in its group: a value, and no chance level


def test_what_says_nothing_of_others_is_undefined_and_what_never_varies_is_certain():
    one_image = of_runs(np.array([[0.4]]))
    assert np.isnan(difference(one_image, one_image, [1])[1:]).all()
    pair = of_runs(np.random.default_rng(7).random((1, 50)), pairs=True)
    assert not len(pair.runs)
    assert difference(pair, pair, [50]) == (0, 0, np.inf, 0, 0, 1)
    ones, halves = (of_runs(np.full((3, 50), value)) for value in (1.0, 0.5))
    assert difference(ones, halves, [50]) == (0.5, 0, np.inf, 0.5, 0.5, 0)
    tenths = [of_runs(np.full((3, 50), value)) for value in (0.3, 0.1 + 0.2)]
    assert difference(*tenths, [50])[0] == 0
    nothing = of_runs(np.full((3, 50), np.nan))
    assert np.isnan(difference(nothing, ones, [50])).all()


@pytest.mark.parametrize("of_pairs", [False, True], ids=["runs", "pairs"])
@pytest.mark.parametrize("num_runs", [3, 5, 10])
@pytest.mark.parametrize("of_images", [0.0, 1.0, 4.0])
def test_of_detectors_that_are_alike_5_percent_seem_to_differ(num_runs, of_pairs, of_images):
    """Runs and images vary, and each run has images of its own liking; ``of_images`` is how much, beside the runs.

    A pair of runs agrees the less the further apart the two are.
    """
    rng = np.random.default_rng(8)
    pairs = list(itertools.combinations(range(num_runs), 2))
    seem = []
    for _ in range(400):
        if of_pairs:
            places = rng.normal(size=(2, num_runs, 3))
            own = np.stack([-((places[:, a] - places[:, b]) ** 2).sum(1) for a, b in pairs], 1)[..., None]
        else:
            own = rng.normal(size=(2, num_runs, 1))
        liking = rng.normal(size=(2, 1, 40)) + rng.normal(size=(2, own.shape[1], 40)) + rng.normal(size=40)
        found = difference(*(of_runs(each, pairs=of_pairs) for each in own + of_images * liking), [40])
        seem.append(not found.low <= 0 <= found.high)
    assert np.mean(seem) <= 0.075
    assert of_pairs or np.mean(seem) >= 0.015


def test_limits_and_p_are_those_of_scipys_t_to_the_last_bit():
    rng = np.random.default_rng(0)
    stretches = [Stretch(None, "a", 0, 12)]
    for _ in range(100):
        a, b = (
            estimate(totals(rng.normal(shift, 1, (3, 12)), [[0], [1], [2]], stretches), [0])
            for shift in (0, rng.random())
        )
        found = difference(a, b, [12])
        half = float(stats.t.ppf(0.975, found.df)) * found.std_error
        assert (found.low, found.high) == (found.value - half, found.value + half)
        assert found.p == 2 * float(stats.t.sf(abs(found.value) / found.std_error, found.df))
