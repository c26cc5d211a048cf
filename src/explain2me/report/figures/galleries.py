"""Figures of images with their maps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from explain2me.measures import TRANSFORMS
from explain2me.report.figures.drawing import (
    Drawn,
    enlarged,
    hide_axes,
    input_pixels,
    safe,
    show_overlay,
    size_of,
    wrapped,
)
from explain2me.report.material import Material
from explain2me.report.summary import condition_words, score_of
from explain2me.run.conditions import Condition, perturb
from explain2me.statistics.scores import CLEAN, FigureRow, Measure
from explain2me.text import printable_line

MOST_ROWS = 6
MOST_CONDITIONS = 8
MOST_DETECTORS = 4
Pixels = UInt8[np.ndarray, "3 H W"]


def mean_maps(material: Material, colormap: Colormap) -> Drawn | None:
    """Mean clean map by detector and source: each map scaled to the sum 1 first; one scale for all."""
    keys = [(stretch.label, stretch.source) for stretch in material.tables.stretches]
    names = material.tables.source_names()
    if not material.clean:
        return None
    figure = Figure(figsize=(1.25 * len(keys) + 1.6, 1.3 * len(material.tables.detectors) + 0.5))
    panels = figure.subplots(len(material.tables.detectors), len(keys), squeeze=False)
    # maps of different detectors may have different numbers of cells, so each cell is a multiple of an even share
    scaled = {key: mean * mean.size for key, mean in material.clean.items()}
    highest = max(float(mean.max()) for mean in scaled.values())
    shown, texts = None, []
    for d, detector in enumerate(material.tables.detectors):
        for k, (label, source) in enumerate(keys):
            ax = panels[d, k]
            hide_axes(ax)
            mean = scaled.get((detector, label, source))
            if mean is not None:
                shown = ax.imshow(mean, cmap=colormap, vmin=0, vmax=highest)
                row, column = np.unravel_index(mean.argmax(), mean.shape)
                texts.append(
                    f"{printable_line(detector)} on {printable_line(source)}: peak in row {row + 1} of {mean.shape[0]}, "
                    f"column {column + 1} of {mean.shape[1]}"
                )
            if d == 0:
                ax.set_title(wrapped(names[k], 12), fontsize=8)
        panels[d, 0].set_ylabel(wrapped(detector), fontsize=8)
    if shown is not None:
        figure.colorbar(shown, ax=panels.ravel().tolist(), shrink=0.8, label="times an even share")
    return Drawn("mean-maps", "Where each detector looks on average, by source", f"{'; '.join(texts)}.", figure)


def extremes(material: Material, colormap: Colormap, *, measure: Measure, row: FigureRow) -> Drawn | None:
    """Fig. 2: images from low to high in a score, each with the map of each detector's first run and its mean score."""
    score = measure.scores[0].key
    images = dict.fromkeys(t.image for t in material.telling if t.score == score and t.why in ("lowest", "highest"))
    if not images:
        return None
    values: Any = material.scores.pivot(index="image", columns="detector", values=score)
    ordered = sorted(images, key=lambda image: float(values.loc[image].mean()))
    if len(ordered) > MOST_ROWS:
        ordered = ordered[: MOST_ROWS // 2] + ordered[-MOST_ROWS // 2 :]
    detectors = material.tables.detectors
    columns = 1 + len(detectors)
    figure = Figure(figsize=(1.5 * columns + 0.2, 1.6 * len(ordered) + 0.4))
    panels = figure.subplots(len(ordered), columns, squeeze=False)
    for line, image in zip(panels, ordered, strict=True):
        pixels = input_pixels(material, image)
        show_overlay(line[0], pixels, None, colormap)
        for ax, detector in zip(line[1:], detectors, strict=True):
            _show_clean(ax, material, detector, image, pixels, colormap)
            value = values.loc[image, detector]
            ax.set_xlabel("dead" if math.isnan(value) else f"{value:.2f}", fontsize=8)
    for ax, label in zip(panels[0], ("image", *detectors), strict=True):
        ax.set_title(wrapped(label), fontsize=8)
    text = (
        f"Images {', '.join(material.image_name(i) for i in ordered)} from low to high, with the map of each detector's first "
        f"run; below it the score, mean over runs."
    )
    return Drawn(row.file, row.title, text, figure)


def perturbed(material: Material, colormap: Colormap, *, measure: Measure, row: FigureRow) -> Drawn | None:
    """Fig. 3 and 7: rows: an image, and each detector; columns: clean and each condition, the map over the perturbed image."""
    conditions = _conditions(material, measure)[:MOST_CONDITIONS]
    images = _images(material, measure, 1 if measure.has_levels else 2)
    usable = [(image, pixels) for image in images if (pixels := input_pixels(material, image)) is not None]
    if not usable or not conditions:
        return None
    detectors = material.tables.detectors[:MOST_DETECTORS]
    height = 1 + len(detectors)
    figure = Figure(figsize=(1.35 * (1 + len(conditions)) + 0.6, 1.4 * len(usable) * height + 0.4))
    panels = figure.subplots(len(usable) * height, 1 + len(conditions), squeeze=False)
    for n, (image, pixels) in enumerate(usable):
        block = panels[n * height : (n + 1) * height]
        for d, detector in enumerate(detectors):
            _show_perturbed(
                block[1 + d], block[0] if d == 0 else None, material, detector, image, pixels, conditions, colormap
            )
        owner = f", {measure.by_map} by\n{wrapped(detectors[0])}" if measure.by_map else ""
        block[0, 0].set_ylabel(f"image{owner}", fontsize=7)
    for ax, label in zip(panels[0], (CLEAN, *(_short(c.name) for c in conditions)), strict=True):
        ax.set_title(label, fontsize=8)
    names = ", ".join(material.image_name(i) for i, _ in usable)
    text = f"Images {names} under {', '.join(condition_words(c.name) for c in conditions)}."
    return Drawn(row.file, row.title, text, figure)


def transforms(material: Material, colormap: Colormap, *, measure: Measure, row: FigureRow) -> Drawn | None:
    """Fig. 5: the transformed image, its map over it, and the map moved back, for each transform."""
    images = _images(material, measure, 1)
    conditions = _conditions(material, measure)
    if not images or not conditions:
        return None
    image, detector = images[0], material.tables.detectors[0]
    part, pixels = material.part(detector, image), input_pixels(material, image)
    if part is None or pixels is None:
        return None
    figure = Figure(figsize=(len(conditions) * 0.95 + 1, 3 * 0.98 + 0.6))
    panels = figure.subplots(3, len(conditions), squeeze=False)
    transformed = _perturbed_images(material, detector, image, pixels, conditions)
    for column, condition in enumerate(conditions):
        salience = enlarged(part.maps[part.of(condition.name)][0], pixels.shape[1:])
        back = TRANSFORMS[condition.kind].undo(torch.from_numpy(salience)[None])[0].numpy()
        changed = transformed[condition.name]
        layers = ((changed, None), (changed, salience), (pixels, back))
        for ax, (background, overlay) in zip(panels[:, column], layers, strict=True):
            show_overlay(ax, background, overlay, colormap)
        panels[0, column].set_title(condition.kind.replace("_", "\n"), fontsize=7)
    for ax, name in zip(panels[:, 0], ("image", "map", "moved back"), strict=True):
        ax.set_ylabel(name, fontsize=8)
    names = ", ".join(measure.groups)
    text = f"Image {material.image_name(image)} under {len(conditions)} transforms ({names}), with the maps of {printable_line(detector)}."
    return Drawn(row.file, row.title, text, figure)


def runs(material: Material, colormap: Colormap, *, measure: Measure, row: FigureRow) -> Drawn | None:
    """Fig. 6: the clean maps of all runs of each detector for one image."""
    images = _images(material, measure, 1) or [telling.image for telling in material.telling[:1]]
    most_runs = max(len(material.run.models_of(name)) for name in material.tables.detectors)
    if not images or most_runs < 2:
        return None
    image = images[0]
    pixels = input_pixels(material, image)
    columns = min(10, most_runs)
    figure = Figure(figsize=(1.1 * columns + 1.2, 1.15 * len(material.tables.detectors) + 0.6))
    panels = figure.subplots(len(material.tables.detectors), columns, squeeze=False)
    for line, detector in zip(panels, material.tables.detectors, strict=True):
        for ax in line:
            hide_axes(ax)
            ax.set_frame_on(False)
        for number, (model, ax) in enumerate(zip(material.run.models_of(detector), line, strict=False)):
            if material.part(detector, image, number) is not None:
                _show_clean(ax, material, detector, image, pixels, colormap, run=number)
            ax.set_title(safe(model.run, 12), fontsize=7)
        line[0].set_ylabel(wrapped(detector), fontsize=8)
    text = f"Maps of every training run for image {material.image_name(image)}: the more alike a row, the more stable."
    return Drawn(row.file, row.title, text, figure)


def samples(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 8: some images of each source."""
    per_source = 6
    figure = Figure(figsize=(1.05 * per_source + 1.2, 1.1 * len(material.tables.stretches) + 0.2))
    panels = figure.subplots(len(material.tables.stretches), per_source, squeeze=False)
    for line, stretch, name in zip(panels, material.tables.stretches, material.tables.source_names(), strict=True):
        for ax in line:
            hide_axes(ax)
            ax.set_frame_on(False)
        some = np.unique(np.linspace(stretch.start, stretch.stop - 1, per_source).astype(int))
        for ax, image in zip(line, some, strict=False):
            pixels = input_pixels(material, int(image))
            if pixels is not None:
                show_overlay(ax, pixels, None, colormap)
        line[0].set_ylabel(wrapped(name), fontsize=8)
    names = ", ".join(f"{printable_line(s.source)} ({s.stop - s.start})" for s in material.tables.stretches)
    return Drawn("fig8-samples", "Images of each source", f"Sample images of each source: {names}.", figure)


def _images(material: Material, measure: Measure, count: int) -> list[int]:
    """Images that are telling in the first score of a measure, those where detectors differ first."""
    order = {"most different": 0, "lowest": 1, "highest": 2}
    telling = [t for t in material.telling if t.score == measure.scores[0].key]
    return list(dict.fromkeys(t.image for t in sorted(telling, key=lambda t: order.get(t.why, 3))))[:count]


def _conditions(material: Material, measure: Measure) -> list[Condition]:
    names = set(material.tables.conditions_of(measure)) - {CLEAN}
    return [condition for condition in material.conditions() if condition.name in names]


def _show_clean(
    ax: Axes, material: Material, detector: str, image: int, pixels: Pixels | None, colormap: Colormap, *, run: int = 0
) -> None:
    """The clean map of one run over the image; the image alone where there is no map."""
    part = material.part(detector, image, run)
    overlay = None if part is None else enlarged(part.maps[part.of(CLEAN)][0], size_of(material, pixels))
    show_overlay(ax, pixels, overlay, colormap)


def _show_perturbed(
    line: Sequence[Axes],
    above: Sequence[Axes] | None,
    material: Material,
    detector: str,
    image: int,
    pixels: Pixels,
    conditions: Sequence[Condition],
    colormap: Colormap,
) -> None:
    """A line of maps of one detector over the perturbed images, and the images alone in the line above where it is given."""
    line[0].set_ylabel(wrapped(detector), fontsize=7)
    part = material.part(detector, image)
    if part is None:
        return
    backgrounds = {CLEAN: pixels} | _perturbed_images(material, detector, image, pixels, conditions)
    for column, (condition, background) in enumerate(backgrounds.items()):
        if above is not None:
            show_overlay(above[column], background, None, colormap)
        salience = part.maps[part.of(condition)][0]
        overlay = enlarged(salience, pixels.shape[1:]) if np.isfinite(salience).all() else None
        show_overlay(line[column], background, overlay, colormap)


def _short(condition: str) -> str:
    """A heading of a column: the words of a score after the name of its measure, or the condition as it is."""
    score = score_of(condition)
    return score.label.partition(", ")[2].replace(" ", "\n") if score and ", " in score.label else condition


def _perturbed_images(
    material: Material, detector: str, image: int, pixels: Pixels, conditions: Sequence[Condition]
) -> dict[str, Pixels]:
    """The image under each condition, as a detector with the input size of ``pixels`` was shown it."""
    part = material.part(detector, image)
    assert part is not None
    clean = torch.from_numpy(part.maps[part.of(CLEAN)])
    ids = [material.run.image_table["image_id"][image].as_py()]
    names = {condition.name for condition in conditions}
    chosen = [condition for condition in material.conditions() if condition.name in names]
    batch = torch.from_numpy(pixels)[None]
    images = perturb(batch, chosen, clean_maps=torch.nan_to_num(clean), seed=material.run.config.seed, ids=ids)
    return {condition.name: changed[0].numpy() for condition, changed in images}
