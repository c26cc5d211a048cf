"""Min-max scaling and resampling of maps, as linear operators that are made once and kept."""

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from explain2me.measures.checks import is_dead, working


def minmax(maps: Tensor) -> Tensor:
    """Each map (N, h, w) scaled to [0, 1], in working precision; dead maps and constant ones become zero."""
    cells = live(maps)
    low, high = cells.amin((1, 2), keepdim=True), cells.amax((1, 2), keepdim=True)
    return (cells - low) / torch.where(high > low, high - low, 1)


def live(maps: Tensor) -> Tensor:
    """The maps (N, h, w) in working precision, dead ones set to zero so that nothing not finite goes on."""
    return working(maps).masked_fill(is_dead(maps)[:, None, None], 0)


def resize(maps: Tensor, size: tuple[int, int], *, mode: Literal["bilinear", "bicubic"]) -> Tensor:
    """Maps (N, h, w) sampled at (N, H, W) pixel centres; the borders of both grids coincide.

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
def resize_operator(pixels: int, cells: int, mode: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Matrix (pixels, cells) that resamples one axis."""
    with torch.inference_mode(False), torch.device("cpu"):  # what is kept must serve every later caller
        identity = torch.eye(cells, dtype=torch.float64, device="cpu")[None, None]
        operator = F.interpolate(identity, size=(pixels, cells), mode=mode, align_corners=False)[0, 0]
        return operator.to(device, dtype)


def to_8_bits(scaled: Tensor, *, margin: float = 0.0) -> Tensor:
    """Levels 0 to 255 of values in [0, 1], cut off and not rounded, as int64.

    Args:
        scaled: in [0, 1].
        margin: a value this close below a level counts as that level.

    >>> to_8_bits(torch.tensor([0.0, 0.5, 1.0]))
    tensor([  0, 127, 255])
    """
    return (255 * scaled + margin).floor().long()
