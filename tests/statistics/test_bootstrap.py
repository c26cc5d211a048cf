import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from explain2me.report.findings.data import OF_PAIRS, OF_RUNS
from explain2me.run.folder import Stretch
from explain2me.statistics.bootstrap import image_weights, interval, pair_weights, run_weights, weighted_auroc

STRETCHES = [Stretch("fake", "a", 0, 30), Stretch("real", "b", 30, 50)]


def test_images_are_resampled_within_their_source() -> None:
    weights = np.concatenate([block for _, block in image_weights(STRETCHES, seed=1, resamples=200)])
    assert weights.shape == (200, 50)
    assert (weights[:, :30].sum(1) == 30).all()
    assert (weights[:, 30:].sum(1) == 20).all()
    assert abs(weights.var() - (1 - 1 / 25)) < 0.1  # multinomial: variance 1 - 1/n


def test_the_draws_of_a_source_do_not_depend_on_the_others() -> None:
    both = next(image_weights(STRETCHES, seed=1, resamples=50))[1]
    alone = next(image_weights([Stretch("real", "b", 0, 20)], seed=1, resamples=50))[1]
    assert (both[:, 30:] == alone).all()
    assert (next(image_weights(STRETCHES, seed=2, resamples=50))[1] != both).any()


def test_runs_are_clusters_and_a_pair_of_one_run_with_itself_never_counts() -> None:
    weights = run_weights(3, seed=1, resamples=100)
    assert (weights.sum(1) == 3).all()
    pairs = pair_weights(3, seed=1, resamples=100)
    assert (pairs == weights[:, [0, 0, 1]] * weights[:, [1, 2, 2]]).all()
    assert (run_weights(1, seed=1, resamples=5) == 1).all()
    assert (pair_weights(2, seed=1, resamples=5) == 1).all()


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(size=400)
    stretch = [Stretch(None, "a", 0, 400)]
    means = np.concatenate([weights @ values / 400 for _, weights in image_weights(stretch, seed=3, resamples=4000)])
    low, high = interval(means)
    half = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert np.isnan(interval(np.array([np.nan]))).all()


def test_weighted_auroc_is_that_of_repeated_samples() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 8, 40) / 8  # with ties
    positive = rng.random(40) < 0.4
    weights = rng.integers(0, 3, (20, 40)).astype(float)
    want = [roc_auc_score(positive.repeat(w.astype(int)), scores.repeat(w.astype(int))) for w in weights]
    np.testing.assert_allclose(weighted_auroc(scores, positive, weights), want, rtol=1e-12)
    assert np.isnan(weighted_auroc(scores, np.zeros(40, bool), np.ones((1, 40)))).all()


@pytest.mark.parametrize("of_pairs", [False, True], ids=["runs", "pairs"])
@pytest.mark.parametrize("num_runs", [2, 3, 5, 9])
def test_what_intervals_over_few_runs_are_worth(num_runs, of_pairs):
    """As the report says: how often they hold the true mean."""
    runs = np.random.default_rng(0).normal(size=(1000, num_runs))
    weights = (pair_weights if of_pairs else run_weights)(num_runs, seed=7, resamples=4000)
    if of_pairs:
        runs = np.stack([runs[..., a] + runs[..., b] for a, b in itertools.combinations(range(num_runs), 2)], -1)
    drawn = weights[weights.sum(1) > 0]
    found = [interval(estimates) for estimates in runs @ (drawn / drawn.sum(1, keepdims=True)).T]
    if num_runs not in (OF_PAIRS if of_pairs else OF_RUNS):
        assert all(low == high for low, high in found)  # one pair: nothing is drawn
        return
    holds = np.mean([low <= 0 <= high for low, high in found])
    assert 100 * holds == pytest.approx((OF_PAIRS if of_pairs else OF_RUNS)[num_runs], abs=4)
