"""One file in, one RGB image out: three 8-bit channels, upright, whole. The only place where an image is decoded.

- The content decides the format, never the name; only :data:`FORMATS` are decoded, by Pillow.
- Alpha and palette transparency are dropped, not composited: the colour stored under them is shown, as
  ``convert("RGB")`` does and therefore as torchvision's and timm's folders feed it to a detector in training.
- 16-bit grey becomes 8-bit by rounding ``value / 257``, 12-bit grey (TIFF) by rounding ``value * 255 / 4095``. (Pillow
  itself reads 16-bit *colour* by its high byte.)
- Embedded colour profiles are ignored, as those loaders do. All eight EXIF orientations are applied; a broken EXIF
  block counts as none. The first picture of a multi-picture JPEG (MPO, a phone's depth or gain map) is the photograph.
- What the decoder cannot see is not seen: a JPEG whose second half was overwritten decodes to grey blocks without an
  error. Give the manifest a column ``sha256`` where files may rot; ``--verify-hashes`` insists on it.

Kinds of :class:`~explain2me.errors.ImageError`:

========================= ============================================================================================
``missing``               no such file, or no such member or row of a container
``dangling_link``         a link whose target is missing, or links in a circle
``not_regular``           a folder, pipe, socket or device
``unreadable``            the container that holds the image cannot be used
``empty``                 0 bytes
``too_many_bytes``        larger than :data:`MAX_BYTES`
``not_an_image``          text, or bytes of no known format
``format_not_allowed``    a known format outside :data:`FORMATS`: PDF, PostScript, PSD, HEIF, ...
``truncated``             ends too early
``corrupt``               damaged in another way, or a flavour that Pillow does not know
``too_many_pixels``       more than ``max_pixels`` by its header; nothing was decoded
``too_small``             a side shorter than :data:`MIN_SIDE`
``animated``              several frames or pages: which one is meant is undefined
``unknown_range``         32-bit integers or floats: which value is white is undefined
``hash_mismatch``         not the bytes that the manifest or the index names
``crash``                 it killed the process that read it, twice
========================= ============================================================================================

Kinds of :class:`~explain2me.errors.MachineError`, which stops a run, and quarantines nothing:

========================= ============================================================================================
``lost``                  the folder of the image is missing or empty
``permission``            may not be read
``unreadable``            the disk or network failed, or the process has too many open files
``memory``                too little to decode an image within ``max_pixels``
========================= ============================================================================================

Messages name a file by its last part only, quoted: they are the same on every machine and hold no control character.
Pillow's own limit (``PIL.Image.MAX_IMAGE_PIXELS``, twice 89 million pixels) stays in force above ``max_pixels``.
"""

import io
import logging
import re
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from explain2me.errors import ImageError, MachineError
from explain2me.images.reading import check_sha256, read_bytes, with_file_name
from explain2me.text import nearest, printable_line

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "area": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_PIXELS = 64_000_000
MAX_SCANS = 100  # of a JPEG; encoders write about ten, and each costs the decoder a pass over all pixels
DECODING_BYTES = 16  # of memory a pixel while an image is decoded: as stored, as RGB, turned upright
MIN_SIDE = 8  # a common map has 7 cells a side: fewer pixels than cells cannot carry one


def load_image(
    path: Path, size: tuple[int, int], *, interpolation: str = "bilinear", max_pixels: int = MAX_PIXELS
) -> UInt8[Tensor, "3 H W"]:
    """Read one image and resize the whole of it, with antialiasing, to ``size`` (height, width), uint8 RGB.

    The aspect ratio is not kept and nothing is cut off. An image of that size already is returned as it is.

    Raises:
        ImageError: the image cannot be used; see the kinds above.
        ValueError: unknown interpolation or size.
    """
    check_size(size, interpolation)
    return torch.from_numpy(load_array(path, size, interpolation, max_pixels=max_pixels, expected_sha256=None))


def examine_file(path: Path, *, max_pixels: int, expected_sha256: str | None = None) -> tuple[int, int, str]:
    """Read and decode one file whole: width and height in pixels, upright, and the sha256 of its bytes.

    Raises:
        ImageError: the image cannot be used; see the kinds above.
    """
    with with_file_name(path):
        data = read_bytes(path)
        sha256 = check_sha256(data, expected_sha256)
        width, height = _decode(data, max_pixels=max_pixels).size
    return width, height, sha256


def load_array(
    path: Path, size: tuple[int, int], interpolation: str, *, max_pixels: int, expected_sha256: str | None
) -> UInt8[np.ndarray, "3 H W"]:
    """As :func:`load_image`, as an array, with the bytes compared to a sha256 first."""
    with with_file_name(path):
        data = read_bytes(path)
        if expected_sha256 is not None:
            check_sha256(data, expected_sha256)
        image = _decode(data, max_pixels=max_pixels)
    if image.size != size[::-1]:
        image = image.resize(size[::-1], INTERPOLATIONS[interpolation])
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def check_size(size: tuple[int, int], interpolation: str) -> None:
    """Raise ValueError for an impossible size or interpolation."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"expected size as (height, width) of at least 1 pixel each, got {size}")
    if interpolation not in INTERPOLATIONS:
        known = nearest(interpolation, INTERPOLATIONS)
        raise ValueError(f"expected interpolation as one of {list(INTERPOLATIONS)}, got {interpolation!r}; {known}")


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image file's bytes: RGB, upright; see the top of this module for what is dropped.

    Raises:
        ImageError: any kind that is about the bytes, from ``empty`` to ``unknown_range``.
    """
    return np.asarray(_decode(data, max_pixels=max_pixels)).copy()


_UPRIGHT = {  # EXIF orientation -> its inverse
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIGNATURES = (  # of the formats allowed, then of some that are not
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "GIF"),
    (b"RIFF(....WEBP|.{0,7}\\Z)", "WEBP"),
    (b"II\\*\0|MM\0\\*|II\\+\0|MM\0\\+", "TIFF"),
    (b"BM", "BMP"),
    (b"%PDF-", "PDF"),
    (b"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (b"....ftyp", "HEIF, AVIF or video"),
    (b"\0\0\x01\0", "icon"),
    (b"RIFF", "RIFF"),
    (b"DDS |qoif|\x76\x2f\x31\x01|\xff\x0a", "DDS, QOI, OpenEXR or JPEG XL"),
    (b"P[1-7]\\s", "Netpbm"),
    (b"\\s*(<\\?xml[^>]*>\\s*)?<svg", "SVG"),
    (b"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf", "archive"),
)


Image.init()  # now: where no more files can be opened, a decoder would be missing, and the image to blame


def _decode(data: bytes, *, max_pixels: int, is_second_try: bool = False) -> Image.Image:
    """The upright RGB image; every failure is an ImageError, a MachineError where the machine is short of memory."""
    if not data:
        raise ImageError("empty", "no bytes")
    num_pixels = 0
    try:
        with _no_pillow_warnings, Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image, max_pixels)
            num_pixels = image.width * image.height
            if _num_scans(data) > MAX_SCANS:
                raise ImageError("corrupt", f"a JPEG of more than {MAX_SCANS} scans, made to take long; save it again")
            image.load()
            return _upright(_to_rgb(image), image)
    except ImageError:
        raise
    except MemoryError as error:
        _check_memory(num_pixels)
        if not is_second_try:  # images beside it may have taken the memory, and given it back since
            return _decode(data, max_pixels=max_pixels, is_second_try=True)
        raise ImageError("corrupt", "cannot be decoded: it asks for more memory than its pixels need") from error
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", f"more pixels than the allowed {max_pixels}: {error}") from error
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Exception as error:  # a decoder fed with hostile bytes raises anything
        if isinstance(error, OSError) and error.errno:  # of a file; the bytes are in memory
            raise
        text = printable_line(f"{type(error).__name__}: {error}")
        cut_off = isinstance(error, EOFError) or "truncated" in text.lower() or _ends_early(data)
        raise ImageError("truncated" if cut_off else "corrupt", f"cannot be decoded ({text})") from error


def _check_memory(num_pixels: int) -> None:
    """Raise if the machine is short of memory for an image of so many pixels: then the image is not to blame."""
    needed = DECODING_BYTES * num_pixels + 2**26
    try:
        np.empty(needed, np.uint8)
    except MemoryError:
        why = (
            f"out of memory, {needed >> 20} MiB are not to be had; end what else needs memory, or lower compute.workers"
        )
        raise MachineError("memory", why) from None


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError("too_many_pixels", f"{width} x {height} pixels are more than the allowed {max_pixels}")
    if min(width, height) < MIN_SIDE:
        raise ImageError("too_small", f"{width} x {height} pixels; expected at least {MIN_SIDE} a side")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ImageError("animated", "several frames or pages; save the one that is meant as an image of its own")


_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")  # neither stuffing nor a restart
_SCAN, _START, _END = 0xDA, 0xD8, 0xD9


def _num_scans(data: bytes) -> int:
    """Number of scans of the first picture of a JPEG, counted up to MAX_SCANS + 1; 0 for other formats."""
    if not data.startswith(b"\xff\xd8"):
        return 0
    count, place = 0, 2
    while count <= MAX_SCANS and (marker := _MARKER.search(data, place)) and marker[1][0] != _END:
        place = marker.end()
        if marker[1][0] not in (0x01, _START):
            place += int.from_bytes(data[place : place + 2], "big")
        count += marker[1][0] == _SCAN
    return count


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # Pillow 11 may say I
        bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample)  # a TIFF may have 12
        top = 2 ** (12 if bits in (12, (12,)) else 16) - 1
        grey = (np.asarray(image).astype(np.uint32) * 255 + top // 2) // top  # rounds
        white_is_zero = getattr(image, "tag_v2", {}).get(ExifTags.Base.PhotometricInterpretation) == 0
        return Image.fromarray((255 - grey if white_is_zero else grey).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError("unknown_range", f"32-bit pixels (mode {image.mode}); save it with 8 or 16 bits a channel")
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _upright(rgb: Image.Image, original: Image.Image) -> Image.Image:
    try:
        turn = _UPRIGHT.get(original.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the block is broken in one of many ways; the pixels are not
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _unidentified(data: bytes) -> ImageError:
    name = next((name for start, name in _SIGNATURES if re.match(start, data[:256], re.DOTALL)), None)
    if name is None:
        return ImageError("not_an_image", f"not an image of a known format; it starts with {data[:16]!r}")
    if name in FORMATS and _ends_early(data):
        return ImageError("truncated", f"a {name} file that is cut off; copy or download it again")
    if name in FORMATS:
        return ImageError("corrupt", f"starts like {name}, but its header is cut off, damaged or of an unknown flavour")
    return ImageError("format_not_allowed", f"{name} is not read; expected one of {', '.join(FORMATS)}: convert it")


def _ends_early(data: bytes) -> bool:
    """Whether a WebP or TIFF file ends before the place that its header points to; Pillow reports this for other formats."""
    if data[:4] == b"RIFF":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    order: Literal["little", "big"] = "big" if data[:2] == b"MM" else "little"
    return data[:4] in (b"II*\0", b"MM\0*") and len(data) <= int.from_bytes(data[4:8], order)


logging.getLogger("PIL").addHandler(logging.NullHandler())  # without any handler Python prints what it logs


class _NoPillowWarnings:
    """Ignore Pillow's warnings while any thread is inside; ``warnings.catch_warnings`` is not safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._filter: object = None

    def __enter__(self) -> None:
        with self._lock:
            self._num_inside += 1
            if self._num_inside == 1 or self._filter not in warnings.filters:
                warnings.filterwarnings("ignore", module=r"PIL\.(?#explain2me)")
                self._filter = warnings.filters[0]

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                with suppress(ValueError):  # another thread put back filters of its own
                    warnings.filters.remove(self._filter)  # type: ignore[attr-defined]


_no_pillow_warnings = _NoPillowWarnings()
