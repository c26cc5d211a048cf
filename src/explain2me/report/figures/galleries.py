"""Figures of images with their maps."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import Colormap

from explain2me.measures import TRANSFORMS
from explain2me.report.figures.drawing import (
    Drawn,
    distinct,
    enlarged,
    hide_axes,
    panel_grid,
    show_overlay,
    wrapped,
)
from explain2me.report.material import Material
from explain2me.report.summary import condition_words, score_of
from explain2me.run.conditions import Condition, perturb
from explain2me.run.parts import Part
from explain2me.statistics.scores import CLEAN, FigureRow, Measure
from explain2me.text import printable_line

MOST_ROWS = 6
MOST_CONDITIONS = 8
MOST_DETECTORS = 4
Pixels = UInt8[np.ndarray, "3 H W"]


def mean_maps(material: Material, colormap: Colormap) -> Drawn | None:
    """Mean clean map by detector and source: each map scaled to the sum 1 first; one scale for all."""
    if not material.clean:
        return None
    tables = material.tables
    names, num_rows = tables.source_names(), len(tables.detectors)
    figure, panels = panel_grid(num_rows, len(names), width=1.25 * len(names) + 1.6, height=1.3 * num_rows + 0.5)
    # maps of different detectors may have different numbers of cells, so each cell is a multiple of an even share
    scaled = {key: mean * mean.size for key, mean in material.clean.items()}
    highest = max(float(mean.max()) for mean in scaled.values())
    shown, texts = None, []
    for line, detector in zip(panels, tables.detectors, strict=True):
        for ax, stretch in zip(line, tables.stretches, strict=True):
            hide_axes(ax)
            mean = scaled.get((detector, stretch.label, stretch.source))
            if mean is None:
                continue
            shown = ax.imshow(mean, cmap=colormap, vmin=0, vmax=highest)
            row, column = np.unravel_index(mean.argmax(), mean.shape)
            texts.append(
                f"{printable_line(detector)} on {printable_line(stretch.source)}: peak in row {row + 1} of {mean.shape[0]}, "
                f"column {column + 1} of {mean.shape[1]}"
            )
        line[0].set_ylabel(wrapped(detector), fontsize=8)
    for ax, name in zip(panels[0], names, strict=True):
        ax.set_title(wrapped(name, 12), fontsize=8)
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
    columns, height = 1 + len(detectors), 1.6 * len(ordered) + 0.4
    figure, panels = panel_grid(len(ordered), columns, width=1.5 * columns + 0.2, height=height)
    for line, image in zip(panels, ordered, strict=True):
        pixels = material.pixels(image)
        show_overlay(line[0], pixels, None, colormap)
        for ax, detector in zip(line[1:], detectors, strict=True):
            show_overlay(ax, pixels, _clean_map(material, detector, image), colormap)
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
    usable = {image: pixels for image in images if (pixels := material.pixels(image)) is not None}
    if not usable or not conditions:
        return None
    detectors = material.tables.detectors[:MOST_DETECTORS]
    lines, columns = len(usable) * (1 + len(detectors)), 1 + len(conditions)
    figure, panels = panel_grid(lines, columns, width=1.35 * columns + 0.6, height=1.4 * lines + 0.4)
    owner = f", {measure.by_map} by\n{wrapped(detectors[0])}" if measure.by_map else ""
    for block, (image, pixels) in zip(np.split(panels, len(usable)), usable.items(), strict=True):
        block[0, 0].set_ylabel(f"image{owner}", fontsize=7)
        for line, detector in zip(block[1:], detectors, strict=True):
            line[0].set_ylabel(wrapped(detector), fontsize=7)
            part = material.part(detector, image)
            if part is None:
                continue
            backgrounds = {CLEAN: pixels} | _perturbed_images(material, part, image, pixels, conditions)
            _show_conditions(line, part, backgrounds, colormap)
            if detector == detectors[0]:
                for ax, background in zip(block[0], backgrounds.values(), strict=True):
                    show_overlay(ax, background, None, colormap)
    for ax, label in zip(panels[0], (CLEAN, *(_short(c.name) for c in conditions)), strict=True):
        ax.set_title(label, fontsize=8)
    names = ", ".join(map(material.image_name, usable))
    text = f"Images {names} under {', '.join(condition_words(c.name) for c in conditions)}."
    return Drawn(row.file, row.title, text, figure)


def transforms(material: Material, colormap: Colormap, *, measure: Measure, row: FigureRow) -> Drawn | None:
    """Fig. 5: the transformed image, its map over it, and the map moved back, for each transform."""
    images = _images(material, measure, 1)
    conditions = _conditions(material, measure)
    if not images or not conditions:
        return None
    image, detector = images[0], material.tables.detectors[0]
    part, pixels = material.part(detector, image), material.pixels(image)
    if part is None or pixels is None:
        return None
    figure, panels = panel_grid(3, len(conditions), width=len(conditions) * 0.95 + 1, height=3 * 0.98 + 0.6)
    transformed = _perturbed_images(material, part, image, pixels, conditions)
    for column, condition in zip(panels.T, conditions, strict=True):
        salience = enlarged(part.maps[part.of(condition.name)][0], pixels.shape[1:])
        back = TRANSFORMS[condition.kind].undo(torch.from_numpy(salience)[None])[0].numpy()
        changed = transformed[condition.name]
        layers = ((changed, None), (changed, salience), (pixels, back))
        for ax, (background, overlay) in zip(column, layers, strict=True):
            show_overlay(ax, background, overlay, colormap)
        column[0].set_title(condition.kind.replace("_", "\n"), fontsize=7)
    for ax, name in zip(panels[:, 0], ("image", "map", "moved back"), strict=True):
        ax.set_ylabel(name, fontsize=8)
    names = ", ".join(measure.groups)
    text = f"Image {material.image_name(image)} under {len(conditions)} transforms ({names}), with the maps of {printable_line(detector)}."
    return Drawn(row.file, row.title, text, figure)


def runs(material: Material, colormap: Colormap, *, measure: Measure, row: FigureRow) -> Drawn | None:
    """Fig. 6: the clean maps of all runs of each detector for one image."""
    images = _images(material, measure, 1) or [telling.image for telling in material.telling[:1]]
    detectors = material.tables.detectors
    most_runs = max(len(material.run.models_of(name)) for name in detectors)
    if not images or most_runs < 2:
        return None
    image, pixels = images[0], material.pixels(images[0])
    columns, height = min(10, most_runs), 1.15 * len(detectors) + 0.6
    figure, panels = panel_grid(len(detectors), columns, width=1.1 * columns + 1.2, height=height)
    for line, detector in zip(panels, detectors, strict=True):
        for ax in line:
            hide_axes(ax)
            ax.set_frame_on(False)
        names = distinct([model.run for model in material.run.models_of(detector)], 12)
        for number, (name, ax) in enumerate(zip(names, line, strict=False)):
            salience = _clean_map(material, detector, image, run=number)
            if salience is not None:
                show_overlay(ax, pixels, salience, colormap)
            ax.set_title(name, fontsize=7)
        line[0].set_ylabel(wrapped(detector), fontsize=8)
    text = f"Maps of every training run for image {material.image_name(image)}: the more alike a row, the more stable."
    return Drawn(row.file, row.title, text, figure)


def samples(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 8: some images of each source."""
    per_source, stretches = 6, material.tables.stretches
    width, height = 1.05 * per_source + 1.2, 1.1 * len(stretches) + 0.2
    figure, panels = panel_grid(len(stretches), per_source, width=width, height=height)
    for line, stretch, name in zip(panels, stretches, material.tables.source_names(), strict=True):
        for ax in line:
            hide_axes(ax)
            ax.set_frame_on(False)
        some = np.unique(np.linspace(stretch.start, stretch.stop - 1, per_source).astype(int))
        for ax, image in zip(line, some, strict=False):
            show_overlay(ax, material.pixels(int(image)), None, colormap)
        line[0].set_ylabel(wrapped(name), fontsize=8)
    names = ", ".join(f"{printable_line(s.source)} ({s.stop - s.start})" for s in stretches)
    return Drawn("fig8-samples", "Images of each source", f"Sample images of each source: {names}.", figure)


def _images(material: Material, measure: Measure, count: int) -> list[int]:
    """Images that are telling in the first score of a measure, those where detectors differ first."""
    order = {"most different": 0, "lowest": 1, "highest": 2}
    telling = [t for t in material.telling if t.score == measure.scores[0].key]
    return list(dict.fromkeys(t.image for t in sorted(telling, key=lambda t: order.get(t.why, 3))))[:count]


def _conditions(material: Material, measure: Measure) -> list[Condition]:
    names = set(material.tables.conditions_of(measure)) - {CLEAN}
    return [condition for condition in material.conditions() if condition.name in names]


def _clean_map(material: Material, detector: str, image: int, *, run: int = 0) -> Float[np.ndarray, "H W"] | None:
    """The clean map of one run at the size of the image; None where there is no map."""
    part = material.part(detector, image, run)
    size = material.run.models[0].input_size
    return None if part is None else enlarged(part.maps[part.of(CLEAN)][0], size)


def _show_conditions(line: Sequence[Axes], part: Part, backgrounds: Mapping[str, Pixels], colormap: Colormap) -> None:
    """The map under each condition over the image that was explained, without a map that is not finite."""
    for ax, (condition, background) in zip(line, backgrounds.items(), strict=True):
        salience = part.maps[part.of(condition)][0]
        overlay = enlarged(salience, background.shape[1:]) if np.isfinite(salience).all() else None
        show_overlay(ax, background, overlay, colormap)


def _short(condition: str) -> str:
    """A heading of a column: the words of a score after the name of its measure, or the condition as it is."""
    score = score_of(condition)
    return score.label.partition(", ")[2].replace(" ", "\n") if score and ", " in score.label else condition


def _perturbed_images(
    material: Material, part: Part, image: int, pixels: Pixels, conditions: Sequence[Condition]
) -> dict[str, Pixels]:
    """The image under each condition, as the detector of ``part`` with the input size of ``pixels`` was shown it."""
    clean = torch.nan_to_num(torch.from_numpy(part.maps[part.of(CLEAN)]))
    ids = [material.run.image_table["image_id"][image].as_py()]
    batch = torch.from_numpy(pixels)[None]
    images = perturb(batch, conditions, clean_maps=clean, seed=material.run.config.seed, ids=ids)
    return {condition.name: changed[0].numpy() for condition, changed in images}
