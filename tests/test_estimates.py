"""Differences of means against scipy's tests, brute force and simulation."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from explain2me.bootstrap import image_weights
from explain2me.estimates import Estimate, above_chance, auroc_estimate, difference, estimate, totals
from explain2me.store import Stretch

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
    assert difference(a, b, SIZES).df == 48
    assert a.images.sum() == pytest.approx(0, abs=1e-12)


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


def test_what_says_nothing_of_others_is_undefined_and_what_never_varies_is_certain():
    one_image = of_runs(np.array([[0.4]]))
    assert np.isnan(difference(one_image, one_image, [1])[1:]).all()
    pair = of_runs(np.random.default_rng(7).random((1, 50)), pairs=True)
    assert not len(pair.runs)
    assert difference(pair, pair, [50]) == (0, 0, np.inf, 0, 0, 1)
    ones, halves = (of_runs(np.full((3, 50), value)) for value in (1.0, 0.5))
    assert difference(ones, halves, [50]) == (0.5, 0, np.inf, 0.5, 0.5, 0)
    dead = of_runs(np.where(np.arange(3)[:, None] == 0, 0.5, np.full((3, 50), np.nan)))
    assert dead.mean == 0.5
    assert np.isnan(difference(dead, ones, [50]).low)  # without the one run that has maps there is no mean
    nothing = of_runs(np.full((3, 50), np.nan))
    assert np.isnan(difference(nothing, ones, [50])).all()


@pytest.mark.parametrize("of_pairs", [False, True], ids=["runs", "pairs"])
@pytest.mark.parametrize("num_runs", [3, 5, 10])
@pytest.mark.parametrize("of_images", [0.0, 1.0, 4.0])
def test_of_detectors_that_are_alike_5_percent_seem_to_differ(num_runs, of_pairs, of_images):
    """Runs and images vary, and each run has images of its own liking; ``of_images`` is how much, beside the runs."""
    rng = np.random.default_rng(8)
    pairs = list(itertools.combinations(range(num_runs), 2))
    seem = []
    for _ in range(400):
        runs = rng.normal(size=(2, num_runs, 1))
        liking = rng.normal(size=(2, 1, 40)) + rng.normal(size=(2, num_runs, 40)) + rng.normal(size=40)
        values = runs + of_images * liking
        if of_pairs:
            values = np.stack([values[:, a] + values[:, b] for a, b in pairs], 1)
        found = difference(*(of_runs(each, pairs=of_pairs) for each in values), [40])
        seem.append(not found.low <= 0 <= found.high)
    assert 0.005 <= np.mean(seem) <= 0.075
