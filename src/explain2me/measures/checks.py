"""What the measures share: checks of their input, dead and flat maps, and the precision they compute in."""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from explain2me.text import nearest

DEAD_SUM = 1e-12
FLAT_RANGE = 1e-12


def is_dead(maps: Float[Tensor, "N h w"]) -> Bool[Tensor, " N"]:
    """Whether there is nothing in each map: a value that is not finite, or a sum of at most 1e-12 after ReLU.

    >>> is_dead(torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[1.0, torch.nan]], [[1.0, 1.0]]]))
    tensor([ True, False,  True, False])
    """
    check_maps(maps)
    cells = working(maps).flatten(1)
    return ~cells.isfinite().all(1) | (cells.relu().sum(1) <= DEAD_SUM)


def is_flat(maps: Float[Tensor, "N h w"]) -> Bool[Tensor, " N"]:
    """Whether each map is live, but says nothing about where: max - min is at most 1e-12 of its max.

    The entropy of a flat map is defined (spatial 1, intensity 0), its similarity to another map is not.

    >>> is_flat(torch.tensor([[[0.0, 0.0]], [[0.0, 1.0]], [[1.0, torch.nan]], [[1.0, 1.0]]]))
    tensor([False, False, False,  True])
    """
    check_maps(maps)
    cells = working(maps).flatten(1)
    low, high = cells.aminmax(dim=1)
    return ~is_dead(maps) & (high - low <= FLAT_RANGE * high)


def check_maps(maps: Tensor, name: str = "maps") -> None:
    """Refuse what is not a batch of maps."""
    if not isinstance(maps, Tensor):
        raise ValueError(
            f"{name} must be a torch.Tensor of shape (N, h, w), got {type(maps).__name__}; use torch.as_tensor"
        )
    if not maps.is_floating_point() or maps.ndim != 3:
        raise ValueError(
            f"{name} must be floating point of shape (N, h, w), got {maps.dtype} of shape {tuple(maps.shape)}; "
            f"give one map a batch axis with {name}[None], turn 8-bit maps into {name}.float()"
        )
    if 0 in maps.shape[1:]:
        raise ValueError(f"{name} must have at least one cell each, got shape {tuple(maps.shape)}")


def check_pair(a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")) -> None:
    """Refuse two batches of maps that do not belong together; nothing is ever broadcast."""
    for maps, name in zip((a, b), names, strict=True):
        check_maps(maps, name)
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape (N, h, w), got {tuple(a.shape)} and {tuple(b.shape)}; "
            "repeat or resize one of them first"
        )
    if a.device != b.device:
        raise ValueError(f"{names[0]} and {names[1]} must be on one device, got {a.device} and {b.device}")


def check_images(images: Tensor) -> None:
    """Refuse what is not a batch of 8-bit RGB images."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images must be uint8 of shape (N, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}; "
            "give one image a batch axis with images[None], put channels first with images.permute(0, 3, 1, 2)"
        )


def check_known(word: str, known: Iterable[str], what: str) -> None:
    """Refuse an unknown name, and offer the nearest known ones."""
    if word not in (names := list(known)):
        raise ValueError(f"unknown {what} {word!r}; {nearest(word, names)}")


def height_and_width(input_size: int | tuple[int, int]) -> tuple[int, int]:
    """Input size in pixels as (height, width); one number means a square.

    >>> height_and_width(224)
    (224, 224)
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if height < 1 or width < 1:
        raise ValueError(f"input_size must be at least 1 pixel, got {input_size}")
    return height, width


def working(maps: Tensor) -> Tensor:
    """The tensor in the precision measures compute in: float64, or float32 where the device has no float64."""
    return maps.to(working_dtype(maps.device))


def working_dtype(device: torch.device) -> torch.dtype:
    """Precision that measures compute in on a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(*maps: Tensor) -> torch.dtype:
    """Precision of scores: that of the maps, but at least float32."""
    dtype = torch.float32
    for tensor in maps:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
