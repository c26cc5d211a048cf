"""Salience maps from disk: what people marked or where they looked, as PNG, NPY or a table of fixations."""

import csv
import io
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.special import ndtr

from explain2me.errors import ImageError, ManifestError
from explain2me.images.decode import MAX_PIXELS
from explain2me.images.reading import read_bytes
from explain2me.text import printable_line

SUFFIXES = (".png", ".npy", ".csv")


SIGMA = 0.04
"""Of the Gaussian around a fixation, as a fraction of the image's width: about 1 degree of a picture 25 degrees wide."""


def load_map(
    path: Path, *, image_size: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> Float[np.ndarray, "h w"]:
    """Read one salience map, float32, not scaled.

    - ``.png``: grey of 8 or 16 bits, any size; of a colour picture the luminance, alpha dropped.
    - ``.npy``: a numeric array (h, w) saved by ``numpy.save``; pickled objects are refused.
    - ``.csv``: fixations, see :func:`read_fixations`, as a density.

    Args:
        path: of the file.
        image_size: height and width in pixels of the image that fixations belong to; other files do not need it.
        size: height and width to which the map is resized (bilinear, antialiased), and at which fixations are drawn; None:
            as stored, and ``image_size``.

    Raises:
        ManifestError: missing, of another kind, damaged, not finite, negative, or without any salience.
    """
    return parse_map(read_map(path), path, image_size=image_size, size=size)


def read_map(path: Path) -> bytes:
    """The bytes of one salience map.

    Raises:
        ManifestError: missing, or of another kind than PNG, NPY and CSV.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ManifestError(
            f"{_named(path)}: expected a file that ends in {', '.join(SUFFIXES)}, got {suffix or 'no suffix'!r}"
        )
    try:
        return read_bytes(path)
    except ImageError as error:
        raise ManifestError(f"{_named(path)}: {error.message}") from None


def parse_map(
    data: bytes, path: Path, *, image_size: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> Float[np.ndarray, "h w"]:
    """The salience map in the bytes of the file ``path``; see :func:`load_map`."""
    where, suffix = _named(path), path.suffix.lower()
    if suffix == ".csv":
        if image_size is None:
            raise ManifestError(f"{where}: a table of fixations needs the size of its image; give a PNG or NPY here")
        return fixation_density(read_fixations(data, where), image_size, size=size, where=where)
    values = _from_png(data, where) if suffix == ".png" else _from_npy(data, where)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() <= 0:
        raise ManifestError(
            f"{where}: expected finite values of at least 0 and some above, got {values.min():g} to {values.max():g}; "
            f"leave the cell of the manifest empty where an image has no map"
        )
    return values if size is None else resize_map(values, size)


def _named(path: Path) -> str:
    return f"salience map {printable_line(str(path))!r}"


def read_fixations(data: bytes, where: str = "fixations") -> Float[np.ndarray, "F 3"]:
    """x, y (pixels from the left and the top of the image file) and duration (any unit) of each fixation.

    CSV with the columns ``x``, ``y`` and optionally ``duration`` (1 each where absent); others are ignored.

    Raises:
        ManifestError: a column is missing, or a number is not one.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{where}: not a CSV table in UTF-8 ({printable_line(str(error))})") from None
    if not rows or not {"x", "y"} <= set(rows[0]):
        got = sorted(map(str, rows[0])) if rows else "no rows"
        raise ManifestError(f"{where}: expected the columns x, y and optionally duration, got {got}")
    try:
        found = np.array([[float(row[name]) for name in ("x", "y")] + [float(row.get("duration", 1))] for row in rows])
    except (TypeError, ValueError) as error:
        raise ManifestError(f"{where}: x, y and duration must be numbers ({printable_line(str(error))})") from None
    if not np.isfinite(found).all() or found[:, 2].min() < 0:
        raise ManifestError(f"{where}: x, y and duration must be finite, and durations at least 0")
    return found


def fixation_density(
    fixations: Float[np.ndarray, "F 3"],
    image_size: tuple[int, int],
    *,
    size: tuple[int, int] | None = None,
    sigma: float = SIGMA,
    where: str = "fixations",
) -> Float[np.ndarray, "H W"]:
    """Where people looked: the duration of each fixation at its pixel, smoothed by a Gaussian, sum 1, float32.

    Args:
        fixations: x, y in pixels of the upright image (its EXIF orientation applied) and duration; those outside the image
            are left out.
        image_size: height and width in pixels.
        size: of the density; None: ``image_size``. The Gaussian is round in the image.
        sigma: of the Gaussian, as a fraction of the width.
        where: they are from, for errors.

    Raises:
        ManifestError: less than half of the fixations lie inside the image, or x and y are shares of its sides instead of
            pixels.
    """
    height, width = image_size
    places = fixations[:, :2]
    if max(image_size) > 2 and ((places >= 0) & (places <= 1)).all() and (places % 1 > 0).any():
        raise ManifestError(
            f"{where}: all of x and y are from 0 to 1, so they seem to be shares of the image; multiply them by its width and "
            f"height, {width} x {height} pixels"
        )
    inside = ((places >= 0) & (places < (width, height))).all(1)
    durations = fixations[inside, 2]
    if not durations.sum() > 0:
        raise ManifestError(
            f"{where}: none of {len(fixations)} fixations lies inside the image of {width} x {height} pixels with a duration "
            f"above 0; are x and y in pixels of this file?"
        )
    if 2 * inside.sum() < len(fixations):
        raise ManifestError(
            f"{where}: {len(fixations) - inside.sum()} of {len(fixations)} fixations lie outside the image of {width} x {height} pixels; "
            f"are x and y in pixels of this file? Remove those that are meant to be outside"
        )
    columns, rows = np.floor(places[inside]).T + 0.5
    drawn = size or image_size
    down = _bells(rows, height, drawn[0], sigma * width)
    density = (durations * down) @ _bells(columns, width, drawn[1], sigma * width).T
    return (density / density.sum()).astype(np.float32)


def _bells(places: Float[np.ndarray, " F"], length: int, count: int, sigma: float) -> Float[np.ndarray, "count F"]:
    """What ``count`` equal parts of an axis of ``length`` pixels get of a Gaussian around each place."""
    edges = np.linspace(0, length, count + 1)
    return np.diff(ndtr((edges[:, None] - places) / sigma), axis=0)


def mean_map(folder: Path, size: tuple[int, int]) -> tuple[Float[np.ndarray, "h w"], int]:
    """The average of all maps (PNG, NPY) of a folder, each scaled to the sum 1 first, and how many there were.

    Args:
        folder: subfolders are left out.
        size: height and width to which each map is resized (bilinear, antialiased).

    Raises:
        ManifestError: the folder is missing or holds no map, or a map is wrong.
    """
    files = maps_of(folder)
    total = np.zeros(size, np.float64)
    for path in files:
        resized = load_map(path, size=size).astype(np.float64)
        total += resized / resized.sum()
    return (total / len(files)).astype(np.float32), len(files)


def maps_of(folder: Path) -> list[Path]:
    """The maps (PNG, NPY) of a folder, by name.

    Raises:
        ManifestError: the folder is missing or holds no map.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".npy"))
    except OSError as error:
        raise ManifestError(f"salience {str(folder)!r}: expected a folder of maps ({error.strerror})") from None
    if not files:
        raise ManifestError(f"salience {str(folder)!r}: expected maps as *.png or *.npy, got none")
    return files


def resize_map(values: Float[np.ndarray, "a b"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Resize (height, width), bilinear and antialiased, float32."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _from_png(data: bytes, where: str) -> Float[np.ndarray, "h w"]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ManifestError(f"{where}: {image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            grey = image if image.mode.startswith("I") or image.mode == "1" else image.convert("L")
            return np.asarray(grey, dtype=np.float32)
    except ManifestError:
        raise
    except Exception as error:  # a decoder fed with hostile bytes raises anything
        raise ManifestError(f"{where}: not a PNG that can be read ({printable_line(str(error))})") from None


def _from_npy(data: bytes, where: str) -> Float[np.ndarray, "h w"]:
    try:
        found = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # as above
        raise ManifestError(f"{where}: not an array of numpy.save ({printable_line(str(error))})") from None
    numeric = isinstance(found, np.ndarray) and (found.dtype.kind in "buif")
    if not numeric or found.ndim != 2 or 0 in found.shape:
        raise ManifestError(
            f"{where}: expected numbers of shape (h, w), got {getattr(found, 'dtype', type(found).__name__)} of shape "
            f"{getattr(found, 'shape', '')}"
        )
    return found.astype(np.float32)
