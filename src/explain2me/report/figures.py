"""Every figure of the paper and some beyond it, from one code for page, PDF, SVG and PNG. Each returns None if it has no data.

``Drawn.text`` says in words what a figure shows, for people who do not see it.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import roc_curve

from explain2me.conditions import Condition, perturb
from explain2me.decode import printable_line
from explain2me.measures import TRANSFORMS
from explain2me.performance import ranking_score
from explain2me.report.material import ALL, BLURS, Material, Score, records

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F", "#8C564B", "#BCBD22")
"""Okabe and Ito's colours first: told apart by colour-blind readers."""
MARKERS = "osD^vPX*<>"
LINES: Any = ("-", "--", "-.", ":")
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "explain2me",
    "pdf.fonttype": 42,
}
MOST_ROWS = 6
MOST_NAME = 40
ALPHA = 0.55  # of a map over its image


class Drawn(NamedTuple):
    """A figure: ``name`` of its files, a ``title``, a ``text`` that says what it shows, and the figure itself."""

    name: str
    title: str
    text: str
    figure: Figure


Draw = Callable[[Material, Colormap], Drawn | None]


def radar(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 10: the five measures of each detector, all turned so that the rim is good.

    Axes: 1 - entropy; noise; resilience; focus = mean of 1 - (salient blurred) and (rest blurred); stability.
    """
    axes = radar_values(material)
    names = list(dict.fromkeys(axis for values in axes.values() for axis in values))
    if len(names) < 3:
        return None
    figure = Figure(figsize=(6.2, 4.6))
    ax = figure.add_subplot(projection="polar")
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    for i, detector in enumerate(material.detectors):
        values = [axes[detector].get(name, math.nan) for name in names]
        ring = np.append(values, values[0])
        ax.plot(
            np.append(angles, angles[0]), ring, color=_colour(i), linestyle=LINES[i % 4], marker=MARKERS[i % 10],
            markersize=4, label=safe(detector),
        )  # fmt: skip
        ax.fill(np.append(angles, angles[0]), np.nan_to_num(ring), color=_colour(i), alpha=0.06)
    ax.set_theta_zero_location("N")  # type: ignore[attr-defined]
    ax.set_rlabel_position(35)  # type: ignore[attr-defined]
    ax.set_xticks(angles, names)
    lowest = min((v for values in axes.values() for v in values.values() if not math.isnan(v)), default=0.0)
    ax.set_ylim(min(0.0, lowest), 1)
    ax.tick_params(axis="x", pad=8)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    said = "; ".join(
        f"{printable_line(detector)}: "
        + ", ".join(f"{name} {value:.2f}" for name, value in axes[detector].items() if not math.isnan(value))
        for detector in material.detectors
    )
    return Drawn("fig10-radar", "The five measures, the rim is good", f"Radar chart. {said}.", figure)


def radar_values(material: Material) -> dict[str, dict[str, float]]:
    """Value of each axis of Fig. 10 by detector."""
    found: dict[str, dict[str, float]] = {detector: {} for detector in material.detectors}
    rows = {
        score.key: material.totals(score.measure, score.variant, score.condition or ALL) for score in material.columns
    }
    for detector, values in found.items():
        mean = {key: by_detector[detector]["mean"] for key, by_detector in rows.items() if detector in by_detector}
        if "entropy" in mean:
            values["1 - entropy"] = 1 - mean["entropy"]
        for key in ("noise", "resilience"):
            if key in mean:
                values[key] = mean[key]
        if set(BLURS) <= set(mean):
            values["focus"] = (1 - mean["focus_salient"] + mean["focus_nonsalient"]) / 2
        if "stability" in mean:
            values["stability"] = mean["stability"]
    return found


def roc(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 9: ROC curves, mean over runs, for the images as they are and with the salient or the other region blurred."""
    positive = _positive(material)
    if positive is None:
        return None
    there = {condition for _, condition in material.logits}
    conditions = [name for name in ("clean", *BLURS) if name in there]
    if not conditions:
        return None
    figure = Figure(figsize=(3.1 * len(conditions) + 0.4, 3.8))
    panels = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
    grid = np.linspace(0, 1, 101)
    said = []
    titles = {"clean": "as they are", "focus_salient": "salient region blurred", "focus_nonsalient": "rest blurred"}
    for ax, condition in zip(panels, conditions, strict=True):
        ax.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
        for i, detector in enumerate(material.detectors):
            curves = _roc_curves(material, detector, condition, positive, grid)
            row = _auroc(material, detector, condition)
            if not curves or row is None:
                continue
            low, high = row["ci_low"], row["ci_high"]
            label = f"{row['auroc']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if not math.isnan(low) else "")
            before = _auroc(material, detector, "clean")
            if before is not None and row["n"] != before["n"]:  # dead maps drive no blur
                label += f"\n{row['n']} images, before {row['auroc_clean']:.3f}"
            ax.plot(grid, np.mean(curves, axis=0), color=_colour(i), linestyle=LINES[i % 4], label=label)
            said.append(f"{titles[condition]}, {printable_line(detector)}: AUROC {label.replace(chr(10), ', ')}")
        ax.set_title(titles[condition])
        ax.set_xlabel("false positive rate")
        ax.set_box_aspect(1)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(title="AUROC [95 %]", loc="lower right", fontsize=7, title_fontsize=7, frameon=False)
    panels[0].set_ylabel("true positive rate")
    _legend(figure, material.detectors)
    return Drawn("fig9-roc", "ROC curves before and after blurring by salience", f"{'; '.join(said)}.", figure)


def noise_curve(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 4: similarity to the clean map against the level of noise, with 95 % bands, and the chance level."""
    rows = material.measures
    rows = rows[(rows.measure == "noise") & (rows.label == ALL) & (rows.source == ALL) & material.main_similarity(rows)]
    if not len(rows):
        return None
    kinds = list(dict.fromkeys(name.partition("@")[0] for name in rows.condition))
    figure = Figure(figsize=(4.2 * len(kinds) + 0.6, 3.8))
    said = []
    for ax, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for i, detector in enumerate(material.detectors):
            for variant, width in (("predicted", 1.6), ("fixed", 0.8)):
                found = rows[(rows.detector == detector) & (rows.variant == variant)]
                found = found[found.condition.str.startswith(f"{kind}@") & found["mean"].notna()]
                if not len(found):
                    continue
                found = found.assign(level=found.condition.str.partition("@")[2].astype(float)).sort_values("level")
                style = {"color": _colour(i), "marker": MARKERS[i % 10], "markersize": 4, "linewidth": width}
                ax.plot(found.level, found["mean"], linestyle="-" if variant == "predicted" else "--", **style)
                if variant == "predicted":
                    if len(found) > 1:
                        ax.fill_between(found.level, found.ci_low, found.ci_high, color=_colour(i), alpha=0.15)
                    else:  # one level has no band: a bar, and a short line for chance
                        ax.vlines(found.level, found.ci_low, found.ci_high, color=_colour(i))
                    marker = {"marker": "_", "markersize": 14} if len(found) == 1 else {}
                    ax.plot(found.level, found.chance, color=_colour(i), linestyle=":", linewidth=0.8, **marker)
                    values = ", ".join(
                        f"{level:g}: {mean:.2f}" for level, mean in zip(found.level, found["mean"], strict=True)
                    )
                    said.append(f"{kind}, {printable_line(detector)}: {values}")
        ax.set_xlabel(f"level of {kind.replace('_', ' ')} noise")
        ax.set_ylabel("similarity to the clean map")
    _legend(figure, material.detectors, ("predicted class", "-"), ("fixed class", "--"), ("chance", ":"))
    return Drawn("fig4-noise", "Similarity of maps against the level of noise", f"{'; '.join(said)}.", figure)


def violins(material: Material, score: Score, colormap: Colormap) -> Drawn | None:
    """Values by image of one score: a violin a source and detector, its median as a line."""
    frame = material.scores
    groups = [
        (stretch, frame[(frame.image >= stretch.start) & (frame.image < stretch.stop)])
        for stretch in material.stretches
    ]
    figure = Figure(figsize=(max(4.5, 0.55 * len(groups) * len(material.detectors) + 1.5), 3.4))
    ax = figure.subplots()
    step = 0.8 / len(material.detectors)
    drawn = False
    for g, (_, rows) in enumerate(groups):
        for i, detector in enumerate(material.detectors):
            values = rows[rows.detector == detector][score.key].dropna().to_numpy()
            if len(values) < 2 or np.ptp(values) == 0:
                if len(values):
                    ax.plot(g + (i + 0.5) * step - 0.4, values[0], color=_colour(i), marker=MARKERS[i % 10])
                    drawn = True
                continue
            found = ax.violinplot(
                values, [g + (i + 0.5) * step - 0.4], widths=0.9 * step, showmedians=True, showextrema=False
            )
            for body in found["bodies"]:  # type: ignore[attr-defined]
                body.set(facecolor=_colour(i), alpha=0.5)
            found["cmedians"].set_color(_colour(i))
            drawn = True
    if not drawn:
        return None
    ax.set_xticks(range(len(groups)), [safe(name) for name in material.source_names()], rotation=20, ha="right")
    arrow = "higher is better" if score.higher_is_better else "lower is better"
    ax.set_ylabel(f"{score.name}\n({arrow})")
    _legend(figure, material.detectors)
    return Drawn(
        f"violin-{score.key}", f"{score.name.capitalize()} by source", f"Violin plot of {score.name} by source and detector; "
        f"the table of this section has the numbers.", figure,
    )  # fmt: skip


def chance_bars(material: Material, colormap: Colormap) -> Drawn | None:
    """Raw values beside their chance levels and what is left when chance is taken off."""
    scores = [score for score in material.columns if score.measure != "entropy"]
    if not scores:
        return None
    figure = Figure(figsize=(max(5.0, 1.5 * len(scores) + 0.25 * len(scores) * len(material.detectors)), 3.6))
    ax = figure.subplots()
    step = 0.8 / len(material.detectors)
    said = []
    for s, score in enumerate(scores):
        rows = material.totals(score.measure, score.variant, score.condition or ALL)
        for i, detector in enumerate(material.detectors):
            row = rows.get(detector)
            if row is None or math.isnan(row["mean"]):
                continue
            x = s + (i + 0.5) * step - 0.4
            ax.bar(x, row["mean"], width=0.9 * step, color=_colour(i), alpha=0.35)
            ax.hlines(row["chance"], x - 0.45 * step, x + 0.45 * step, color="0.1", linewidth=1.4)
            ax.errorbar(
                x, row["corrected"], [[max(0, row["corrected"] - row["corrected_low"])],
                [max(0, row["corrected_high"] - row["corrected"])]] if not math.isnan(row["corrected_low"]) else None,
                color=_colour(i), marker=MARKERS[i % 10], markersize=5, capsize=2,
            )  # fmt: skip
            said.append(
                f"{score.name}, {printable_line(detector)}: raw {row['mean']:.2f}, chance {row['chance']:.2f}, "
                f"corrected {row['corrected']:.2f}"
            )
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_xticks(range(len(scores)), [score.name.replace(", ", ",\n").replace(" (", "\n(") for score in scores])
    ax.set_ylabel("bar: raw; black line: chance;\nmarker: (raw - chance) / (1 - chance)")
    _legend(figure, material.detectors)
    return Drawn("chance", "Raw values, chance levels, and what is left", f"{'; '.join(said)}.", figure)


def stability_matrices(material: Material, colormap: Colormap) -> Drawn | None:
    """The R x R matrix of each detector, its runs in the order of a hierarchical clustering."""
    rows = material.matrix
    rows = rows[rows.variant == "predicted"] if len(rows) else rows
    rows = rows[material.main_similarity(rows)] if len(rows) else rows
    names = [name for name in material.detectors if len(rows) and (rows.detector == name).any()]
    if not names:
        return None
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns + 1, 2.6 * lines + 0.4))
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    lowest = min(0.0, float(np.nanmin(rows["mean"].to_numpy(float)))) if rows["mean"].notna().any() else 0.0
    said, shown = [], None
    for ax in panels[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(panels, names, strict=False):
        matrix, runs = _clustered(rows[rows.detector == name], [model.run for model in material.run.models_of(name)])
        shown = ax.imshow(matrix, cmap=colormap, vmin=lowest, vmax=1)
        ax.set_title(safe(name))
        small = len(runs) > 12
        ax.set_xticks(
            [] if small else range(len(runs)), [] if small else [safe(r, 8) for r in runs], rotation=90, fontsize=7
        )
        ax.set_yticks([] if small else range(len(runs)), [] if small else [safe(r, 8) for r in runs], fontsize=7)
        off = matrix[~np.eye(len(runs), dtype=bool)]
        if np.isfinite(off).any():
            said.append(f"{printable_line(name)}: pairs of runs from {np.nanmin(off):.2f} to {np.nanmax(off):.2f}")
    if shown is not None:
        figure.colorbar(shown, ax=panels.tolist(), shrink=0.8, label="similarity of maps")
    return Drawn("stability-matrix", "Agreement of each pair of training runs", f"{'; '.join(said)}.", figure)


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
            _bare(ax)
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


def scatter(material: Material, colormap: Colormap) -> Drawn | None:
    """Each pair of scores against each other, a point an image and detector."""
    keys = [score for score in material.columns if material.scores[score.key].notna().any()]
    if len(keys) < 2:
        return None
    count = len(keys)
    figure = Figure(figsize=(1.7 * (count - 1) + 1, 1.7 * (count - 1) + 0.8))
    panels = figure.subplots(count - 1, count - 1, squeeze=False)
    rng = np.random.default_rng(0)
    for y in range(1, count):
        for x in range(count - 1):
            ax = panels[y - 1, x]
            if x >= y:
                ax.set_axis_off()
                continue
            for i, detector in enumerate(material.detectors):
                rows = material.scores[material.scores.detector == detector]
                rows = rows.iloc[np.sort(rng.permutation(len(rows))[:300])]
                ax.plot(
                    rows[keys[x].key],
                    rows[keys[y].key],
                    ".",
                    color=_colour(i),
                    markersize=2,
                    alpha=0.5,
                    rasterized=True,
                )
            ax.tick_params(labelsize=6)
            if y == count - 1:
                ax.set_xlabel(keys[x].name.replace(", ", ",\n"), fontsize=7)
            if x == 0:
                ax.set_ylabel(keys[y].name.replace(", ", ",\n"), fontsize=7)
    _legend(figure, material.detectors)
    return Drawn(
        "scatter", "Scores against each other, by image", f"Scatter plots of {', '.join(k.name for k in keys)}; at most 300 "
        "images of each detector.", figure,
    )  # fmt: skip


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
    part, pixels = material.part(detector, image), _inputs(material, image)
    if part is None or pixels is None:
        return None
    figure = Figure(figsize=(12 * 0.95 + 1, 3 * 0.98 + 0.6))
    panels = figure.subplots(3, 12, squeeze=False)
    changed = _perturbed(material, detector, image, pixels, conditions)
    for column, condition in enumerate(conditions):
        found = _fine(part.maps[part.of(condition.name)][0], pixels.shape[1:])
        back = TRANSFORMS[condition.kind].undo(torch.from_numpy(found)[None])[0].numpy()
        for ax, background, overlay in zip(
            panels[:, column], (changed[condition.name],) * 2 + (pixels,), (None, found, back), strict=True
        ):
            _show(ax, background, overlay, colormap)
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
    pixels = _inputs(material, image)
    columns = min(10, max(len(material.run.models_of(name)) for name in material.detectors))
    figure = Figure(figsize=(1.1 * columns + 1.2, 1.15 * len(material.detectors) + 0.6))
    panels = figure.subplots(len(material.detectors), columns, squeeze=False)
    for line, detector in zip(panels, material.detectors, strict=True):
        for ax in line:
            _bare(ax)
            ax.set_frame_on(False)
        for run, ax in zip(range(len(material.run.models_of(detector))), line, strict=False):
            part = material.part(detector, image, run)
            if part is not None:
                _show(ax, pixels, _fine(part.maps[part.of("clean")][0], _size(material, pixels)), colormap)
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
            _bare(ax)
            ax.set_frame_on(False)
        some = np.unique(np.linspace(stretch.start, stretch.stop - 1, per_source).astype(int))
        for ax, image in zip(line, some, strict=False):
            pixels = _inputs(material, int(image))
            if pixels is not None:
                _show(ax, pixels, None, colormap)
        line[0].set_ylabel(wrapped(name), fontsize=8)
    names = ", ".join(f"{printable_line(s.source)} ({s.stop - s.start})" for s in material.stretches)
    return Drawn("fig8-samples", "Images of each source", f"Sample images of each source: {names}.", figure)


DRAWS: dict[str, Draw] = {
    draw.__name__: draw
    for draw in (
        chance_bars, entropy_gallery, focus_gallery, mean_maps, noise_curve, noise_gallery, radar, roc, runs_gallery,
        samples, scatter, stability_matrices, transform_gallery,
    )
}  # fmt: skip
"""By name, for notebooks."""


def all_figures(material: Material) -> list[tuple[str, Draw]]:
    """Section of the page and figure, in order."""
    fixed: list[tuple[str, Draw]] = [
        ("top", radar),
        ("auroc", roc),
        ("top", chance_bars),
        ("top", mean_maps),
        ("entropy", entropy_gallery),
        ("noise", noise_curve),
        ("noise", noise_gallery),
        ("resilience", transform_gallery),
        ("focus", focus_gallery),
        ("stability", stability_matrices),
        ("stability", runs_gallery),
        ("data", samples),
        ("images", scatter),
    ]

    def violin_of(score: Score) -> Draw:
        return lambda material, colormap: violins(material, score, colormap)

    return fixed + [(score.measure, violin_of(score)) for score in material.columns]


def safe(text: str, most: int = MOST_NAME) -> str:
    """A name as matplotlib can draw it: printable, no formulas, not too long.

    >>> safe("a$b$" + 40 * "x", 8)
    'a\\\\$b\\\\$xxx…'
    """
    text = printable_line(text)
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", "\\$")


def wrapped(name: str, width: int = 16, lines: int = 3) -> str:
    """A name on a few short lines, cut at hyphens and underscores where it has them."""
    words = re.split(r"(?<=[-_ ./])", printable_line(name))
    found = [""]
    for word in words:
        if found[-1] and len(found[-1]) + len(word) > width:
            found.append("")
        found[-1] += word
    found = [line if len(line) <= width + 4 else line[: width + 3] + "…" for line in found]
    kept = found if len(found) <= lines else [*found[: lines - 1], found[lines - 1] + "…"]
    return "\n".join(kept).replace("$", "\\$")


def _colour(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _legend(figure: Figure, detectors: Sequence[str], *lines: tuple[str, Any]) -> None:
    """One entry a detector below the figure, and one a kind of line."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=_colour(i),
            marker=MARKERS[i % 10],
            linestyle=LINES[i % 4] if not lines else "-",
            label=safe(name),
        )
        for i, name in enumerate(detectors)
    ]
    handles += [Line2D([], [], color="0.3", linestyle=style, label=name) for name, style in lines]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=8)


def _positive(material: Material) -> np.ndarray | None:
    labels = material.run.image_table["label"].to_pylist()
    positive = np.array([label == material.run.config.data.positive for label in labels])
    return None if positive.all() or not positive.any() else positive


def _roc_curves(
    material: Material, detector: str, condition: str, positive: np.ndarray, grid: np.ndarray
) -> list[np.ndarray]:
    index = material.run.classes.index(material.run.config.data.positive)
    curves = []
    for logits in material.logits.get((detector, condition), ()):
        score = ranking_score(logits, index, "softmax")
        use = np.isfinite(score)
        if positive[use].any() and not positive[use].all():
            false, true, _ = roc_curve(positive[use], score[use])
            curves.append(np.interp(grid, false, true))
    return curves


def _auroc(material: Material, detector: str, condition: str) -> dict[str, Any] | None:
    rows = material.performance
    rows = rows[
        (rows.detector == detector) & (rows.condition == condition) & (rows.run == ALL) & (rows.score == "softmax")
    ]
    rows = rows[(rows.positives == ALL) & (rows.negatives == ALL)]
    found = records(rows)
    return found[0] if found and not math.isnan(found[0]["auroc"]) else None


def _clustered(rows: Any, runs: list[str]) -> tuple[Float[np.ndarray, "R R"], list[str]]:
    matrix = np.eye(len(runs))
    for row in records(rows):
        matrix[runs.index(row["run"]), runs.index(row["other_run"])] = row["mean"]
    if len(runs) > 2 and np.isfinite(matrix).all():
        distance = np.clip(1 - (matrix + matrix.T) / 2, 0, None)
        np.fill_diagonal(distance, 0)
        order = leaves_list(linkage(squareform(distance, checks=False), "average"))
        matrix, runs = matrix[np.ix_(order, order)], [runs[i] for i in order]
    return matrix, runs


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
        pixels = _inputs(material, image)
        _show(line[0], pixels, None, colormap)
        for ax, detector in zip(line[1:], material.detectors, strict=True):
            part = material.part(detector, image)
            overlay = None if part is None else _fine(part.maps[part.of("clean")][0], _size(material, pixels))
            _show(ax, pixels, overlay, colormap)
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
    usable = [(image, pixels) for image in images if (pixels := _inputs(material, image)) is not None]
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
                    _show(block[0, column], background, None, colormap)
                found = part.maps[part.of(condition)][0]
                overlay = _fine(found, pixels.shape[1:]) if np.isfinite(found).all() else None
                _show(block[1 + d, column], background, overlay, colormap)
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


def _inputs(material: Material, image: int) -> UInt8[np.ndarray, "3 H W"] | None:
    return material.pixels(image, material.run.models[0].input_size)


def _size(material: Material, pixels: np.ndarray | None) -> tuple[int, int]:
    return material.run.models[0].input_size if pixels is None else (pixels.shape[1], pixels.shape[2])


def _fine(found: Float[np.ndarray, "h w"], size: tuple[int, ...]) -> Float[np.ndarray, "H W"]:
    """A map scaled min-max and enlarged smoothly, as it is laid over an image; zeros where it is dead or flat."""
    tensor = torch.nan_to_num(torch.from_numpy(np.array(found, dtype=np.float32)))
    tensor = tensor - tensor.min()
    tensor = tensor / tensor.max().clamp_min(1e-12)
    fine = torch.nn.functional.interpolate(tensor[None, None], size=tuple(size), mode="bicubic", align_corners=False)
    return fine[0, 0].clamp(0, 1).numpy()


def _show(ax: Axes, pixels: np.ndarray | None, overlay: np.ndarray | None, colormap: Colormap) -> None:
    _bare(ax)
    if pixels is not None:
        ax.imshow(pixels.transpose(1, 2, 0), interpolation="antialiased")
    if overlay is not None:
        ax.imshow(overlay, cmap=colormap, vmin=0, vmax=1, alpha=ALPHA if pixels is not None else 1.0)


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
