"""Section 3.1 against SciPy, scikit-image and values worked by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import skimage.measure
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from explain2me.measures import entropy

OSIE = Path(__file__).resolve().parents[2] / "../shared/data/salience/osie_faces"


def random_maps(n, h, w, *, seed=0):
    return torch.rand(n, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refused(message):
    """The error of our own check, or of jaxtyping's check of the signature where that is on."""
    return pytest.raises((ValueError, TypeError), match=f"{message}|Type-check error")


def levels(map_):
    """8-bit map from the formula."""
    return np.floor(255 * ((map_ - map_.min()) / (map_.max() - map_.min()))).astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5), (7, 7, 7), (3, 14, 14), (2, 40, 50)], ids=str)
def test_spatial_matches_scipy(shape):
    maps = random_maps(*shape) ** 4
    want = [scipy.stats.entropy(m.ravel(), base=2) / np.log2(m.size) for m in maps.numpy()]
    torch.testing.assert_close(entropy(maps), torch.tensor(want), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 5), (7, 7, 7), (3, 16, 16)], ids=str)
def test_intensity_matches_scikit_image(shape):
    maps = random_maps(*shape)
    want = [skimage.measure.shannon_entropy(levels(m)) / np.log2(m.size) for m in maps.numpy()]
    torch.testing.assert_close(entropy(maps, "intensity"), torch.tensor(want), rtol=0, atol=1e-12)


def test_intensity_of_large_maps_is_divided_by_8_bits():
    """Erratum of eq. 2, which would divide by log2(256 * 256) - 8 = 8 here, but by 0 for 256 x 1 cells of 8 bits."""
    every_level = torch.arange(256, dtype=torch.float64)
    assert entropy(every_level.view(1, 256, 1), "intensity").item() == 1
    assert entropy(every_level.repeat(256).view(1, 256, 256), "intensity").item() == 1
    maps = random_maps(2, 64, 40)
    want = [skimage.measure.shannon_entropy(levels(m)) / 8 for m in maps.numpy()]
    torch.testing.assert_close(entropy(maps, "intensity"), torch.tensor(want), rtol=0, atol=1e-12)


@pytest.mark.skipif(not OSIE.is_dir(), reason="human salience maps not found beside the repository (../shared)")
def test_both_match_on_human_salience_maps():
    arrays = [np.asarray(Image.open(p).convert("L").resize((28, 14))) for p in sorted((OSIE).rglob("*.png"))[:20]]
    arrays = [a.astype(np.float64) for a in arrays if a.max() > a.min()]
    assert len(arrays) >= 10
    maps = torch.tensor(np.stack(arrays))
    spatial = [scipy.stats.entropy(a.ravel(), base=2) / np.log2(a.size) for a in arrays]
    intensity = [skimage.measure.shannon_entropy(levels(a)) / 8 for a in arrays]
    torch.testing.assert_close(entropy(maps), torch.tensor(spatial), rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy(maps, "intensity"), torch.tensor(intensity), rtol=0, atol=1e-12)


def test_values_worked_by_hand():
    maps = torch.tensor([[[1.0, 1.0, 2.0, 0.0]], [[0.0, 0.0, 0.0, 3.0]], [[1.0, 1.0, 0.0, 0.0]]])
    assert entropy(maps).tolist() == [0.75, 0, 0.5]  # bits: 1.5, 0, 1 of 2
    # levels {127, 127, 255, 0}, {0, 0, 0, 255}, {255, 255, 0, 0}
    quarter = (0.25 * math.log2(4) + 0.75 * math.log2(4 / 3)) / 2
    assert entropy(maps, "intensity").tolist() == pytest.approx([0.75, quarter, 0.5])


def test_a_flat_map_is_the_worst_and_the_best():
    flat = torch.full((1, 7, 7), 3.0)
    assert entropy(flat).item() == 1
    assert entropy(flat, "intensity").item() == 0
    nearly = flat.double() * (1 + 1e-14 * random_maps(1, 7, 7))
    assert entropy(nearly).item() == 1
    assert entropy(nearly, "intensity").item() == 0


@pytest.mark.parametrize("estimator", ["spatial", "intensity"])
def test_dead_maps_have_none(estimator):
    """scikit-image says 0 for a map of NaN: the best value for no map at all."""
    maps = torch.ones(5, 2, 2)
    maps[0], maps[1], maps[2, 0, 0], maps[3, 0, 0] = 0, torch.nan, torch.nan, torch.inf
    assert entropy(maps, estimator).isnan().tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("estimator", ["spatial", "intensity"])
def test_one_cell(estimator):
    assert entropy(torch.tensor([[[2.0]], [[0.0]]]), estimator).tolist() == pytest.approx([0, math.nan], nan_ok=True)


@pytest.mark.parametrize("estimator", ["spatial", "intensity"])
def test_huge_and_tiny_values_count_by_their_shares(estimator):
    maps = random_maps(3, 7, 7) + 0.1
    for scale in (1e-10, 1e306):
        torch.testing.assert_close(entropy(maps * scale, estimator), entropy(maps, estimator), rtol=1e-12, atol=0)


@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=12), st.sampled_from(["spatial", "intensity"]))
def test_in_range_or_dead(cells, estimator):
    maps = torch.tensor([[cells]])
    value = entropy(maps, estimator).item()
    assert math.isnan(value) if maps.double().sum() <= 1e-12 else 0 <= value <= 1


def test_wrong_input():
    with refused("unknown estimator 'spatal'; did you mean 'spatial'"):
        entropy(torch.ones(1, 2, 2), "spatal")
    with refused(r"must not be negative, got a minimum of -0.5; apply relu"):
        entropy(torch.tensor([[[1.0, -0.5]]]))
    with refused(r"got torch.float32 of shape \(7, 7\)"):
        entropy(torch.ones(7, 7))
