"""What is done to an image each time it is seen in training, and to its human map with it."""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resized_crop

from explain2me.config.training import AugmentationConfig

LARGEST_ASPECT = 4 / 3
LEAST_SHARE = 0.01
"""Of the peak of a human map: a crop that shows less shows the tail of a Gaussian, 3 standard deviations from a
fixation, which scaling would magnify."""


class Move(NamedTuple):
    """One draw; places and sizes are fractions of the sides, so that it fits an image and a map of any size."""

    flip: bool
    top: float
    left: float
    height: float
    width: float
    down: float
    right: float


def draw_move(config: AugmentationConfig, rng: np.random.Generator) -> Move:
    """Draw what happens to one image; the same numbers are drawn whatever is switched off."""
    flip, area, aspect, top, left, down, right = rng.random(7)
    share = config.crop + (1 - config.crop) * area
    side = math.sqrt(share)
    longest = min(math.sqrt(LARGEST_ASPECT), 1 / side)  # that fits into the image
    stretch = longest ** (2 * aspect - 1) if config.crop < 1 else 1.0
    height, width = min(1.0, side / stretch), min(1.0, side * stretch)
    shift = (2 * np.array([down, right]) - 1) * config.shift
    place = (top * (1 - height), left * (1 - width))
    return Move(bool(config.flip and flip < 0.5), *place, height, width, *map(float, shift))


def move_image(planes: Shaped[Tensor, "C H W"], move: Move) -> Shaped[Tensor, "C H W"]:
    """The planes of an image after a draw, at the same size."""
    height, width = planes.shape[1:]
    if move.height < 1 or move.width < 1:
        box = (move.top * height, move.left * width, move.height * height, move.width * width)
        top, left, box_height, box_width = (round(value) for value in box)
        planes = resized_crop(
            planes, top, left, max(1, box_height), max(1, box_width), [height, width], InterpolationMode.BILINEAR
        )
    down, right = round(move.down * height), round(move.right * width)
    if down or right:
        rows = (torch.arange(height) - down).clamp(0, height - 1)
        columns = (torch.arange(width) - right).clamp(0, width - 1)
        planes = planes[:, rows][:, :, columns]
    return planes.flip(2) if move.flip else planes


def move_map(human_map: Float[Tensor, "H W"], move: Move) -> Float[Tensor, "H W"]:
    """The human map of that image after the same draw; all zero where nearly nothing of its salience is left to see."""
    moved = move_image(human_map[None], move)[0]
    return torch.zeros_like(moved) if moved.max() < LEAST_SHARE * human_map.max() else moved
