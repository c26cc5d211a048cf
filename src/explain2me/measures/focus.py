"""Section 3.4: blur the salient or the non-salient regions of an image."""

import functools
import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from explain2me.measures.checks import check_images, check_known, check_maps, is_dead, is_flat
from explain2me.measures.scaling import minmax, resize_operator

SIGMA_MAX = 10 / 224
"""Sigma of the strongest blur, as a fraction of the mean side of the image."""
SIGMA_MAP = 5 / 224
"""Sigma of the blur of the map, as a fraction of the mean side of the image."""
NUM_LEVELS = 12
"""Number of blurred versions of an image, the first without blur, between which each pixel is interpolated."""
SIGMA_MIN = 0.32
"""Sigma in pixels of the weakest blurred level; a weaker blur hardly changes an image."""
TRUNCATE = 4
"""Radius of a Gaussian in sigmas."""
NEGLIGIBLE = 1e-3
"""Cosines that a blur scales by less than this are left out."""


class Blurred(NamedTuple):
    """Images after the removal of salient and of non-salient regions."""

    salient: UInt8[Tensor, "N 3 H W"]
    nonsalient: UInt8[Tensor, "N 3 H W"]


def blur_by_salience(
    images: UInt8[Tensor, "N 3 H W"],
    maps: Float[Tensor, "N h w"],
    remove: Literal["salient", "nonsalient"] = "salient",
) -> UInt8[Tensor, "N 3 H W"]:
    """Blur each image where its map is high (``salient``), or where it is low (``nonsalient``).

    First t = minmax(M), resampled to the size of the image (bicubic, clipped to [0, 1]); salient removal takes 1 - t.
    Then s = g(t) / max(g(t)), where g is a Gaussian of sigma 5. Each pixel is blurred with sigma 10 (1 - s)^4. The
    sigmas are pixels at 224 and scale with the mean side of the image, so that the blur is round on any image. Each
    colour channel is blurred alone, with a reflected border.

    The blur is interpolated between 12 levels of sigma. On photographs of faces, the mean difference from the formula
    evaluated at each pixel is at most 0.1 grey levels for each image.

    An image with a dead or flat map comes back unchanged and is invalid for this measure: count it with :func:`is_dead`
    and :func:`is_flat`, and leave it out of the scores.

    Args:
        images: clean.
        maps: one for each image, at any resolution.
        remove: ``salient`` or ``nonsalient``.

    Raises:
        ValueError: images or maps of another shape or type, another number of maps than images, or another ``remove``.

    >>> image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    >>> image[..., ::2] = 200
    >>> left = torch.tensor([[[1.0, 0.0]]])  # salient removal keeps the right half and blurs the left to grey
    >>> blur_by_salience(image, left)[0, 0, 0, [0, 1, 30, 31]]
    tensor([1..., ..., 200,   0], dtype=torch.uint8)
    """
    check_known(remove, Blurred._fields, "part to remove")
    (result,) = _blur(images, maps, (remove,))
    return result


def blur_both(images: UInt8[Tensor, "N 3 H W"], maps: Float[Tensor, "N h w"]) -> Blurred:
    """Both removals of :func:`blur_by_salience`, with bit-equal results and the same errors, in little more time than one.

    >>> image, flat = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1, 2, 2)
    >>> [blurred.equal(image) for blurred in blur_both(image, flat)]
    [True, True]
    """
    return Blurred(*_blur(images, maps, Blurred._fields))


@torch.no_grad()
def _blur(images: Tensor, maps: Tensor, removals: tuple[str, ...]) -> tuple[Tensor, ...]:
    check_images(images)
    check_maps(maps)
    if len(images) != len(maps):
        raise ValueError(
            f"expected one map for each image, got {len(images)} images and {len(maps)} maps; give both in the same order"
        )
    maps = maps.to(images.device)
    shares = minmax(maps).float()
    sigmas = blur_levels(*images.shape[2:])
    rows, columns = (
        axis_operators(side, sigmas, sum(images.shape[2:]) / 2, images.device) for side in images.shape[2:]
    )
    chunk = 1 if images.device.type == "cpu" else 8  # one image at a time fits into the cache of a CPU
    results = images.new_empty(len(removals), *images.shape)
    with torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), chunk):
            part = slice(start, start + chunk)
            smoothed = _smoothed(shares[part], rows, columns)
            positions = torch.stack([_positions(smoothed, removal, sigmas) for removal in removals])
            results[:, part] = _blend(images[part], positions, rows, columns)
    undefined = (is_dead(maps) | is_flat(maps))[:, None, None, None]
    return torch.where(undefined, images, results).unbind()


class _Axis(NamedTuple):
    """The blurs along one axis of an image, as matrices.

    A blur with a reflected border is diagonal in the basis of the cosine transform: it only scales each cosine. The
    stronger the blur, the fewer cosines have a scale that is not negligible.
    """

    cosines: Tensor
    """(side, side), the cosine transform, one cosine in each row."""
    levels: tuple[Tensor, ...]
    """(side, number of cosines) each: scale the cosines and transform them back; without the first level, no blur."""
    map_blur: Tensor
    """(side, side), the Gaussian g for the map."""


def _blend(
    images: UInt8[Tensor, "n 3 H W"], positions: Float[Tensor, "removals n H W"], rows: _Axis, columns: _Axis
) -> UInt8[Tensor, "removals n 3 H W"]:
    """Interpolate each pixel linearly between the two levels of blur next to its position, in [0, levels - 1].

    Adds one level after the other, weighted by its distance from the position, so that only one level is in memory.
    """
    blurred = images.float()
    waves = rows.cosines @ blurred @ columns.cosines.T
    total = blurred.new_zeros(len(positions), *images.shape)
    weight = torch.empty_like(positions)
    for level in range(NUM_LEVELS):
        if level > 0:
            left, right = rows.levels[level - 1], columns.levels[level - 1]
            torch.matmul(left, waves[..., : left.shape[1], : right.shape[1]] @ right.T, out=blurred)
        torch.sub(positions, level, out=weight).abs_().neg_().add_(1).clamp_min_(0)
        total.addcmul_(blurred, weight[:, :, None])
    return total.round_().clamp_(0, 255).byte()


def _smoothed(shares: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    """g(t) of maps (n, h, w) in [0, 1], at the size of the images; note that g(1 - t) = 1 - g(t)."""
    up, across = (
        resize_operator(len(axis.cosines), cells, "bicubic", shares.dtype, shares.device)
        for axis, cells in zip((rows, columns), shares.shape[1:], strict=True)
    )
    return rows.map_blur @ (up @ shares @ across.T).clamp_(0, 1) @ columns.map_blur.T


def _positions(smoothed: Tensor, removal: str, sigmas: tuple[float, ...]) -> Tensor:
    """Position of each pixel's sigma among the levels, (n, H, W) in [0, levels - 1]; linear in log sigma."""
    keep = 1 - smoothed if removal == "salient" else smoothed
    share = keep / keep.amax((1, 2), keepdim=True).clamp_min(1e-12)
    weakest, strongest = sigmas[1], sigmas[-1]
    sigma = strongest * (1 - share).square().square()
    steps = (sigma / weakest).clamp_min(1).log() * ((len(sigmas) - 2) / math.log(strongest / weakest))
    return torch.where(sigma < weakest, sigma / weakest, 1 + steps).clamp_(0, len(sigmas) - 1)


def blur_levels(height: int, width: int) -> tuple[float, ...]:
    """Sigma of each level in pixels: 0, then evenly spaced in log sigma."""
    strongest = SIGMA_MAX * (height + width) / 2
    weakest = min(SIGMA_MIN, strongest / 2)
    step = (strongest / weakest) ** (1 / (NUM_LEVELS - 2))
    return (0.0, *(weakest * step**i for i in range(NUM_LEVELS - 1)))


@functools.lru_cache(maxsize=16)
def axis_operators(side: int, sigmas: tuple[float, ...], mean_side: float, device: torch.device) -> _Axis:
    """Cosines of one axis, and the filter of each level above 0 in their basis."""
    with torch.inference_mode(False), torch.device("cpu"):  # the cached tensor serves callers outside these modes too
        wave = torch.arange(side, dtype=torch.float64)
        cosines = torch.cos(math.pi / side * wave[:, None] * (wave + 0.5)) * math.sqrt(2 / side)
        cosines[0] = math.sqrt(1 / side)
        levels = []
        for sigma in sigmas[1:]:
            scales = cosine_scales(side, sigma)
            count = int((scales.abs() > NEGLIGIBLE).nonzero().max()) + 1
            levels.append((scales[:, None] * cosines)[:count].T)
        map_blur = cosines.T @ (cosine_scales(side, SIGMA_MAP * mean_side)[:, None] * cosines)
        cosines, map_blur, *levels = (m.to(device, torch.float32).contiguous() for m in (cosines, map_blur, *levels))
        return _Axis(cosines, tuple(levels), map_blur)


def cosine_scales(side: int, sigma: float) -> Tensor:
    """Factor (side,) by which a Gaussian, truncated at 4 sigma, scales each cosine of an axis."""
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    wave = torch.arange(side, dtype=torch.float64)
    return torch.cos(math.pi / side * wave[:, None] * offsets) @ (weights / weights.sum())
