"""Section 3.5: similarity of the maps of independently trained runs of a detector."""

import itertools

import torch
from jaxtyping import Float
from torch import Tensor

from explain2me.measures.checks import check_known, check_maps, result_dtype, working
from explain2me.measures.similarity import SIMILARITIES


def stability(maps: Float[Tensor, "R N h w"], *, similarity: str = "ssim") -> Float[Tensor, " N"]:
    """Mean similarity over all R (R - 1) / 2 pairs of runs, for each image; higher means the runs agree (eq. 7).

    Args:
        maps: clean maps of the same N images from R runs.
        similarity: a key of ``SIMILARITIES``.

    Returns:
        One value for each image, in the range of the similarity ([-1, 1] for ssim); 1 means that all runs have the same
        map. The mean skips pairs in which a map is dead or flat; NaN where no pair remains.

    Raises:
        ValueError: fewer than two runs, another shape, or an unknown similarity.

    >>> a, b = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    >>> stability(torch.stack([a, a, b]))  # (1 + 2 * -0.3309) / 3
    tensor([0.1127])
    """
    return _pair_scores(maps, similarity).nanmean(0).to(result_dtype(maps))


def stability_matrix(maps: Float[Tensor, "R N h w"], *, similarity: str = "ssim") -> Float[Tensor, "R R"]:
    """Mean similarity over the images for each pair of runs; shows clusters of runs that agree.

    Args:
        maps: clean maps of the same N images from R runs.
        similarity: a key of ``SIMILARITIES``.

    Returns:
        A symmetric matrix in the range of the similarity. The mean of a pair skips images with a dead or flat map; NaN
        where no image remains. The diagonal holds each run's similarity to itself: 1, or NaN where all its maps are
        dead or flat.

    Raises:
        ValueError: fewer than two runs, another shape, or an unknown similarity.

    >>> a, b = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    >>> stability_matrix(torch.stack([a, b]))
    tensor([[ 1.0000, -0.3309],
            [-0.3309,  1.0000]])
    """
    scores = _pair_scores(maps, similarity).nanmean(1)
    matrix = torch.diag(torch.stack([SIMILARITIES[similarity](run, run).nanmean() for run in working(maps)]))
    for score, (i, j) in zip(scores, pairs(len(maps)), strict=True):
        matrix[i, j] = matrix[j, i] = score
    return matrix.to(result_dtype(maps))


def pairs(num_runs: int) -> list[tuple[int, int]]:
    """All pairs (i, j) of runs with i < j, in the order of the sum in eq. 7.

    Raises:
        ValueError: fewer than two runs.

    >>> pairs(3)
    [(0, 1), (0, 2), (1, 2)]
    """
    if num_runs < 2:
        raise ValueError(
            f"stability compares runs: expected at least 2, got {num_runs}; train another run of the detector"
        )
    return list(itertools.combinations(range(num_runs), 2))


def _pair_scores(maps: Tensor, similarity: str) -> Tensor:
    """Similarity (pairs, N) of each pair of runs on each image, in working precision."""
    if maps.ndim != 4:
        raise ValueError(
            f"maps must have shape (R, N, h, w), one batch of maps for each run, got {tuple(maps.shape)}; "
            "combine the runs with torch.stack"
        )
    check_known(similarity, SIMILARITIES, "similarity")
    for run in maps[:1]:
        check_maps(run)
    runs = working(maps)
    return torch.stack([SIMILARITIES[similarity](runs[i], runs[j]) for i, j in pairs(len(maps))])
