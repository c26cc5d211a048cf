"""Data for the script of the page: a table of all images, and pictures and maps of the telling ones."""

import base64
import io
import math
from typing import Any

import numpy as np
from matplotlib.colors import Colormap
from PIL import Image

from explain2me.report.material import Material
from explain2me.report.summary import condition_words
from explain2me.statistics.scores import CLEAN
from explain2me.text import printable_line

THUMBNAIL = 144  # pixels a side
MOST_CELLS = 14  # a side; finer maps are averaged for the viewer
MOST_ROWS = 20_000  # images in the table


def viewer_data(material: Material, colormap: Colormap) -> dict[str, Any]:
    """Everything that the script shows: a table of all images, and pictures and maps of the telling ones."""
    run = material.run
    table = run.image_table.slice(0, MOST_ROWS)
    return {
        "detectors": [printable_line(name) for name in material.tables.detectors],
        "classes": [printable_line(name) for name in run.classes],
        "labelled": material.tables.labelled,
        "probable": printable_line(run.classes[material.positive_class]),
        "columns": [{"key": score.key, "name": score.name} for score in material.tables.columns],
        "images": {
            "id": [printable_line(v) for v in table["image_id"].to_pylist()],
            "label": [printable_line(v or "-") for v in table["label"].to_pylist()],
            "source": [printable_line(v) for v in table["source"].to_pylist()],
        },
        "values": [_values(material, detector, len(table)) for detector in material.tables.detectors],
        "shown": [_shown(material, image) for image in dict.fromkeys(t.image for t in material.telling)],
        "telling": [{**t._asdict(), "value": _rounded([t.value])[0]} for t in material.telling],
        "conditions": [condition_words(condition.name) for condition in material.conditions()],
        "palette": (colormap(np.linspace(0, 1, 32))[:, :3] * 255).round().astype(int).ravel().tolist(),
    }


def _values(material: Material, detector: str, num_images: int) -> dict[str, Any]:
    """Columns of the table of images for one detector."""
    rows = material.scores[material.scores.detector == detector].iloc[:num_images]
    return {
        "predicted": [int(v) for v in rows.predicted],
        "probability": _rounded(rows.probability),
        "kept": _rounded(rows.kept),
        "dead": [int(v) for v in material.dead[detector][:num_images]],
        "scores": [_rounded(rows[score.key]) for score in material.tables.columns],
    }


def _shown(material: Material, image: int) -> dict[str, Any]:
    """Picture and maps of one image."""
    pixels = material.pixels(image)
    row = material.run.image_table.slice(image, 1).to_pylist()[0]
    return {
        "image": image,
        "id": material.image_name(image),
        "label": printable_line(row["label"] or "-"),
        "source": printable_line(row["source"]),
        "picture": None if pixels is None else picture(pixels),
        "maps": [_maps(material, detector, image) for detector in material.tables.detectors],
    }


def _maps(material: Material, detector: str, image: int) -> list[dict[str, Any] | None]:
    """Maps of one image by each run of a detector: of the first run under all conditions, of the others clean."""
    runs: list[dict[str, Any] | None] = []
    for number, model in enumerate(material.run.models_of(detector)):
        part = material.part(detector, image, number)
        if part is None:
            runs.append(None)
            continue
        maps = part.maps[:, 0] if number == 0 else part.maps[part.of(CLEAN)]
        cells = [map_cells(salience) for salience in maps]
        coded = base64.b64encode(b"".join(values for values, _ in cells)).decode()
        predicted = [int(v) for v in part.predicted[: len(cells), 0]]
        name, size = printable_line(model.run), list(cells[0][1])
        runs.append({"run": name, "size": size, "cells": coded, "predicted": predicted})
    return runs


def map_cells(salience: np.ndarray) -> tuple[bytes, tuple[int, int]]:
    """A map as bytes 1..255 scaled min-max, 0 throughout where it is dead."""
    salience = np.asarray(salience, dtype=np.float64)
    height, width = salience.shape
    if max(height, width) > MOST_CELLS:
        size = (min(width, MOST_CELLS), min(height, MOST_CELLS))
        salience = np.asarray(Image.fromarray(salience.astype(np.float32)).resize(size, Image.Resampling.BOX))
        height, width = salience.shape
    if not np.isfinite(salience).all() or salience.max() <= 0:
        return bytes(salience.size), (height, width)
    low, high = salience.min(), salience.max()
    scaled = (salience - low) / (high - low) if high > low else np.ones_like(salience)
    return (1 + (254 * scaled).round()).astype(np.uint8).tobytes(), (height, width)


def picture(pixels: np.ndarray) -> str:
    """uint8 (3, H, W) as a small WebP in a data URI."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return webp_uri(image, quality=70)


def webp_uri(image: Image.Image, *, quality: int) -> str:
    """A picture as WebP in a data URI."""
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=quality, method=4)
    return data_uri("image/webp", stream.getvalue())


def data_uri(kind: str, data: bytes) -> str:
    """A file as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _rounded(values: Any) -> list[float | None]:
    return [None if value is None or math.isnan(value) else round(float(value), 3) for value in values]
