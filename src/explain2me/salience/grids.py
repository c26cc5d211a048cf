"""Map a feature tensor to the cells of a salience map, using shapes only.

Axes: N images, C channels, h w grid, L tokens (prefix tokens such as class and registers, then the grid row by row).
"""

import math
from typing import Literal, NamedTuple

from jaxtyping import Shaped
from torch import Tensor

Layout = Literal["NCHW", "NHWC", "NLC", "NCL"]
Size = tuple[int, int]  # height and width of the images in pixels
MAX_PREFIX_TOKENS = 16
USUAL_PREFIX_TOKENS = 5
"""One class token and four registers."""


class Grid(NamedTuple):
    """Layout of a feature tensor on the h x w cells of a map.

    Attributes:
        layout: order of the axes.
        h, w: height and width of the map in cells.
        num_prefix: number of tokens before the grid; 0 for layouts without tokens.
    """

    layout: Layout
    h: int
    w: int
    num_prefix: int = 0

    def spread(self, features: Shaped[Tensor, "N ..."]) -> Shaped[Tensor, "N C h w"]:
        """View the features as (N, C, h, w), without the prefix tokens.

        >>> import torch
        >>> Grid("NLC", 2, 3, num_prefix=1).spread(torch.zeros(4, 7, 5)).shape
        torch.Size([4, 5, 2, 3])
        """
        match self.layout:
            case "NCHW":
                return features
            case "NHWC":
                return features.permute(0, 3, 1, 2)
            case "NLC":
                return features[:, self.num_prefix :].transpose(1, 2).view(len(features), -1, self.h, self.w)
            case "NCL":
                return features.view(len(features), -1, self.h, self.w)


def collapsed_grid(shape: tuple[int, ...], output: tuple[int, ...], size: Size, num_prefix: int | None) -> Grid | None:
    """The grid that a function removed from its input; None where the output still has it.

    Args:
        shape: of the input, with 3 or 4 axes.
        output: shape of the output.
        size: height and width of the images.
        num_prefix: number of prefix tokens; None: unknown.

    >>> collapsed_grid((1, 64, 7, 7), (1, 64, 1, 1), (224, 224), None)
    Grid(layout='NCHW', h=7, w=7, num_prefix=0)
    >>> collapsed_grid((1, 64, 7, 7), (1, 64, 3, 3), (224, 224), None)
    """
    if len(output) < 2 or output[0] != shape[0]:
        return None
    rest = output[1:]
    if len(shape) == 3:
        _, first, second = shape
        if rest in ((second,), (1, second)):
            return token_grid(first, size, num_prefix)
        grid = token_grid(second, size, 0) if rest in ((first,), (first, 1)) else None
        return grid and grid._replace(layout="NCL")
    _, a, b, c = shape
    if rest == (a * b * c,) and a * b > 1 and b * c > 1:
        return named_grid(shape, size, None)
    moved = a * b == 1 and math.prod(rest) == c  # (N, 1, 1, C) to (N, C, 1, 1)
    nchw = b * c > 1 and not moved and (rest == (a,) or (len(rest) == 3 and rest[1:] == (1, 1)))
    nhwc = a * b > 1 and _fits(a, b, size) and rest in ((c,), (1, 1, c))
    if nchw and nhwc:
        return named_grid(shape, size, None)
    return Grid("NCHW", b, c) if nchw else Grid("NHWC", a, b) if nhwc else None


def named_grid(shape: tuple[int, ...], size: Size, num_prefix: int | None) -> Grid | None:
    """The grid of features of this shape; None where they have no grid.

    The axes that fit the aspect ratio of the images are h and w, the other one is the channels.

    >>> named_grid((8, 7, 7, 768), (224, 224), None)
    Grid(layout='NHWC', h=7, w=7, num_prefix=0)
    >>> named_grid((8, 197, 192), (224, 224), None)
    Grid(layout='NLC', h=14, w=14, num_prefix=1)
    """
    if len(shape) == 3:
        grid = token_grid(shape[2], size, 0)
        return token_grid(shape[1], size, num_prefix) or (grid and grid._replace(layout="NCL"))
    if len(shape) != 4:
        return None
    _, a, b, c = shape
    if _fits(a, b, size) and not _fits(b, c, size):
        return Grid("NHWC", a, b)
    return Grid("NCHW", b, c) if b * c > 1 else None


def token_grid(num_tokens: int, size: Size, num_prefix: int | None) -> Grid | None:
    """The grid of a sequence of tokens; None where no grid fits.

    Prefers whole square patches of the images, then the fewest prefix tokens, then the nearest aspect ratio. A model
    with ``num_prefix`` tokens may have removed them; where the number is unknown, 0 to 16 are tried.

    >>> token_grid(5 + 8 * 12, (128, 192), None)
    Grid(layout='NLC', h=8, w=12, num_prefix=5)
    """
    grids = [
        Grid("NLC", h, cells // h, prefix)
        for prefix in (range(MAX_PREFIX_TOKENS + 1) if num_prefix is None else sorted({0, num_prefix}))
        if (cells := num_tokens - prefix) > 1
        for h in range(1, cells + 1)
        if cells % h == 0 and _fits(h, cells // h, size)
    ]
    whole = (grid for grid in grids if grid.num_prefix <= USUAL_PREFIX_TOKENS and _is_whole(grid, size))
    return next(whole, None) or min(
        grids, key=lambda grid: (grid.num_prefix, abs(grid.h * size[1] - grid.w * size[0])), default=None
    )


def _is_whole(grid: Grid, size: Size) -> bool:
    """Whether the cells are square patches of the images without a remainder."""
    return size[0] % grid.h == size[1] % grid.w == 0 and size[0] * grid.w == size[1] * grid.h


def _fits(h: int, w: int, size: Size) -> bool:
    """Whether h x w has the aspect ratio of the image, up to rounding of both sides to whole cells."""
    return abs(h * size[1] - w * size[0]) < max(size)
