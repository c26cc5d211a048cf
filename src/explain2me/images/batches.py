"""Batches of decoded images, read ahead in threads."""

from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from explain2me.errors import ImageError
from explain2me.images.decode import MAX_PIXELS, check_size, load_array
from explain2me.images.threads import in_order


class Failure(NamedTuple):
    """One image of a batch that could not be used."""

    position: int
    error: ImageError


class Batch(NamedTuple):
    """Decoded images and their positions in the list of paths; failed images are only in ``failures``."""

    positions: list[int]
    images: UInt8[Tensor, "n 3 H W"]
    failures: list[Failure]


def batches(
    paths: Sequence[Path],
    *,
    size: tuple[int, int],
    batch_size: int,
    interpolation: str = "bilinear",
    max_pixels: int = MAX_PIXELS,
    expected_sha256: Sequence[str | None] | None = None,
    num_threads: int | None = None,
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Decode ``paths`` in order, ``batch_size`` positions a batch; ``prefetch`` batches are decoded ahead in threads.

    Batch i always starts at position i * batch_size: a bad image moves no border, and a batch may be empty. Memory does
    not grow with the number of paths. The threads end with the generator: when it is exhausted, closed or dropped.

    Args:
        paths: the files, see :func:`explain2me.images.listing.resolve`.
        size: height and width in pixels of the result.
        batch_size: positions a batch; the last batch holds the rest.
        interpolation: one of :data:`INTERPOLATIONS`.
        max_pixels: images with more pixels fail.
        expected_sha256: per path; other bytes fail as ``hash_mismatch``, for example a file replaced after the index.
        num_threads: that decode; None: one for each processor core, at most 8.
        prefetch: batches decoded ahead of the one in use, at least 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_size(size, interpolation)
    if batch_size < 1 or prefetch < 1:
        raise ValueError(f"expected batch_size and prefetch of at least 1, got {batch_size} and {prefetch}")
    if expected_sha256 is not None and len(expected_sha256) != len(paths):
        raise ValueError(f"expected one sha256 per path, got {len(expected_sha256)} for {len(paths)} paths")

    def load(position: int) -> UInt8[np.ndarray, "3 H W"]:
        sha256 = None if expected_sha256 is None else expected_sha256[position]
        return load_array(paths[position], size, interpolation, max_pixels=max_pixels, expected_sha256=sha256)

    results = in_order(load, range(len(paths)), num_threads=num_threads, ahead=prefetch * batch_size)
    return _grouped(results, num_images=len(paths), size=size, batch_size=batch_size)


def _grouped(
    results: Generator[UInt8[np.ndarray, "3 H W"] | ImageError, None, None],
    *,
    num_images: int,
    size: tuple[int, int],
    batch_size: int,
) -> Generator[Batch, None, None]:
    with closing(results):
        for start in range(0, num_images, batch_size):
            part = list(enumerate(islice(results, batch_size), start))
            images = [(position, result) for position, result in part if not isinstance(result, ImageError)]
            stacked = np.stack([image for _, image in images]) if images else np.empty((0, 3, *size), np.uint8)
            failures = [Failure(position, result) for position, result in part if isinstance(result, ImageError)]
            yield Batch([position for position, _ in images], torch.from_numpy(stacked), failures)
