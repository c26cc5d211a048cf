"""Section 3.2: seeded noise on 8-bit images.

The noise of an image is a pure function of (seed, image id, kind, level): the same pixels in any batch, order, worker
or device. A counter-based generator (Philox; Salmon et al. 2011) draws random bits on the CPU; its key is the hash of
these four. All later arithmetic is exact, so that devices cannot round differently.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Int, UInt8
from scipy.special import ndtri
from torch import Tensor

from explain2me.measures.checks import check_images, working_dtype

Ids = Sequence[str] | Sequence[int] | Int[Tensor, " N"]
Images = UInt8[Tensor, "N 3 H W"]


def salt_and_pepper(images: Images, amount: float, *, seed: int, ids: Ids) -> Images:
    """Replace each channel value with probability ``amount`` by 0 or 255, both equally likely.

    Args:
        images: clean, at the input size of the model.
        amount: probability in [0, 1], in steps of 2^-31; 0 changes nothing.
        seed: any integer, such as that of the run.
        ids: one string or integer for each image.

    Raises:
        ValueError: images that are not uint8 (N, 3, H, W), an amount out of range, or another number of ids than
            images.

    >>> image = torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)
    >>> salt_and_pepper(image, 0.0, seed=1, ids=["a"]).unique()
    tensor([7], dtype=torch.uint8)
    >>> salt_and_pepper(image, 1.0, seed=1, ids=["a"]).unique()
    tensor([  0, 255], dtype=torch.uint8)
    """
    keys = _keys(images, "salt_pepper", _checked_amount(amount), seed, ids)
    keep, salt = np.empty(images.shape, np.uint8), np.empty(images.shape, np.uint8)
    for key, kept, white in zip(keys, keep, salt, strict=True):
        kept[...], white[...] = replacements(random_bits(key, kept.size, "<u4").reshape(kept.shape), amount)
    return (images & _to(keep, images)) | _to(salt, images)


def gaussian_noise(images: Images, sigma: float, *, seed: int, ids: Ids) -> Images:
    """Add normal noise to each channel value, rounded and clipped to [0, 255].

    16 random bits choose one of 65,536 equally likely quantiles of the normal distribution, up to 4.3 sigma.

    Args:
        images: clean, at the input size of the model.
        sigma: standard deviation as a fraction of 255, at least 0; 0 changes nothing.
        seed: any integer, such as that of the run.
        ids: one string or integer for each image.

    Raises:
        ValueError: images that are not uint8 (N, 3, H, W), a negative sigma, or another number of ids than images.

    >>> image = torch.full((1, 3, 100, 100), 100, dtype=torch.uint8)
    >>> gaussian_noise(image, 0.1, seed=1, ids=["a"]).float().std()  # near 0.1 * 255
    tensor(25.3952)
    """
    keys = _keys(images, "gaussian", _checked_level(sigma), seed, ids)
    table = np.clip(np.rint(255 * float(sigma) * _normal_quantiles()), -255, 255).astype(np.int16)
    noise = np.empty(images.shape, np.int16)
    for key, values in zip(keys, noise, strict=True):
        np.take(table, random_bits(key, values.size, "<u2").reshape(values.shape), out=values, mode="clip")
    return (images.short() + _to(noise, images)).clamp_(0, 255).byte()


def uniform_blend(images: Images, amount: float, *, seed: int, ids: Ids) -> Images:
    """Blend each channel value v with uniform noise u of {0, ..., 255}: (1 - amount) v + amount u, rounded.

    Args:
        images: clean, at the input size of the model.
        amount: weight of the noise in [0, 1], in steps of 2^-22; 0 changes nothing, 1 gives pure noise.
        seed: any integer, such as that of the run.
        ids: one string or integer for each image.

    Raises:
        ValueError: images that are not uint8 (N, 3, H, W), an amount out of range, or another number of ids than
            images.

    >>> image = torch.zeros(1, 3, 50, 50, dtype=torch.uint8)
    >>> [int(uniform_blend(image, amount, seed=1, ids=["a"]).max()) for amount in (0, 0.5, 1)]
    [0, 128, 255]
    """
    keys = _keys(images, "uniform_blend", _checked_amount(amount), seed, ids)
    weight = round(amount * 2**22)
    noise = np.empty(images.shape, np.uint8)
    for key, values in zip(keys, noise, strict=True):
        values[...] = random_bits(key, values.size, "<u1").reshape(values.shape)
    blend = images.int() * (2**22 - weight) + _to(noise, images).int() * weight + 2**21
    return (blend >> 22).byte()


def turbulence(images: Images, strength: float, *, seed: int, ids: Ids) -> Images:
    """Simulate atmospheric turbulence: a smooth random displacement ("tilt"), then a blur.

    A simplified form of the tilt-then-blur model (Chan, IEEE Signal Processing Letters 29, 2022), with the tilt as a
    smoothed random vector field (Chak, Lau and Lui, arXiv 1807.04418). The field is white noise smoothed by a Gaussian
    of sigma side / 14. The blur is the same over the whole image. Its sigma is half the displacement, close to the
    ratio of the wavefront errors of blur and tilt (Noll 1976: 0.134 rad^2 of blur, 0.448 rad^2 of tilt along each
    axis).

    Args:
        images: clean, at the input size of the model.
        strength: root mean square displacement along each axis in pixels at 224, scaled with the mean side of the
            image; at least 0; 0 changes nothing.
        seed: any integer, such as that of the run.
        ids: one string or integer for each image.

    Raises:
        ValueError: images that are not uint8 (N, 3, H, W), a negative strength, or another number of ids than images.

    >>> image = torch.full((1, 3, 28, 28), 7, dtype=torch.uint8)
    >>> turbulence(image, 2.0, seed=1, ids=["a"]).unique()  # a constant image stays constant
    tensor([7], dtype=torch.uint8)
    """
    keys = _keys(images, "turbulence", _checked_level(strength), seed, ids)
    height, width = images.shape[2:]
    side = (height + width) / 2
    tilt = strength * side / 224
    device = images.device if working_dtype(images.device) == torch.float64 else torch.device("cpu")
    distorted = torch.empty_like(images)
    for key, image, out in zip(keys, images, distorted, strict=True):
        tilted = displace(image.to(device), tilt_field(key, height, width, side / 14, tilt).to(device))
        out.copy_(blur(tilted, tilt / 2))
    return distorted


NOISES: dict[str, Callable[..., Tensor]] = {
    "salt_pepper": salt_and_pepper,
    "gaussian": gaussian_noise,
    "uniform_blend": uniform_blend,
    "turbulence": turbulence,
}
"""Kinds of noise by name, each called as ``noise(images, level, seed=..., ids=...)``."""


def replacements(bits: np.ndarray, amount: float) -> tuple[np.ndarray, np.ndarray]:
    """From 32 random bits for each value, two byte masks: the bits to keep, and the bits to set (255 for salt)."""
    half = np.uint32(round(amount * 2**31))
    is_pepper = (bits < half).view(np.uint8)
    is_salt = (bits - half < half).view(np.uint8)  # unsigned: true for half <= bits < 2 half
    return (is_pepper | is_salt) - np.uint8(1), is_salt * np.uint8(255)


_STEPS = 32
"""Steps in a pixel: displacements are multiples of 1/32 pixel."""
_WEIGHTS = 2**16
"""Sum of the filter weights, which are integers."""
_NORMAL_SCALE = 2**10
"""Standard deviation of the white noise, which takes integer values."""


def tilt_field(key: int, height: int, width: int, smoothness: float, deviation: float) -> Tensor:
    """Displacements (2, height, width), down and right, in integer steps; smoothness and deviation in pixels."""
    bits = random_bits(key, 2 * height * width, "<u2").reshape(2, height, width)
    white = np.rint(_NORMAL_SCALE * _normal_quantiles()).astype(np.float64)[bits]
    rows, columns = (blur_operator(side, smoothness, torch.device("cpu")) for side in (height, width))
    field = rows @ torch.from_numpy(white) @ columns.T
    field_deviation = _NORMAL_SCALE * int((_weights(smoothness) ** 2).sum())  # exact except near the border
    return (field * (deviation * _STEPS / field_deviation)).round().long()


def displace(image: Tensor, steps: Tensor) -> Tensor:
    """Sample a uint8 image (3, H, W) at displaced pixels (bilinear, edges replicated), times _STEPS^2, in integers."""
    height, width = image.shape[1:]
    rows, columns = (
        (_STEPS * torch.arange(side, device=image.device).view(shape) + step).clamp(0, _STEPS * (side - 1))
        for side, shape, step in zip((height, width), ((-1, 1), (1, -1)), steps, strict=True)
    )
    top, left = rows // _STEPS, columns // _STEPS
    bottom, right = (top + 1).clamp_max(height - 1), (left + 1).clamp_max(width - 1)
    down, across = rows % _STEPS, columns % _STEPS
    upper, lower = (image[:, row, left] * (_STEPS - across) + image[:, row, right] * across for row in (top, bottom))
    return upper * (_STEPS - down) + lower * down


def blur(tilted: Tensor, sigma: float) -> Tensor:
    """Blur the result of ``displace`` and scale it back to 8 bits, rounded."""
    rows, columns = (blur_operator(side, sigma, tilted.device) for side in tilted.shape[1:])
    blurred = rows @ tilted.double() @ columns.T  # integers below 2^53: exact in any order of summation
    return (blurred / (_STEPS**2 * _WEIGHTS**2) + 0.5).floor().byte()


@functools.lru_cache(maxsize=16)
def blur_operator(side: int, sigma: float, device: torch.device) -> Tensor:
    """Matrix (side, side) that blurs one axis with a reflected border; integers, each row sums to _WEIGHTS."""
    with torch.inference_mode(False), torch.device("cpu"):  # the cached tensor serves callers outside these modes too
        weights = torch.from_numpy(_weights(sigma)).double()
        radius = len(weights) // 2
        pixel = torch.arange(side)
        blurred = torch.zeros(side, side, dtype=torch.float64)
        for offset, weight in zip(range(-radius, radius + 1), weights, strict=True):
            source = (pixel + offset) % (2 * side)
            source = torch.minimum(source, 2 * side - 1 - source)
            blurred[pixel, source] += weight
        return blurred.to(device)


def _weights(sigma: float) -> np.ndarray:
    """Gaussian weights up to 4 sigma, as integers with the sum _WEIGHTS."""
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    shape = np.exp(-0.5 * (offsets / sigma) ** 2) if radius else np.ones(1)
    weights = np.rint(_WEIGHTS * shape / shape.sum()).astype(np.int64)
    weights[radius] += _WEIGHTS - weights.sum()
    return weights


def _keys(images: Tensor, kind: str, level: float, seed: int, ids: Ids) -> list[int]:
    """Check the arguments, and return a 128-bit key for each image."""
    check_images(images)
    if isinstance(ids, str) or len(ids) != len(images):
        raise ValueError(
            f"ids must hold one string or integer for each of {len(images)} images, got {ids!r:.80}; give the image ids"
        )
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(
                f"ids must be integers of shape (N,), got {ids.dtype} of shape {tuple(ids.shape)}; give one id for each image"
            )
        ids = ids.tolist()
    return [key_of(operator.index(seed), image_id, kind, level) for image_id in ids]


def key_of(seed: int, image_id: str | int, kind: str, level: float) -> int:
    """The 128-bit key of the random numbers of an image."""
    plain_id = (
        str(image_id) if isinstance(image_id, str) else operator.index(image_id)
    )  # repr of NumPy's str has its type
    # ascii() is injective and, unlike repr(), does not depend on the version of Python's Unicode tables
    text = ascii((seed, plain_id, kind, level))
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=16).digest(), "little")


def random_bits(key: int, count: int, dtype: str) -> np.ndarray:
    """``count`` random integers of a dtype, from the raw stream, which is all that NumPy guarantees across versions."""
    bytes_each = np.dtype(dtype).itemsize
    raw = np.random.Philox(key=key).random_raw(-(-count * bytes_each // 8))
    return raw.astype("<u8", copy=False).view(dtype)[:count]


def _checked_amount(amount: float) -> float:
    if not 0 <= amount <= 1:
        raise ValueError(f"amount must be in [0, 1], got {amount}; 0.05 means 5 %")
    return float(amount)


def _checked_level(level: float) -> float:
    if not 0 <= level < math.inf:
        raise ValueError(f"the level must be finite and at least 0, got {level}; 0 changes nothing")
    return float(level)


def _to(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device)


@functools.cache
def _normal_quantiles() -> np.ndarray:
    """65,536 equally likely quantiles of the standard normal distribution; float32 removes the last bits of ndtri."""
    return ndtri((np.arange(2**16) + 0.5) / 2**16).astype(np.float32)
