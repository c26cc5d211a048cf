"""Section 3.5 against a loop over pairs."""

import itertools

import pytest
import torch

from explain2me.measures import SIMILARITIES, pairs, ssim, stability, stability_matrix


def random_runs(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refused(message):
    """The error of our own check, or of jaxtyping's check of the signature where that is on."""
    return pytest.raises((ValueError, TypeError), match=f"{message}|Type-check error")


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_matches_a_loop(similarity):
    runs = random_runs(4, 3, 7, 7)
    for n in range(3):
        scores = [SIMILARITIES[similarity](a[n : n + 1], b[n : n + 1]) for a, b in itertools.combinations(runs, 2)]
        want = sum(scores) / len(scores)
        torch.testing.assert_close(stability(runs, similarity=similarity)[n : n + 1], want)


def test_matrix_holds_the_mean_of_each_pair():
    runs = random_runs(3, 5, 7, 7)
    matrix = stability_matrix(runs)
    torch.testing.assert_close(matrix, matrix.T)
    assert matrix.diagonal().tolist() == pytest.approx([1, 1, 1])
    for i, j in pairs(3):
        torch.testing.assert_close(matrix[i, j], ssim(runs[i], runs[j]).mean())
    off_diagonal = matrix[~torch.eye(3, dtype=torch.bool)]
    torch.testing.assert_close(off_diagonal.mean(), stability(runs).mean())


def test_matrix_shows_clusters():
    a, b = random_runs(2, 20, 7, 7)
    matrix = stability_matrix(torch.stack([a, b, a, b]))
    assert matrix[0, 2] == pytest.approx(1)
    assert matrix[1, 3] == pytest.approx(1)
    assert matrix[0, 1] < 0.5


def test_pairs_without_a_value_are_left_out():
    runs = random_runs(3, 4, 7, 7)
    runs[0, 0] = 0  # one pair left
    runs[:2, 1] = torch.nan  # none left
    runs[2, 2] = 5  # flat
    value = stability(runs)
    torch.testing.assert_close(value[0], ssim(runs[1, :1], runs[2, :1])[0])
    assert value.isnan().tolist() == [False, True, False, False]
    matrix = stability_matrix(runs)
    torch.testing.assert_close(matrix[0, 1], ssim(runs[0, 2:], runs[1, 2:]).mean())


def test_matrix_of_a_run_that_is_dead_everywhere():
    runs = random_runs(3, 4, 7, 7)
    runs[1] = 0
    matrix = stability_matrix(runs)
    assert matrix.isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]]


def test_order_of_runs_does_not_matter():
    runs = random_runs(4, 3, 7, 7)
    torch.testing.assert_close(stability(runs[[2, 0, 3, 1]]), stability(runs))


@pytest.mark.parametrize("num_runs", [0, 1])
@pytest.mark.parametrize("function", [stability, stability_matrix])
def test_refuses_fewer_than_two_runs(function, num_runs):
    with refused(f"expected at least 2, got {num_runs}"):
        function(torch.rand(num_runs, 3, 7, 7))


def test_wrong_input():
    with refused(r"shape \(R, N, h, w\).*got \(3, 7, 7\).*torch.stack"):
        stability(torch.rand(3, 7, 7))
    with refused("floating point"):
        stability(torch.zeros(2, 3, 7, 7, dtype=torch.uint8))
    with refused("unknown similarity 'sim'; did you mean 'ssim'"):
        stability(torch.rand(2, 3, 7, 7), similarity="sim")
    with refused("at least 2, got 1"):
        pairs(1)
