"""Section 3.1: entropy of a salience map."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from explain2me.measures.checks import check_known, check_maps, is_dead, is_flat, result_dtype, working
from explain2me.measures.scaling import minmax, to_8_bits

NUM_LEVELS = 256
"""Number of levels of an 8-bit map."""


def entropy(
    maps: Float[Tensor, "N h w"], estimator: Literal["spatial", "intensity"] = "spatial"
) -> Float[Tensor, " N"]:
    """Entropy of each map divided by its maximum, in [0, 1]; lower means more focused (eq. 1 to 3).

    ``spatial`` takes the map as a distribution over its cells, p = M / sum(M). It is 0 when one cell holds all salience
    and 1 when all cells hold the same.

    ``intensity`` (eq. 1 as written) quantises the map to 8 bits, floor(255 minmax(M)), and takes the distribution of
    the levels. Their entropy is at most min(8, log2(h w)) bits; eq. 2 gives a wrong maximum for maps of more than 256
    cells.

    The two differ: a flat map has the worst spatial value, 1, and the best intensity value, 0.

    Args:
        maps: non-negative, any scale.
        estimator: ``spatial`` or ``intensity``.

    Returns:
        One value for each map; NaN for a dead map, 0 for a map of one cell.

    Raises:
        ValueError: maps of another shape or type or with negative values, or an unknown estimator.

    >>> maps = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [0.0, 0.0]], [[2.0, 2.0], [2.0, 2.0]]])
    >>> entropy(maps)
    tensor([0.0000, 0.5000, 1.0000])
    >>> entropy(maps[1:], "intensity")
    tensor([0.5000, 0.0000])
    """
    check_maps(maps)
    check_known(estimator, _ESTIMATORS, "estimator")
    negative = (maps < 0) & maps.isfinite()
    if bool(negative.any()):
        lowest = maps[negative].min().item()
        raise ValueError(f"maps must not be negative, got a minimum of {lowest:.3g}; apply relu() to signed maps")
    value = _ESTIMATORS[estimator](maps).clamp(0, 1)
    return value.masked_fill(is_dead(maps), torch.nan).to(result_dtype(maps))


def _spatial(maps: Tensor) -> Tensor:
    cells = working(maps).masked_fill(is_dead(maps)[:, None, None], 1).flatten(1)
    cells = cells / cells.amax(1, keepdim=True)  # keeps the sum of huge values finite
    shares = cells / cells.sum(1, keepdim=True)
    num_cells = shares.shape[1]
    if num_cells == 1:
        return torch.zeros_like(shares[:, 0])
    value = torch.special.entr(shares).sum(1) / math.log(num_cells)
    return value.masked_fill(is_flat(maps), 1)


def _intensity(maps: Tensor) -> Tensor:
    levels = to_8_bits(minmax(maps)).masked_fill(is_flat(maps)[:, None, None], 0).flatten(1)
    counts = torch.zeros(len(maps), NUM_LEVELS, dtype=torch.int64, device=maps.device)
    counts.scatter_add_(1, levels, torch.ones_like(levels))
    num_cells = levels.shape[1]
    shares = working(counts) / num_cells
    return torch.special.entr(shares).sum(1) / math.log(max(2, min(NUM_LEVELS, num_cells)))


_ESTIMATORS = {"spatial": _spatial, "intensity": _intensity}
