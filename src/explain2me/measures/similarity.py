"""Similarity of two salience maps: SSIM (eq. 4), and other similarities that show whether a result depends on SSIM."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from explain2me.measures.checks import check_pair, height_and_width, is_dead, is_flat, result_dtype, working
from explain2me.measures.scaling import live, minmax, resize, to_8_bits

EPS1 = 0.01**2
EPS2 = 0.03**2
"""Constants of eq. 4 for values in [0, 1] (L = 1)."""
WINDOW = 7
"""Side of the windows of ``ssim_windowed`` in pixels."""
CHUNK = 8
"""Number of maps that ``ssim_windowed`` resamples at once."""


def ssim(a: Float[Tensor, "N h w"], b: Float[Tensor, "N h w"]) -> Float[Tensor, " N"]:
    """Structural similarity of each pair of maps, in [-1, 1]; 1 means the same map (eq. 4).

    Each map is scaled min-max to [0, 1]. One window covers the whole map; variances and covariance divide by n - 1.
    On 7x7 maps it equals scikit-image's ``structural_similarity`` with ``win_size=7, data_range=1``.

    NaN where either map is dead or flat: two empty maps must not score a perfect 1.

    Raises:
        ValueError: the shapes differ, or are not (N, h, w).

    >>> a = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    >>> ssim(a, a), ssim(a, a * 0)
    (tensor([1.]), tensor([nan]))
    >>> ssim(a, a.flip(2))  # means 1/4, variances 1/4, covariance -1/12: (-1/6 + 0.0009) / (1/2 + 0.0009)
    tensor([-0.3309])
    """
    check_pair(a, b)
    x, y = minmax(a).flatten(1), minmax(b).flatten(1)
    mean_x, mean_y = x.mean(1), y.mean(1)
    x, y = x - mean_x[:, None], y - mean_y[:, None]
    n = max(x.shape[1] - 1, 1)
    return where_defined(
        ssim_of_moments(mean_x, mean_y, (x * x).sum(1) / n, (y * y).sum(1) / n, (x * y).sum(1) / n), a, b
    )


def pearson(a: Float[Tensor, "N h w"], b: Float[Tensor, "N h w"]) -> Float[Tensor, " N"]:
    """Pearson correlation of the cells of each pair of maps, in [-1, 1]; 1 means equal up to scale and offset.

    NaN where either map is dead or flat.

    Raises:
        ValueError: the shapes differ, or are not (N, h, w).

    >>> a = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> pearson(a, 2 * a + 1), pearson(a, 4 - a)
    (tensor([1.]), tensor([-1.]))
    """
    check_pair(a, b)
    return where_defined(_correlation(minmax(a).flatten(1), minmax(b).flatten(1)), a, b)


def spearman(a: Float[Tensor, "N h w"], b: Float[Tensor, "N h w"]) -> Float[Tensor, " N"]:
    """Spearman rank correlation of the cells of each pair of maps, in [-1, 1]; 1 means the same order of cells.

    Equal cells get their mean rank. NaN where either map is dead or flat.

    Raises:
        ValueError: the shapes differ, or are not (N, h, w).

    >>> a = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> spearman(a, a**3), spearman(a, torch.tensor([[[2.0, 1.0, 3.0]]]))  # 1 - 6 (1 + 1 + 0) / (3 (9 - 1))
    (tensor([1.]), tensor([0.5000]))
    """
    check_pair(a, b)
    return where_defined(_correlation(_ranks(live(a).flatten(1)), _ranks(live(b).flatten(1))), a, b)


def top_k_iou(a: Float[Tensor, "N h w"], b: Float[Tensor, "N h w"], *, k: float = 0.1) -> Float[Tensor, " N"]:
    """Intersection over union of the most salient cells of each pair of maps, in [0, 1]; 1 means the same cells.

    Of each map the round(k h w) most salient cells count, at least 1. Cells that tie for the last ranks share them:
    with two ranks left for three equal cells, each cell is a member with weight 2/3. Intersection and union are the
    sums of the smaller and of the larger weight, so the value does not depend on the order of the cells.

    NaN where either map is dead or flat.

    Args:
        a: maps.
        b: the maps to compare with.
        k: fraction of the cells, in (0, 1].

    Raises:
        ValueError: the shapes differ or are not (N, h, w), or k is out of range.

    >>> a = torch.tensor([[[4.0, 3.0, 2.0, 1.0]]])
    >>> top_k_iou(a, torch.tensor([[[4.0, 1.0, 3.0, 2.0]]]), k=0.5)  # {0, 1} and {0, 2}: 1 of 3
    tensor([0.3333])
    """
    check_pair(a, b)
    if not 0 < k <= 1:
        raise ValueError(f"k must be a fraction of the cells in (0, 1], got {k}; 0.1 takes the top 10 %")
    count = max(1, round(k * math.prod(a.shape[1:])))
    x, y = (_memberships(live(maps).flatten(1), count) for maps in (a, b))
    return where_defined(torch.minimum(x, y).sum(1) / torch.maximum(x, y).sum(1), a, b)


def ssim_windowed(
    a: Float[Tensor, "N h w"], b: Float[Tensor, "N h w"], *, input_size: int | tuple[int, int] = 224
) -> Float[Tensor, " N"]:
    """Mean structural similarity over 7x7 windows, in [-1, 1]; the paper's released scripts use it for S_focus.

    The maps are scaled min-max, resampled to the input size (bicubic, clipped to [0, 1]) and quantised to 8 bits; then
    the value equals scikit-image's ``structural_similarity`` with its defaults. Two unrelated maps score much higher
    than with :func:`ssim`, the default.

    NaN where either map is dead or flat.

    Args:
        a: maps.
        b: the maps to compare with.
        input_size: of the model in pixels, one number or (height, width), at least 7.

    Raises:
        ValueError: the shapes differ or are not (N, h, w), or the input size is below 7 pixels.

    >>> a = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    >>> ssim_windowed(a, a), ssim_windowed(a, a * 0)
    (tensor([1.]), tensor([nan]))
    """
    check_pair(a, b)
    size = height_and_width(input_size)
    if min(size) < WINDOW:
        raise ValueError(
            f"input_size must be at least the window, {WINDOW} pixels, got {input_size}; use ssim for smaller inputs"
        )
    values = [
        _windowed(*(_pixels(maps, size) for maps in pair))
        for pair in zip(torch.split(minmax(a), CHUNK), torch.split(minmax(b), CHUNK), strict=True)
    ]
    return where_defined(torch.cat(values), a, b)


SIMILARITIES: dict[str, Callable[..., Tensor]] = {
    "ssim": ssim,
    "spearman": spearman,
    "pearson": pearson,
    "top_k_iou": top_k_iou,
    "ssim_windowed": ssim_windowed,
}
"""Similarities by name, each called as ``similarity(a, b)`` with maps (N, h, w); ``ssim`` is the default."""


def where_defined(value: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Set ``value`` to NaN where either map is dead or flat, and convert it to the precision of the maps."""
    undefined = is_dead(a) | is_flat(a) | is_dead(b) | is_flat(b)
    return value.masked_fill(undefined, torch.nan).to(result_dtype(a, b))


def ssim_of_moments(mean_x: Tensor, mean_y: Tensor, var_x: Tensor, var_y: Tensor, cov: Tensor) -> Tensor:
    """SSIM from means, variances and covariance of values in [0, 1] (eq. 4 with L = 1)."""
    luminance = (2 * mean_x * mean_y + EPS1) / (mean_x**2 + mean_y**2 + EPS1)
    return luminance * (2 * cov + EPS2) / (var_x + var_y + EPS2)


def correlation_of_sums(squares_x: Tensor, squares_y: Tensor, products: Tensor) -> Tensor:
    """Pearson correlation from the sums of squares and of products of centred values."""
    return (products / (squares_x * squares_y).sqrt()).clamp(-1, 1)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return correlation_of_sums((x * x).sum(1), (y * y).sum(1), (x * y).sum(1))


def _ranks(cells: Tensor) -> Tensor:
    """Rank of each cell of (N, cells) in its row, from 0; equal cells get their mean rank."""
    ordered = cells.sort(dim=1).values
    below = torch.searchsorted(ordered, cells, right=False)
    not_above = torch.searchsorted(ordered, cells, right=True)
    return working(below + not_above - 1) / 2


def _memberships(cells: Tensor, count: int) -> Tensor:
    """Weight in [0, 1] of each cell of (N, cells) as a member of the ``count`` highest of its row."""
    last = cells.topk(count, dim=1).values[:, -1:]
    above, tied = working(cells > last), working(cells == last)
    return above + tied * (count - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)


def _pixels(scaled: Tensor, size: tuple[int, int]) -> Tensor:
    # the margin keeps rounding errors of the resampling from lowering an exact level, such as a plateau at 1, by one
    return to_8_bits(resize(scaled, size, mode="bicubic").clamp(0, 1), margin=1e-9).int()


def _windowed(x: Tensor, y: Tensor) -> Tensor:
    """Mean SSIM over all 7x7 windows of 8-bit maps (N, H, W); the sums are exact integers."""
    n = WINDOW**2
    sum_x, sum_y, sum_xx, sum_yy, sum_xy = (working(_box_sums(values)) for values in (x, y, x * x, y * y, x * y))
    cov_scale = 1 / (n * (n - 1) * 255**2)
    var_x, var_y, cov = (
        (n * products - first * second) * cov_scale
        for products, first, second in ((sum_xx, sum_x, sum_x), (sum_yy, sum_y, sum_y), (sum_xy, sum_x, sum_y))
    )
    return ssim_of_moments(sum_x / (n * 255), sum_y / (n * 255), var_x, var_y, cov).mean((1, 2))


def _box_sums(values: Tensor) -> Tensor:
    """Sums over all 7x7 windows, from sums of 2 and 4 neighbours."""
    for axis in (1, 2):
        count = values.shape[axis] - WINDOW + 1
        pairs = _add_shifted(values, axis, 1)
        fours = _add_shifted(pairs, axis, 2)
        values = fours.narrow(axis, 0, count) + pairs.narrow(axis, 4, count) + values.narrow(axis, WINDOW - 1, count)
    return values


def _add_shifted(values: Tensor, axis: int, distance: int) -> Tensor:
    count = values.shape[axis] - distance
    return values.narrow(axis, 0, count) + values.narrow(axis, distance, count)
