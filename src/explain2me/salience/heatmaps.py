"""Read salience maps of people from disk: PNG and NPY images, or tables of fixations."""

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
"""Sigma of the Gaussian around a fixation as a fraction of the image width: 1 degree for an image 25 degrees wide."""


def load_map(
    path: Path, *, image_size: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> Float[np.ndarray, "h w"]:
    """Read one salience map: float32, at least 0, not scaled.

    - ``.png``: grey of 8 or 16 bits, any size; a colour image gives its luminance, without alpha.
    - ``.npy``: a numeric array (h, w) saved by ``numpy.save``; pickled objects are refused.
    - ``.csv``: fixations (:func:`read_fixations`), drawn as a density (:func:`fixation_density`).

    Args:
        path: of the file.
        image_size: height and width in pixels of the image; needed for fixations only.
        size: height and width of the result. A stored map is resized (bilinear, antialiased); None keeps its size.
            Fixations are drawn at this size; None draws them at ``image_size``.

    Raises:
        ManifestError: the file is missing, damaged or of another type, or its values are negative, not finite or all 0.
    """
    return parse_map(read_map(path), path, image_size=image_size, size=size)


def read_map(path: Path) -> bytes:
    """The bytes of one salience map; ManifestError as for :func:`load_map`."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ManifestError(
            f"{_named(path)}: expected a file that ends in {', '.join(SUFFIXES)}, got {suffix or 'no suffix'!r}; convert the map to "
            f"one of these formats"
        )
    try:
        return read_bytes(path)
    except ImageError as error:
        raise ManifestError(f"{_named(path)}: {error.message}") from None


def parse_map(
    data: bytes, path: Path, *, image_size: tuple[int, int] | None = None, size: tuple[int, int] | None = None
) -> Float[np.ndarray, "h w"]:
    """Decode the bytes of the salience map ``path``; arguments, result and errors as for :func:`load_map`."""
    where, suffix = _named(path), path.suffix.lower()
    if suffix == ".csv":
        if image_size is None:
            raise ManifestError(
                f"{where}: expected image_size, which a table of fixations needs, got None; give it, or a PNG or NPY map"
            )
        return fixation_density(read_fixations(data, where), image_size, size=size, where=where)
    values = _from_png(data, where) if suffix == ".png" else _from_npy(data, where)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() <= 0:
        raise ManifestError(
            f"{where}: expected finite values, at least 0 and some above 0, got {values.min():g} to {values.max():g}; "
            f"leave the cell of the manifest empty for an image without a map"
        )
    return values if size is None else resize_map(values, size)


def _named(path: Path) -> str:
    return f"salience map {printable_line(str(path))!r}"


def read_fixations(data: bytes, where: str = "fixations") -> Float[np.ndarray, "F 3"]:
    """Read a CSV table in UTF-8 with the columns ``x``, ``y`` and optionally ``duration``; others are ignored.

    Gives one row for each of the F fixations: x and y in pixels from the left and the top of the image, and the duration
    in any unit (1 without the column). Errors name the source, ``where``.

    Raises:
        ManifestError: a column is missing, a value is no finite number, or a duration is negative.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(
            f"{where}: expected a CSV table in UTF-8 ({printable_line(str(error))}); save it as such"
        ) from None
    if not rows or not {"x", "y"} <= set(rows[0]):
        columns = sorted(map(str, rows[0])) if rows else "no rows"
        raise ManifestError(
            f"{where}: expected the columns x, y and optionally duration, got {columns}; rename the columns"
        )
    try:
        fixations = np.array([[float(row["x"]), float(row["y"]), float(row.get("duration", 1))] for row in rows])
    except (TypeError, ValueError) as error:
        raise ManifestError(
            f"{where}: x, y and duration must be numbers ({printable_line(str(error))}); correct the table"
        ) from None
    wrong = ~np.isfinite(fixations).all(1) | (fixations[:, 2] < 0)
    if wrong.any():
        raise ManifestError(
            f"{where}: x, y and duration must be finite, and durations at least 0, got {wrong.sum()} of {len(wrong)} rows "
            f"with other values; correct the table"
        )
    return fixations


def fixation_density(
    fixations: Float[np.ndarray, "F 3"],
    image_size: tuple[int, int],
    *,
    size: tuple[int, int] | None = None,
    sigma: float = SIGMA,
    where: str = "fixations",
) -> Float[np.ndarray, "H W"]:
    """Density of the fixations of an image, weighted by duration and smoothed by a Gaussian; float32, sum 1.

    Args:
        fixations: x, y in pixels of the upright image (EXIF orientation applied) and duration; those outside the image
            are ignored.
        image_size: height and width in pixels.
        size: height and width of the density; None takes ``image_size``. The Gaussian is round in the image.
        sigma: of the Gaussian, as a fraction of the image width.
        where: source of the fixations, for errors.

    Raises:
        ManifestError: less than half of the fixations lie inside the image, none there has a duration above 0, or all x
            and y are in [0, 1], as fractions of the image would be.
    """
    height, width = image_size
    x, y, durations = _inside(fixations, image_size, where).T
    drawn_height, drawn_width = size or image_size
    rows = _gaussian_shares(np.floor(y) + 0.5, height, drawn_height, sigma * width)
    columns = _gaussian_shares(np.floor(x) + 0.5, width, drawn_width, sigma * width)
    density = (durations * rows) @ columns.T
    return (density / density.sum()).astype(np.float32)


def _inside(fixations: Float[np.ndarray, "F 3"], image_size: tuple[int, int], where: str) -> Float[np.ndarray, "G 3"]:
    """The fixations inside the image; refuses coordinates that do not seem to be pixels of this image."""
    height, width = image_size
    points = fixations[:, :2]
    if max(image_size) > 2 and ((points >= 0) & (points <= 1)).all() and (points % 1 > 0).any():
        raise ManifestError(
            f"{where}: expected x and y in pixels, got values from 0 to 1 only, which seem to be fractions of the image; "
            f"multiply them by its width and height, {width} x {height} pixels"
        )
    inside = ((points >= 0) & (points < (width, height))).all(1)
    if not fixations[inside, 2].sum() > 0:
        raise ManifestError(
            f"{where}: none of {len(fixations)} fixations lies inside the image of {width} x {height} pixels with a duration "
            f"above 0; give x and y in pixels of this image, and durations above 0"
        )
    num_outside = len(fixations) - int(inside.sum())
    if 2 * num_outside > len(fixations):
        raise ManifestError(
            f"{where}: {num_outside} of {len(fixations)} fixations lie outside the image of {width} x {height} pixels, at "
            f"most half may; give x and y in pixels of this image, and remove fixations beside it"
        )
    return fixations[inside]


def _gaussian_shares(
    points: Float[np.ndarray, " F"], length: int, count: int, sigma: float
) -> Float[np.ndarray, "count F"]:
    """Mass of a Gaussian around each point in each of ``count`` equal parts of an axis of ``length`` pixels."""
    edges = np.linspace(0, length, count + 1)
    return np.diff(ndtr((edges[:, None] - points) / sigma), axis=0)


def mean_map(folder: Path, size: tuple[int, int]) -> tuple[Float[np.ndarray, "h w"], int]:
    """Mean of all maps (PNG, NPY) of a folder, float32, sum 1; and the number of maps.

    Each map is first resized to (height, width), as by :func:`resize_map`, and divided by its sum.

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
    """Paths of the maps (PNG, NPY) of a folder, sorted by name; ManifestError where it is missing or holds none."""
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".npy"))
    except OSError as error:
        raise ManifestError(
            f"salience {str(folder)!r}: expected a folder of maps ({error.strerror}); give such a folder"
        ) from None
    if not files:
        raise ManifestError(
            f"salience {str(folder)!r}: expected maps as *.png or *.npy, got none; put them into this folder"
        )
    return files


def resize_map(values: Float[np.ndarray, "a b"], size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Resize a map to (height, width), bilinear and antialiased; float32."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _from_png(data: bytes, where: str) -> Float[np.ndarray, "h w"]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ManifestError(
                    f"{where}: expected at most {MAX_PIXELS} pixels, got {image.width} x {image.height}; make it smaller"
                )
            grey = image if image.mode.startswith("I") or image.mode == "1" else image.convert("L")
            return np.asarray(grey, dtype=np.float32)
    except ManifestError:
        raise
    except Exception as error:  # hostile bytes make a decoder raise anything
        raise ManifestError(f"{where}: expected a PNG image ({printable_line(str(error))}); save it again") from None


def _from_npy(data: bytes, where: str) -> Float[np.ndarray, "h w"]:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # hostile bytes make the reader raise anything
        raise ManifestError(
            f"{where}: expected an array of numpy.save ({printable_line(str(error))}); save it again"
        ) from None
    numeric = isinstance(array, np.ndarray) and array.dtype.kind in "buif"
    if not numeric or array.ndim != 2 or 0 in array.shape:
        raise ManifestError(
            f"{where}: expected numbers of shape (h, w), got {getattr(array, 'dtype', type(array).__name__)} of shape "
            f"{getattr(array, 'shape', '')}; save one map as a two-dimensional array"
        )
    return array.astype(np.float32)
