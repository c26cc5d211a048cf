"""Min-max scaling, 8-bit quantisation and resampling of maps; the resampling operators are cached."""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from explain2me.measures.checks import is_dead, working


def minmax(maps: Float[Tensor, "N h w"]) -> Float[Tensor, "N h w"]:
    """Scale each map to [0, 1], in working precision; dead and constant maps become 0."""
    cells = live(maps)
    low, high = cells.amin((1, 2), keepdim=True), cells.amax((1, 2), keepdim=True)
    return (cells - low) / torch.where(high > low, high - low, 1)


def live(maps: Float[Tensor, "N h w"]) -> Float[Tensor, "N h w"]:
    """The maps in working precision, dead maps set to 0, so that all values are finite."""
    return working(maps).masked_fill(is_dead(maps)[:, None, None], 0)


def resize(
    maps: Float[Tensor, "N h w"], size: tuple[int, int], *, mode: Literal["bilinear", "bicubic"]
) -> Float[Tensor, "N H W"]:
    """Resample maps to ``size``, (H, W), at the centres of the pixels; the borders of both grids coincide.

    >>> resize(torch.tensor([[[0.0, 4.0]]]), (1, 4), mode="bilinear")
    tensor([[[0., 1., 3., 4.]]])
    """
    if maps.shape[1:] == size:
        return maps
    rows, columns = (
        resize_operator(pixels, cells, mode, maps.dtype, maps.device)
        for pixels, cells in zip(size, maps.shape[1:], strict=True)
    )
    return rows @ maps @ columns.T


@functools.lru_cache(maxsize=64)
def resize_operator(
    pixels: int, cells: int, mode: str, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "pixels cells"]:
    """Matrix that resamples one axis from cells to pixels."""
    with torch.inference_mode(False), torch.device("cpu"):  # the cached tensor serves callers outside these modes too
        identity = torch.eye(cells, dtype=torch.float64, device="cpu")[None, None]
        operator = F.interpolate(identity, size=(pixels, cells), mode=mode, align_corners=False)[0, 0]
        return operator.to(device, dtype)


def to_8_bits(scaled: Float[Tensor, "..."], *, margin: float = 0.0) -> Int[Tensor, "..."]:
    """Quantise values in [0, 1] to the levels 0 to 255, rounded down.

    A value below a level by at most ``margin`` levels counts as that level.

    >>> to_8_bits(torch.tensor([0.0, 0.5, 1.0]))
    tensor([  0, 127, 255])
    """
    return (255 * scaled + margin).floor().long()
