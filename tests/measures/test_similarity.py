"""Eq. 4 and its companions against scikit-image, SciPy, OpenCV and values worked by hand."""

import math

import cv2
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from explain2me.measures import SIMILARITIES, pearson, spearman, ssim, ssim_windowed, top_k_iou


def random_maps(n, h, w, *, seed=0, sparse=False):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(n, h, w, generator=generator, dtype=torch.float64)
    return maps * (torch.rand(n, h, w, generator=generator) < 0.3) if sparse else maps


def refused(message):
    """The error of our own check, or of jaxtyping's check of the signature where that is on."""
    return pytest.raises((ValueError, TypeError), match=f"{message}|Type-check error")


def minmax(map_):
    return (map_ - map_.min()) / (map_.max() - map_.min())


@pytest.mark.parametrize("sparse", [False, True])
def test_ssim_matches_scikit_image_on_7x7(sparse):
    a, b = 5 * random_maps(50, 7, 7, seed=1, sparse=sparse) + 2, random_maps(50, 7, 7, seed=2, sparse=sparse)
    want = [
        structural_similarity(minmax(x), minmax(y), win_size=7, data_range=1)
        for x, y in zip(a.numpy(), b.numpy(), strict=True)
    ]
    torch.testing.assert_close(ssim(a, b), torch.tensor(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 2), (3, 4, 9), (2, 14, 14)], ids=str)
def test_ssim_matches_the_formula(shape):
    a, b = random_maps(*shape, seed=1), random_maps(*shape, seed=2)
    want = []
    for x, y in zip(a.numpy(), b.numpy(), strict=True):
        x, y = minmax(x).ravel(), minmax(y).ravel()
        (var_x, cov), (_, var_y) = np.cov(x, y)
        luminance = (2 * x.mean() * y.mean() + 0.0001) / (x.mean() ** 2 + y.mean() ** 2 + 0.0001)
        want.append(luminance * (2 * cov + 0.0009) / (var_x + var_y + 0.0009))
    torch.testing.assert_close(ssim(a, b), torch.tensor(want), rtol=0, atol=1e-12)


def test_two_empty_maps_are_not_the_same_map():
    """Every SSIM library says 1."""
    zero = np.zeros((7, 7))
    assert structural_similarity(zero, zero, win_size=7, data_range=1) == 1
    assert ssim(torch.tensor(zero)[None], torch.tensor(zero)[None]).isnan().all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("ours", "reference"), [(spearman, scipy.stats.spearmanr), (pearson, scipy.stats.pearsonr)])
def test_correlations_match_scipy(ours, reference, ties):
    a, b = random_maps(20, 7, 6, seed=1, sparse=ties), random_maps(20, 7, 6, seed=2, sparse=ties)
    if ties:
        a, b = (5 * a).round(), (5 * b).round()
    want = [reference(x.ravel(), y.ravel()).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    torch.testing.assert_close(ours(a, b), torch.tensor(want), rtol=0, atol=1e-12)


def test_top_k_iou_matches_sets():
    a, b = random_maps(30, 7, 8, seed=1), random_maps(30, 7, 8, seed=2)
    for k, count in ((0.1, 6), (0.25, 14), (1.0, 56), (0.001, 1)):
        chosen = [[set(np.argsort(m.ravel())[-count:]) for m in maps.numpy()] for maps in (a, b)]
        want = [len(x & y) / len(x | y) for x, y in zip(*chosen, strict=True)]
        torch.testing.assert_close(top_k_iou(a, b, k=k), torch.tensor(want, dtype=torch.float64))


def test_top_k_iou_shares_the_last_places_among_ties():
    a = torch.tensor([[[9.0, 1.0, 1.0, 0.0, 0.0, 0.0]]])
    b = torch.tensor([[[9.0, 5.0, 0.0, 0.0, 0.0, 0.0]]])
    # two places: a gives 1, 1/2, 1/2; b gives 1, 1, 0: (1 + 1/2 + 0) / (1 + 1 + 1/2)
    assert top_k_iou(a, b, k=1 / 3).item() == pytest.approx(0.6)
    assert top_k_iou(a, a, k=1 / 3).item() == 1
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    assert top_k_iou(a[..., order], b[..., order], k=1 / 3).item() == pytest.approx(0.6)


@pytest.mark.parametrize("k", [0, -0.1, 1.1, math.nan])
def test_top_k_iou_refuses_other_fractions(k):
    with refused(r"k must be a fraction of the cells in \(0, 1\]"):
        top_k_iou(torch.ones(1, 2, 2), torch.ones(1, 2, 2), k=k)


def cubic_operator(pixels, cells):
    """Cubic convolution (Keys 1981) with a = -0.75 and replicated border, from the formula."""
    operator = np.zeros((pixels, cells))
    for pixel in range(pixels):
        source = (pixel + 0.5) * cells / pixels - 0.5
        for cell in range(math.floor(source) - 1, math.floor(source) + 3):
            d = abs(source - cell)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            operator[pixel, min(max(cell, 0), cells - 1)] += near if d <= 1 else far
    return operator


def released_8_bits(map_, height, width):
    rows, columns = cubic_operator(height, map_.shape[0]), cubic_operator(width, map_.shape[1])
    large = rows @ minmax(map_) @ columns.T
    np.testing.assert_allclose(
        large, cv2.resize(minmax(map_), (width, height), interpolation=cv2.INTER_CUBIC), atol=1e-5
    )
    return np.floor(255 * np.clip(large, 0, 1) + 1e-9).astype(np.uint8)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("size", [224, 31, (60, 90), 7])
def test_windowed_matches_scikit_image_on_8_bits(size, sparse):
    a, b = random_maps(12, 7, 7, seed=1, sparse=sparse), random_maps(12, 7, 7, seed=2, sparse=sparse)
    height, width = (size, size) if isinstance(size, int) else size
    want = [
        structural_similarity(*(released_8_bits(m, height, width) for m in pair))
        for pair in zip(a.numpy(), b.numpy(), strict=True)
    ]
    torch.testing.assert_close(ssim_windowed(a, b, input_size=size), torch.tensor(want), rtol=0, atol=1e-6)


def test_windowed_keeps_a_plateau_at_its_level():
    """Rounding in the resampling must not turn 1 - 1e-16 into level 254."""
    plateau = torch.zeros(1, 7, 7, dtype=torch.float64)
    plateau[0, 1:6, 1:6] = 3
    other = plateau.clone()
    other[0, 3, 3] = 3 * (1 - 1e-15)
    assert ssim_windowed(plateau, other).item() == 1


def test_windowed_refuses_inputs_below_its_window():
    with refused("at least the window, 7 pixels, got 6"):
        ssim_windowed(torch.rand(1, 7, 7), torch.rand(1, 7, 7), input_size=6)


def test_windowed_has_the_higher_chance_level():
    """Unrelated blobs, 0.37 at 224 against 0.09 at 7x7: why the windowed form is not the default."""
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(7.0), indexing="ij")
    centres = 6 * torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    blobs = torch.exp(-((y - centres[:, 0, None, None]) ** 2 + (x - centres[:, 1, None, None]) ** 2) / 3)
    plain, windowed = (f(blobs[:100], blobs[100:]).mean().item() for f in (ssim, ssim_windowed))
    assert windowed > plain + 0.2


cells = st.lists(st.integers(0, 4), min_size=6, max_size=6)


@given(cells, cells)
@example([1] * 6, [0, 1, 2, 3, 4, 4])
def test_symmetric_and_in_range(first, second):
    a, b = torch.tensor([[first]], dtype=torch.float64), torch.tensor([[second]], dtype=torch.float64)
    for name in ("ssim", "pearson", "spearman", "top_k_iou"):
        forwards, backwards = SIMILARITIES[name](a, b).item(), SIMILARITIES[name](b, a).item()
        assert forwards == pytest.approx(backwards, nan_ok=True)
        assert math.isnan(forwards) == (len(set(first)) == 1 or len(set(second)) == 1)
        assert math.isnan(forwards) or (0 if name == "top_k_iou" else -1) <= forwards <= 1


@pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)
def test_neighbours_in_the_batch_do_not_matter(similarity):
    """TorchMetrics takes the range over the whole batch."""
    a, b = random_maps(2, 7, 7, seed=1), random_maps(2, 7, 7, seed=2)
    alone = similarity(a[:1], b[:1])
    a[1] *= 1e9
    assert torch.equal(similarity(a, b)[:1], alone)


@pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)
def test_never_broadcasts(similarity):
    with refused(r"same shape \(N, h, w\), got \(2, 7, 7\) and \(1, 7, 7\)"):
        similarity(torch.rand(2, 7, 7), torch.rand(1, 7, 7))
    with refused("a must be floating point"):
        similarity(torch.zeros(2, 7, 7, dtype=torch.uint8), torch.rand(2, 7, 7))
