"""Section 3.3: does the salience follow the object when the image is shifted, flipped or rotated?"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from explain2me.measures.checks import DEAD_SUM, FLAT_RANGE, check_known, check_maps, check_pair, height_and_width
from explain2me.measures.scaling import minmax, resize, resize_operator
from explain2me.measures.similarity import SIMILARITIES, correlation_of_sums, ssim_of_moments, where_defined

GRID = 14
"""A shift moves the content by 1 / 14 of the input size: 16 of 224 pixels."""
CHUNK = 8
"""Number of maps that are resampled at once."""


@dataclass(frozen=True)
class Transform:
    """A transform of an image, and its inverse for the map.

    Attributes:
        name: key in ``TRANSFORMS``.
        group: the column of the paper's Table 2.
        down: vertical direction of a shift: 1 moves the content down, -1 up, 0 not.
        right: horizontal direction of a shift: 1 moves the content right, -1 left, 0 not.

    >>> images = torch.arange(4).view(1, 1, 2, 2)
    >>> TRANSFORMS["rotate_90CC"].apply(images)
    tensor([[[[1, 3],
              [0, 2]]]])
    """

    name: str
    group: Literal["shifts", "flips", "rotations"]
    down: int = 0
    right: int = 0

    def apply(self, images: Shaped[Tensor, "N C H W"]) -> Shaped[Tensor, "N C H W"]:
        """Transform images of any dtype; a shift replicates the edge pixels.

        Raises:
            ValueError: the shape is not (N, C, H, W), or a rotation of images that are not square.
        """
        if images.ndim != 4:
            raise ValueError(
                f"images must have shape (N, C, H, W), got {tuple(images.shape)}; give one image as images[None]"
            )
        if self.group == "shifts":
            return _shift(images, *self.shift_by(*images.shape[2:]))
        return self._turn(images, back=False)

    def undo(self, maps: Float[Tensor, "N h w"]) -> Float[Tensor, "N h w"]:
        """Move the maps of transformed images back, so that they can be drawn on the original image.

        Flips and rotations are undone exactly at any resolution. A shift moves by h/14 cells: by round(h/14) whole
        cells where the map has at least 14 cells a side, otherwise by a fraction of a cell, with linear interpolation.
        Undone shifts are for display, because the edge cells are replicated; :func:`resilience` scores the overlap
        only.

        Raises:
            ValueError: the maps are not floating point (N, h, w), or a rotation of maps that are not square.

        >>> TRANSFORMS["shift_R"].undo(torch.tensor([[[0.0, 0.0, 7.0, 0.0, 0.0, 0.0, 0.0]]]))
        tensor([[[0.0000, 3.5000, 3.5000, 0.0000, 0.0000, 0.0000, 0.0000]]])
        """
        check_maps(maps)
        if self.group == "shifts":
            return _shift_cells(_shift_cells(maps, -self.down, 1), -self.right, 2)
        return self._turn(maps, back=True)

    def shift_by(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (down, right) by which the content of an image of this size moves."""
        return self.down * shift_distance(height), self.right * shift_distance(width)

    def _turn(self, planes: Tensor, *, back: bool) -> Tensor:
        if self.group == "flips":
            return planes.flip(-1 if self.name == "flip_LR" else -2)
        check_square(self.name, *planes.shape[-2:])
        quarter_turns = 1 if self.name == "rotate_90CC" else -1
        return planes.rot90(-quarter_turns if back else quarter_turns, (-2, -1))


TRANSFORMS: dict[str, Transform] = {
    transform.name: transform
    for transform in (
        Transform("shift_DR", "shifts", 1, 1),
        Transform("shift_R", "shifts", 0, 1),
        Transform("shift_UR", "shifts", -1, 1),
        Transform("shift_D", "shifts", 1, 0),
        Transform("shift_U", "shifts", -1, 0),
        Transform("shift_DL", "shifts", 1, -1),
        Transform("shift_L", "shifts", 0, -1),
        Transform("shift_UL", "shifts", -1, -1),
        Transform("flip_LR", "flips"),
        Transform("flip_UD", "flips"),
        Transform("rotate_90CC", "rotations"),
        Transform("rotate_90CW", "rotations"),
    )
}
"""The 12 transforms by name, in the paper's order; CC is counter-clockwise, CW clockwise."""


def shift_distance(side: int) -> int:
    """Distance of a shift in pixels along a side of an image: round(side / 14).

    >>> shift_distance(224)
    16
    """
    return round(side / GRID)


def resilience(
    maps: Float[Tensor, "N h w"],
    transformed_maps: Float[Tensor, "N h w"],
    transform: str,
    input_size: int | tuple[int, int],
    *,
    similarity: str = "ssim",
) -> Float[Tensor, " N"]:
    """Similarity of each clean map to the moved-back map of the transformed image (eq. 6).

    Higher means that the salience follows the object. Flips and rotations are undone at native resolution. A shift may
    be a fraction of a cell: both maps are resampled to the input size (bilinear), one is moved back by whole pixels,
    and the overlap is compared, because the replicated border carries no information.

    Args:
        maps: of the clean images.
        transformed_maps: of the transformed images, not moved back.
        transform: a key of ``TRANSFORMS``.
        input_size: of the model in pixels, one number or (height, width).
        similarity: a key of ``SIMILARITIES``.

    Returns:
        One value for each image, in the range of the similarity ([-1, 1] for ssim); 1 means that the map moved with the
        image. NaN where either map is dead or flat, or is so within the overlap of a shift.

    Raises:
        ValueError: the shapes differ or are not (N, h, w), an unknown name, or a rotation with a non-square input.

    >>> maps = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    >>> resilience(maps, maps.flip(2), "flip_LR", 224), resilience(maps, maps, "flip_LR", 224)
    (tensor([1.]), tensor([-0.3309]))
    """
    check_pair(maps, transformed_maps, ("maps", "transformed_maps"))
    check_known(transform, TRANSFORMS, "transform")
    check_known(similarity, SIMILARITIES, "similarity")
    size = height_and_width(input_size)
    if TRANSFORMS[transform].group == "rotations":
        check_square(transform, *size)
    if TRANSFORMS[transform].group != "shifts":
        options = {"input_size": size} if similarity == "ssim_windowed" else {}
        return SIMILARITIES[similarity](maps, TRANSFORMS[transform].undo(transformed_maps), **options)
    shift = TRANSFORMS[transform].shift_by(*size)
    compare = _overlap_of_moments if similarity in ("ssim", "pearson") else _overlap_similarity
    value = compare(similarity, minmax(maps), minmax(transformed_maps), shift, size)
    return where_defined(value, maps, transformed_maps)


def check_square(name: str, height: int, width: int) -> None:
    """Raise ValueError unless the input of a rotation by 90 degrees is square."""
    if height != width:
        raise ValueError(
            f"{name} needs a square image and map, got height {height} and width {width}; "
            "resize the input to a square, or leave the rotations out"
        )


def _shift(planes: Tensor, down: int, right: int) -> Tensor:
    return _shift_axis(_shift_axis(planes, down, planes.ndim - 2), right, planes.ndim - 1)


def _shift_axis(planes: Tensor, distance: int, axis: int) -> Tensor:
    """Move the content by whole cells along an axis, forwards if positive, and replicate the edge."""
    size = planes.shape[axis]
    edge = planes.narrow(axis, 0 if distance > 0 else size - 1, 1)
    edge = edge.expand(*planes.shape[:axis], abs(distance), *planes.shape[axis + 1 :])
    content = planes.narrow(axis, max(0, -distance), size - abs(distance))
    return torch.cat([edge, content] if distance > 0 else [content, edge], axis)


def _shift_cells(maps: Tensor, direction: int, axis: int) -> Tensor:
    """Move the content by side / 14 cells, rounded to whole cells where there are 14 or more."""
    side = maps.shape[axis]
    if direction == 0 or side >= GRID:
        return _shift_axis(maps, direction * shift_distance(side), axis)
    return torch.lerp(maps, _shift_axis(maps, direction, axis), side / GRID)


def _overlap_similarity(
    similarity: str, maps: Tensor, transformed: Tensor, shift: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """Any similarity of the overlap: resample both maps, crop them to the same content, compare."""
    clean, moved = zip(*(_clean_and_moved(*side) for side in zip(size, shift, strict=True)), strict=True)
    compare: Callable[..., Tensor] = SIMILARITIES[similarity]
    if similarity == "ssim_windowed":
        overlap = tuple(side - abs(d) for d, side in zip(shift, size, strict=True))
        compare = functools.partial(compare, input_size=overlap)

    def sample(cells: Tensor) -> Tensor:
        # rounded, so that pixels tie that differ by rounding errors only
        return resize(cells, size, mode="bilinear").round(decimals=12)

    values = [
        compare(sample(a)[:, *clean], sample(b)[:, *moved])
        for a, b in zip(torch.split(maps, CHUNK), torch.split(transformed, CHUNK), strict=True)
    ]
    return torch.cat(values)


class _Sampling(NamedTuple):
    """Sampling of one of the two maps along one axis of the overlap; A is the operator (pixels, cells)."""

    sums: Tensor
    """(cells,), A' 1."""
    squares: Tensor
    """(cells, cells), A' A."""
    turning_points: Tensor
    """(turning points, cells), the rows of A that contain the extrema."""


class _Axis(NamedTuple):
    """One axis of the overlap.

    Let A and B be the operators of the two maps M and T, X = A_h M A_w' and Y = B_h T B_w'. The sum of X * Y over all
    pixels equals the sum of M * (A_h' B_h) T (B_w' A_w) over all cells, so no pixel needs to be sampled.
    """

    num_pixels: int
    clean: _Sampling
    moved: _Sampling
    products: Tensor
    """(cells, cells), A' B."""


def _overlap_of_moments(
    similarity: str, maps: Tensor, transformed: Tensor, shift: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """``_overlap_similarity`` of ssim and pearson from moments: the same value at about 1 % of the work."""
    rows, columns = (
        sampling_axis(pixels, cells, distance, maps.dtype, maps.device)
        for pixels, cells, distance in zip(size, maps.shape[1:], shift, strict=True)
    )
    num_pixels = rows.num_pixels * columns.num_pixels
    x, mean_x, undefined_x = _scale_overlap(maps, rows.clean, columns.clean, num_pixels)
    y, mean_y, undefined_y = _scale_overlap(transformed, rows.moved, columns.moved, num_pixels)
    squares_x = (x * (rows.clean.squares @ x @ columns.clean.squares)).sum((1, 2))
    squares_y = (y * (rows.moved.squares @ y @ columns.moved.squares)).sum((1, 2))
    products = (x * (rows.products @ y @ columns.products.T)).sum((1, 2))
    if similarity == "pearson":
        value = correlation_of_sums(squares_x, squares_y, products)
    else:
        n = max(num_pixels - 1, 1)
        value = ssim_of_moments(mean_x, mean_y, squares_x / n, squares_y / n, products / n)
    return value.masked_fill(undefined_x | undefined_y, torch.nan)


def _scale_overlap(
    cells: Tensor, rows: _Sampling, columns: _Sampling, num_pixels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale maps so that their overlap spans [0, 1], and subtract its mean; also that mean, and whether it is dead or flat."""
    extrema = rows.turning_points @ cells @ columns.turning_points.T
    low, high = extrema.amin((1, 2), keepdim=True), extrema.amax((1, 2), keepdim=True)
    total = rows.sums @ cells @ columns.sums
    undefined = (high - low <= FLAT_RANGE * high)[:, 0, 0] | (total <= DEAD_SUM)
    cells = (cells - low) / torch.where(high > low, high - low, 1)
    mean = rows.sums @ cells @ columns.sums / num_pixels
    return cells - mean[:, None, None], mean, undefined


@functools.lru_cache(maxsize=64)
def sampling_axis(pixels: int, cells: int, distance: int, dtype: torch.dtype, device: torch.device) -> _Axis:
    """Closed-form sums over one axis of what the clean and the moved map both show."""
    with torch.inference_mode(False), torch.device("cpu"):  # the cached tensor serves callers outside these modes too
        sampling = resize_operator(pixels, cells, "bilinear", torch.float64, torch.device("cpu"))
        spans = _clean_and_moved(pixels, distance)
        a, b = (sampling[span] for span in spans)
        clean, moved = (
            _Sampling(
                *(
                    part.to(device, dtype)
                    for part in (operator.sum(0), operator.T @ operator, sampling[_turning_points(pixels, cells, span)])
                )
            )
            for operator, span in zip((a, b), spans, strict=True)
        )
        return _Axis(len(a), clean, moved, (a.T @ b).to(device, dtype))


def _clean_and_moved(pixels: int, distance: int) -> tuple[slice, slice]:
    """Spans along a side of the common content, in the clean and in the shifted image."""
    return (
        slice(max(0, -distance), pixels - max(0, distance)),
        slice(max(0, distance), pixels - max(0, -distance)),
    )


def _turning_points(pixels: int, cells: int, span: slice) -> Tensor:
    """First and last pixel of a span between neighbouring cell centres.

    Between neighbouring cell centres the resampled map is linear along each axis, so its extrema over the span are at
    these pixels.
    """
    pixel = torch.arange(span.start, span.stop)
    piece = torch.floor((pixel + 0.5) * cells / pixels - 0.5).long()
    change = torch.cat([torch.ones(1, dtype=torch.bool), piece[1:] != piece[:-1], torch.ones(1, dtype=torch.bool)])
    return pixel[change[:-1] | change[1:]]
