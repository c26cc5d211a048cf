"""Dead and flat maps, and the wording of errors about input."""

import numpy as np
import pytest
import torch

from explain2me.measures import is_dead, is_flat
from explain2me.measures.checks import check_images, check_known, check_maps, check_pair, height_and_width

NAN, INF = float("nan"), float("inf")


def one_map(*cells, dtype=torch.float64):
    return torch.tensor([[cells]], dtype=dtype)


@pytest.mark.parametrize(
    ("cells", "dead", "flat"),
    [
        ((0, 0, 0), True, False),
        ((4e-13, 4e-13, 0), True, False),
        ((1e-12, 1e-12, 0), False, False),
        ((1, NAN, 0), True, False),
        ((1, INF, 0), True, False),
        ((1, -INF, 0), True, False),
        ((NAN, NAN, NAN), True, False),
        ((-1, -2, -3), True, False),
        ((-3, 1, 1), False, False),
        ((1, 1, 1), False, True),
        ((1, 1, 1 - 1e-13), False, True),
        ((1, 1, 1 - 1e-11), False, False),
        ((1e300, 1e300, 1e300), False, True),
        ((1e30, 1e30, 0), False, False),
        ((5,), False, True),
    ],
)
def test_dead_and_flat(cells, dead, flat):
    maps = one_map(*cells)
    assert is_dead(maps).tolist() == [dead]
    assert is_flat(maps).tolist() == [flat]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(dtype):
    maps = torch.tensor([[[0, 0]], [[1, 1]], [[0, 1]]], dtype=dtype)
    assert is_dead(maps).tolist() == [True, False, False]
    assert is_flat(maps).tolist() == [False, True, False]


def test_a_sum_that_overflows_half_precision_is_live():
    maps = torch.full((1, 7, 7), 60000.0, dtype=torch.float16)
    maps[0, 0, 0] = 1
    assert not is_dead(maps)
    assert not is_flat(maps)


def test_no_maps():
    assert is_dead(torch.zeros(0, 7, 7)).shape == is_flat(torch.zeros(0, 7, 7)).shape == (0,)


@pytest.mark.parametrize("maps", [torch.zeros(7, 7), torch.zeros(1, 1, 7, 7), torch.zeros(1, 7, 7, dtype=torch.uint8)])
def test_refuses_what_is_not_a_batch_of_maps(maps):
    with pytest.raises(
        ValueError, match=r"maps must be floating point of shape \(N, h, w\), got torch.*with maps\[None\]"
    ):
        check_maps(maps)


def test_refuses_arrays():
    with pytest.raises(
        ValueError, match=r"maps must be a torch.Tensor of shape \(N, h, w\), got ndarray; convert it with torch"
    ):
        is_dead(np.ones((1, 2, 2)))


def test_refuses_maps_without_cells():
    with pytest.raises(ValueError, match=r"at least one cell each, got shape \(3, 0, 7\)"):
        check_maps(torch.zeros(3, 0, 7))


@pytest.mark.parametrize("other", [(1, 7, 7), (2, 7, 1), (2, 8, 7)])
def test_refuses_pairs_of_different_shape_and_never_broadcasts(other):
    with pytest.raises(ValueError, match=r"a and b must have the same shape .* got \(2, 7, 7\) and \(\d, \d, \d\)"):
        check_pair(torch.ones(2, 7, 7), torch.ones(other))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(1, 8, 8, 3).byte()], ids=str
)
def test_refuses_what_is_not_a_batch_of_8_bit_images(images):
    with pytest.raises(ValueError, match=r"images must be uint8 of shape \(N, 3, H, W\), got torch.*permute"):
        check_images(images)


def test_offers_the_nearest_name():
    with pytest.raises(ValueError, match="unknown transform 'flip_RL'; did you mean 'flip_LR'"):
        check_known("flip_RL", ["flip_LR", "shift_U"], "transform")


def test_input_size():
    assert height_and_width(7) == (7, 7)
    assert height_and_width((7, 9)) == (7, 9)
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        height_and_width(0)
