"""Input checks, dead and flat maps, and the working precision; shared by all measures."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from explain2me.text import nearest

DEAD_SUM = 1e-12
"""Largest sum, after ReLU, of a dead map."""
FLAT_RANGE = 1e-12
"""Largest difference of the maximum and the minimum of a flat map, as a fraction of the maximum."""


def is_dead(maps: Float[Tensor, "N h w"]) -> Bool[Tensor, " N"]:
    """Whether each map is dead: it has a value that is not finite, or its sum after ReLU is at most 1e-12.

    Raises:
        ValueError: the maps are not floating point of shape (N, h, w).

    >>> is_dead(torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[1.0, torch.nan]], [[1.0, 1.0]]]))
    tensor([ True, False,  True, False])
    """
    check_maps(maps)
    cells = working(maps).flatten(1)
    return ~cells.isfinite().all(1) | (cells.relu().sum(1) <= DEAD_SUM)


def is_flat(maps: Float[Tensor, "N h w"]) -> Bool[Tensor, " N"]:
    """Whether each map is flat: live, but with max - min of at most 1e-12 max.

    A flat map has an entropy (spatial 1, intensity 0), but no similarity to another map.

    Raises:
        ValueError: the maps are not floating point of shape (N, h, w).

    >>> is_flat(torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[1.0, torch.nan]], [[1.0, 1.0]]]))
    tensor([False, False, False,  True])
    """
    check_maps(maps)
    cells = working(maps).flatten(1)
    low, high = cells.aminmax(dim=1)
    return ~is_dead(maps) & (high - low <= FLAT_RANGE * high)


def check_maps(maps: Tensor, name: str = "maps") -> None:
    """Check that ``maps`` are floating point of shape (N, h, w), with at least one cell.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(maps, Tensor):
        raise ValueError(
            f"{name} must be a torch.Tensor of shape (N, h, w), got {type(maps).__name__}; convert it with torch.as_tensor"
        )
    if not maps.is_floating_point() or maps.ndim != 3:
        raise ValueError(
            f"{name} must be floating point of shape (N, h, w), got {maps.dtype} of shape {tuple(maps.shape)}; "
            f"add a batch axis to one map with {name}[None], convert 8-bit maps with {name}.float()"
        )
    if 0 in maps.shape[1:]:
        raise ValueError(
            f"{name} must have at least one cell each, got shape {tuple(maps.shape)}; leave empty maps out"
        )


def check_pair(a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    """Check that two batches of maps have the same shape (N, h, w) and device; nothing is broadcast.

    Raises:
        ValueError: they differ, or are no maps.
    """
    for maps, name in zip((a, b), names, strict=True):
        check_maps(maps, name)
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape (N, h, w), got {tuple(a.shape)} and {tuple(b.shape)}; "
            "repeat or resize one of them first"
        )
    if a.device != b.device:
        raise ValueError(
            f"{names[0]} and {names[1]} must be on the same device, got {a.device} and {b.device}; move one with .to(device)"
        )


def check_images(images: Tensor) -> None:
    """Check that ``images`` are uint8 of shape (N, 3, H, W).

    Raises:
        ValueError: they are not.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 of shape (N, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}; "
            "add a batch axis to one image with images[None], move channels first with images.permute(0, 3, 1, 2)"
        )


def check_known(name: str, known_names: Iterable[str], kind: str) -> None:
    """Check that a name, such as that of a transform, is known.

    Raises:
        ValueError: it is not; the message gives the ``kind`` and the nearest known names.
    """
    names = list(known_names)
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}; {nearest(name, names)}")


def height_and_width(input_size: int | tuple[int, int]) -> tuple[int, int]:
    """Input size in pixels as (height, width); one number gives a square.

    Raises:
        ValueError: a side is below 1 pixel.

    >>> height_and_width(224)
    (224, 224)
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if height < 1 or width < 1:
        raise ValueError(f"input_size must be at least 1 pixel, got {input_size}; give height and width in pixels")
    return height, width


def working(maps: Tensor) -> Tensor:
    """Convert to the working precision of the device."""
    return maps.to(working_dtype(maps.device))


def working_dtype(device: torch.device) -> torch.dtype:
    """Working precision of a device: float64, or float32 where it has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(*maps: Tensor) -> torch.dtype:
    """Precision of the scores of maps: that of the maps, but at least float32."""
    dtype = torch.float32
    for tensor in maps:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
