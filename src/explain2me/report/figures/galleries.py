"""Figures of images with their maps."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
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
from explain2me.run.conditions import Condition, perturb
from explain2me.text import printable_line

MOST_ROWS = 6


def mean_maps(material: Material, colormap: Colormap) -> Drawn | None:
    """Mean clean map by detector and source: each map scaled to the sum 1 first; one scale for all."""
    keys = [(stretch.label, stretch.source) for stretch in material.stretches]
    names = material.source_names()
    if not material.clean:
        return None
    figure = Figure(figsize=(1.25 * len(keys) + 1.6, 1.3 * len(material.detectors) + 0.5))
    panels = figure.subplots(len(material.detectors), len(keys), squeeze=False)
    # maps of different detectors may have different numbers of cells: what is shown is the multiple of an even share
    scaled = {key: found * found.size for key, found in material.clean.items()}
    highest = max(float(found.max()) for found in scaled.values())
    shown, said = None, []
    for d, detector in enumerate(material.detectors):
        for k, (label, source) in enumerate(keys):
            ax = panels[d, k]
            hide_axes(ax)
            found = scaled.get((detector, label, source))
            if found is not None:
                shown = ax.imshow(found, cmap=colormap, vmin=0, vmax=highest)
                row, column = np.unravel_index(found.argmax(), found.shape)
                said.append(
                    f"{printable_line(detector)} on {printable_line(source)}: peak in row {row + 1} of {found.shape[0]}, "
                    f"column {column + 1} of {found.shape[1]}"
                )
            if d == 0:
                ax.set_title(wrapped(names[k], 12), fontsize=8)
        panels[d, 0].set_ylabel(wrapped(detector), fontsize=8)
    if shown is not None:
        figure.colorbar(shown, ax=panels.ravel().tolist(), shrink=0.8, label="times an even share")
    return Drawn("mean-maps", "Where each detector looks on average, by source", f"{'; '.join(said)}.", figure)


def entropy_gallery(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 2: images whose maps are focused and spread, with the map of each detector."""
    return _gallery(material, colormap, "entropy", "fig2-entropy", "Focused and spread maps")


def focus_gallery(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 7: an image, the salient region blurred and the rest blurred, each with its map."""
    telling = _images(material, "focus_salient", 2)
    if not telling or not material.run.config.measures.focus:
        return None
    conditions = [c for c in material.conditions() if c.measure == "focus"]
    return _perturbed_gallery(material, colormap, telling, conditions, "fig7-focus", "What blurring by salience does")


def noise_gallery(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 3: an image under each level of noise, with its map."""
    telling = _images(material, "noise", 1)
    conditions = [c for c in material.conditions() if c.measure == "noise"][:8]
    if not telling or not conditions:
        return None
    return _perturbed_gallery(material, colormap, telling, conditions, "fig3-noise", "What noise does to a map")


def transform_gallery(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 5: the transformed image, its map over it, and the map moved back, for each of the 12 transforms."""
    telling = _images(material, "resilience", 1)
    conditions = [c for c in material.conditions() if c.measure == "resilience"]
    if not telling or not conditions:
        return None
    image, detector = telling[0], material.detectors[0]
    part, pixels = material.part(detector, image), input_pixels(material, image)
    if part is None or pixels is None:
        return None
    figure = Figure(figsize=(12 * 0.95 + 1, 3 * 0.98 + 0.6))
    panels = figure.subplots(3, 12, squeeze=False)
    changed = _perturbed(material, detector, image, pixels, conditions)
    for column, condition in enumerate(conditions):
        found = enlarged(part.maps[part.of(condition.name)][0], pixels.shape[1:])
        back = TRANSFORMS[condition.kind].undo(torch.from_numpy(found)[None])[0].numpy()
        for ax, background, overlay in zip(
            panels[:, column], (changed[condition.name],) * 2 + (pixels,), (None, found, back), strict=True
        ):
            show_overlay(ax, background, overlay, colormap)
        panels[0, column].set_title(condition.kind.replace("_", "\n"), fontsize=7)
    for ax, name in zip(panels[:, 0], ("image", "map", "moved back"), strict=True):
        ax.set_ylabel(name, fontsize=8)
    text = f"Image {material.image_name(image)} under 12 shifts, flips and rotations, with the maps of {printable_line(detector)}."
    return Drawn("fig5-transforms", "Maps of transformed images, and moved back", text, figure)


def runs_gallery(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 6: the clean maps of all runs of each detector for one image."""
    telling = _images(material, "stability", 1) or [telling.image for telling in material.telling[:1]]
    if not telling or max(len(material.run.models_of(name)) for name in material.detectors) < 2:
        return None
    image = telling[0]
    pixels = input_pixels(material, image)
    columns = min(10, max(len(material.run.models_of(name)) for name in material.detectors))
    figure = Figure(figsize=(1.1 * columns + 1.2, 1.15 * len(material.detectors) + 0.6))
    panels = figure.subplots(len(material.detectors), columns, squeeze=False)
    for line, detector in zip(panels, material.detectors, strict=True):
        for ax in line:
            hide_axes(ax)
            ax.set_frame_on(False)
        for run, ax in zip(range(len(material.run.models_of(detector))), line, strict=False):
            part = material.part(detector, image, run)
            if part is not None:
                show_overlay(ax, pixels, enlarged(part.maps[part.of("clean")][0], size_of(material, pixels)), colormap)
            ax.set_title(safe(material.run.models_of(detector)[run].run, 12), fontsize=7)
        line[0].set_ylabel(wrapped(detector), fontsize=8)
    text = f"Maps of every training run for image {material.image_name(image)}: the more alike a row, the more stable."
    return Drawn("fig6-runs", "One image, every training run", text, figure)


def samples(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 8: some images of each source."""
    per_source = 6
    figure = Figure(figsize=(1.05 * per_source + 1.2, 1.1 * len(material.stretches) + 0.2))
    panels = figure.subplots(len(material.stretches), per_source, squeeze=False)
    for line, stretch, name in zip(panels, material.stretches, material.source_names(), strict=True):
        for ax in line:
            hide_axes(ax)
            ax.set_frame_on(False)
        some = np.unique(np.linspace(stretch.start, stretch.stop - 1, per_source).astype(int))
        for ax, image in zip(line, some, strict=False):
            pixels = input_pixels(material, int(image))
            if pixels is not None:
                show_overlay(ax, pixels, None, colormap)
        line[0].set_ylabel(wrapped(name), fontsize=8)
    names = ", ".join(f"{printable_line(s.source)} ({s.stop - s.start})" for s in material.stretches)
    return Drawn("fig8-samples", "Images of each source", f"Sample images of each source: {names}.", figure)


def _images(material: Material, score: str, count: int) -> list[int]:
    """Images that are telling in a score, those where detectors differ first."""
    order = {"most different": 0, "lowest": 1, "highest": 2}
    found = sorted((t for t in material.telling if t.score == score), key=lambda t: order.get(t.why, 3))
    return list(dict.fromkeys(t.image for t in found))[:count]


def _gallery(material: Material, colormap: Colormap, score: str, name: str, title: str) -> Drawn | None:
    """Images from low to high in a score: each with the map of each detector (its first run) over it and its mean score."""
    telling = [t for t in material.telling if t.score == score and t.why in ("lowest", "highest")]
    images = list(dict.fromkeys(t.image for t in telling))
    if not images:
        return None
    values: Any = material.scores.pivot(index="image", columns="detector", values=score)
    images = sorted(images, key=lambda image: float(values.loc[image].mean()))
    images = images if len(images) <= MOST_ROWS else images[: MOST_ROWS // 2] + images[-MOST_ROWS // 2 :]
    columns = 1 + len(material.detectors)
    figure = Figure(figsize=(1.5 * columns + 0.2, 1.6 * len(images) + 0.4))
    panels = figure.subplots(len(images), columns, squeeze=False)
    for line, image in zip(panels, images, strict=True):
        pixels = input_pixels(material, image)
        show_overlay(line[0], pixels, None, colormap)
        for ax, detector in zip(line[1:], material.detectors, strict=True):
            part = material.part(detector, image)
            overlay = None if part is None else enlarged(part.maps[part.of("clean")][0], size_of(material, pixels))
            show_overlay(ax, pixels, overlay, colormap)
            value = values.loc[image, detector]
            ax.set_xlabel("dead" if math.isnan(value) else f"{value:.2f}", fontsize=8)
    for ax, label in zip(panels[0], ("image", *material.detectors), strict=True):
        ax.set_title(wrapped(label), fontsize=8)
    text = (
        f"Images {', '.join(material.image_name(i) for i in images)} from low to high, with the map of each detector's first "
        f"run; below it the score, mean over runs."
    )
    return Drawn(name, title, text, figure)


def _perturbed_gallery(
    material: Material,
    colormap: Colormap,
    images: Sequence[int],
    conditions: Sequence[Condition],
    name: str,
    title: str,
) -> Drawn | None:
    """Rows: an image and detector; columns: clean and each condition, the perturbed image above its map."""
    usable = [(image, pixels) for image in images if (pixels := input_pixels(material, image)) is not None]
    if not usable:
        return None
    detectors = material.detectors[:4]
    figure = Figure(figsize=(1.35 * (1 + len(conditions)) + 0.6, 1.4 * len(usable) * (1 + len(detectors)) + 0.4))
    panels = figure.subplots(len(usable) * (1 + len(detectors)), 1 + len(conditions), squeeze=False)
    for n, (image, pixels) in enumerate(usable):
        block = panels[n * (1 + len(detectors)) : (n + 1) * (1 + len(detectors))]
        for d, detector in enumerate(detectors):
            part = material.part(detector, image)
            if part is None:
                continue
            changed = {"clean": pixels} | _perturbed(material, detector, image, pixels, conditions)
            for column, (condition, background) in enumerate(changed.items()):
                if d == 0:
                    show_overlay(block[0, column], background, None, colormap)
                found = part.maps[part.of(condition)][0]
                overlay = enlarged(found, pixels.shape[1:]) if np.isfinite(found).all() else None
                show_overlay(block[1 + d, column], background, overlay, colormap)
            block[1 + d, 0].set_ylabel(wrapped(detector), fontsize=7)
        block[0, 0].set_ylabel(
            f"image, blurred by\n{wrapped(detectors[0])}" if "focus" in name else "image", fontsize=7
        )
    for ax, label in zip(panels[0], ("clean", *(c.name for c in conditions)), strict=True):
        ax.set_title(
            label.replace("focus_salient", "salient\nblurred").replace("focus_nonsalient", "rest\nblurred"), fontsize=8
        )
    text = (
        f"Images {', '.join(material.image_name(i) for i, _ in usable)} under {', '.join(c.name for c in conditions)}."
    )
    return Drawn(name, title, text, figure)


def _perturbed(
    material: Material, detector: str, image: int, pixels: UInt8[np.ndarray, "3 H W"], conditions: Sequence[Condition]
) -> dict[str, UInt8[np.ndarray, "3 H W"]]:
    """The image under each condition, as a detector with the input size of ``pixels`` was shown it."""
    part = material.part(detector, image)
    assert part is not None
    clean = torch.from_numpy(part.maps[part.of("clean")])
    ids = [material.run.image_table["image_id"][image].as_py()]
    batch = torch.from_numpy(pixels)[None]
    wanted = {condition.name for condition in conditions}
    both = [c for c in material.conditions() if c.name in wanted]
    changed = perturb(batch, both, clean_maps=torch.nan_to_num(clean), seed=material.run.config.seed, ids=ids)
    return {condition.name: found[0].numpy() for condition, found in changed}
