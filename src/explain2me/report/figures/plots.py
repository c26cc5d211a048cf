"""Figures of numbers: curves over levels, violins, chance levels, matrices, scatter."""

import math
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from explain2me.report.figures.drawing import Drawn, add_legend, colour_of, distinct, look_of, panel_grid, safe
from explain2me.report.material import Material
from explain2me.report.summary import Row, RunScore, level_of, over_all, records
from explain2me.statistics.scores import VARIANTS, FigureRow, Measure
from explain2me.text import printable_line

MOST_POINTS = 300
"""Images of each detector in a scatter plot."""
MOST_NAMED_RUNS = 12
"""A matrix of more runs has no names on its axes."""


def level_curve(material: Material, colormap: Colormap, *, measure: Measure, row: FigureRow) -> Drawn | None:
    """Fig. 4: similarity to the clean map against the level of a perturbation, with 95 % bands, and the chance level."""
    rows = over_all(material.tables.measures)
    rows = rows[(rows.measure == measure.name) & material.tables.main_similarity(rows)]
    if not len(rows):
        return None
    kinds = list(dict.fromkeys(name.partition("@")[0] for name in rows.condition))
    figure, panels = panel_grid(1, len(kinds), width=4.2 * len(kinds) + 0.6, height=3.8)
    texts = []
    for ax, kind in zip(panels[0], kinds, strict=True):
        of_kind = rows[rows.condition.str.startswith(f"{kind}@") & rows["mean"].notna()]
        for i, detector in enumerate(material.tables.detectors):
            for variant in VARIANTS:
                curve = of_kind[(of_kind.detector == detector) & (of_kind.variant == variant)]
                if len(curve):
                    texts += [f"{kind}, {printable_line(detector)}: {text}" for text in _curve(ax, i, variant, curve)]
        ax.set_xlabel(f"level of {kind.replace('_', ' ')} {measure.name}")
        ax.set_ylabel("similarity to the clean map")
    add_legend(figure, material.tables.detectors, ("predicted class", "-"), ("fixed class", "--"), ("chance", ":"))
    return Drawn(row.file, row.title, f"{'; '.join(texts)}.", figure)


def _curve(ax: Axes, detector: int, variant: str, rows: pd.DataFrame) -> list[str]:
    """Draw the levels of one detector and variant; returns those of the predicted class in words."""
    rows = rows.assign(level=[level_of(name) for name in rows.condition]).sort_values("level")
    look, colour = {"markersize": 4, **look_of(detector)}, colour_of(detector)
    if variant != VARIANTS[0]:
        ax.plot(rows.level, rows["mean"], linestyle="--", linewidth=0.8, **look)
        return []
    ax.plot(rows.level, rows["mean"], linestyle="-", linewidth=1.6, **look)
    if len(rows) > 1:
        ax.fill_between(rows.level, rows.ci_low, rows.ci_high, color=colour, alpha=0.15)
    else:  # one level has no band: a bar, and a short line for chance
        ax.vlines(rows.level, rows.ci_low, rows.ci_high, color=colour)
    marker: Any = {"marker": "_", "markersize": 14} if len(rows) == 1 else {}
    ax.plot(rows.level, rows.chance, color=colour, linestyle=":", linewidth=0.8, **marker)
    return [", ".join(f"{level:g}: {mean:.2f}" for level, mean in zip(rows.level, rows["mean"], strict=True))]


def violins(material: Material, colormap: Colormap, *, score: RunScore) -> Drawn | None:
    """Values by image of one score: a violin a source and detector, its median as a line."""
    frame, detectors = material.scores, material.tables.detectors
    groups = [frame[(frame.image >= s.start) & (frame.image < s.stop)] for s in material.tables.stretches]
    figure = Figure(figsize=(max(4.5, 0.55 * len(groups) * len(detectors) + 1.5), 3.4))
    ax = figure.subplots()
    step = 0.8 / len(detectors)
    num_drawn = 0
    for g, rows in enumerate(groups):
        for i, detector in enumerate(detectors):
            values = rows[rows.detector == detector][score.key].dropna().to_numpy()
            _violin(ax, values, g + (i + 0.5) * step - 0.4, 0.9 * step, i)
            num_drawn += len(values) > 0
    if not num_drawn:
        return None
    names = [safe(name) for name in material.tables.source_names()]
    ax.set_xticks(range(len(groups)), names, rotation=20, ha="right")
    ax.set_ylabel(f"{score.name}\n({score.better} is better)")
    add_legend(figure, detectors)
    text = f"Violin plot of {score.name} by source and detector; the table of this section has the numbers."
    return Drawn(f"violin-{score.key}", f"{score.name.capitalize()} by source", text, figure)


def _violin(ax: Axes, values: np.ndarray, x: float, width: float, detector: int) -> None:
    """A violin; a point where all values are the same, nothing where there are none."""
    if len(values) == 0:
        return
    if np.ptp(values) == 0:
        ax.plot(x, values[0], **look_of(detector))
        return
    parts: Any = ax.violinplot(values, [x], widths=width, showmedians=True, showextrema=False)
    for body in parts["bodies"]:
        body.set(facecolor=colour_of(detector), alpha=0.5)
    parts["cmedians"].set_color(colour_of(detector))


def chance_bars(material: Material, colormap: Colormap) -> Drawn | None:
    """Raw values, their chance levels, and the values corrected for chance."""
    tables = material.tables
    scores = [score for score in tables.columns if score.compares]
    if not scores:
        return None
    figure = Figure(figsize=(max(5.0, 1.5 * len(scores) + 0.25 * len(scores) * len(tables.detectors)), 3.6))
    ax = figure.subplots()
    step = 0.8 / len(tables.detectors)
    texts = []
    for s, score in enumerate(scores):
        rows = tables.totals(score)
        for i, detector in enumerate(tables.detectors):
            row = rows.get(detector)
            if row is None or math.isnan(row["mean"]):
                continue
            _bar(ax, row, s + (i + 0.5) * step - 0.4, step, i)
            texts.append(
                f"{score.name}, {printable_line(detector)}: raw {row['mean']:.2f}, chance {row['chance']:.2f}, "
                f"corrected {row['corrected']:.2f}"
            )
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_xticks(range(len(scores)), [score.name.replace(", ", ",\n").replace(" (", "\n(") for score in scores])
    ax.set_ylabel("bar: raw; black line: chance;\nmarker: (raw - chance) / (1 - chance)")
    add_legend(figure, tables.detectors)
    return Drawn("chance", "Raw values, chance levels, and corrected values", f"{'; '.join(texts)}.", figure)


def _bar(ax: Axes, row: Row, x: float, step: float, detector: int) -> None:
    ax.bar(x, row["mean"], width=0.9 * step, color=colour_of(detector), alpha=0.35)
    ax.hlines(row["chance"], x - 0.45 * step, x + 0.45 * step, color="0.1", linewidth=1.4)
    limits: Any = None
    if not math.isnan(row["corrected_low"]):
        value = row["corrected"]
        limits = [[max(0, value - row["corrected_low"])], [max(0, row["corrected_high"] - value)]]
    ax.errorbar(x, row["corrected"], limits, markersize=5, capsize=2, **look_of(detector))


def matrices(material: Material, colormap: Colormap, *, measure: Measure, row: FigureRow) -> Drawn | None:
    """The R x R matrix of each detector, its runs in the order of a hierarchical clustering."""
    rows = material.tables.matrix(measure)
    rows = rows[(rows.variant == measure.variants[0]) & material.tables.main_similarity(rows)] if len(rows) else rows
    names = [name for name in material.tables.detectors if len(rows) and (rows.detector == name).any()]
    if not names:
        return None
    columns = min(4, len(names))
    lines = math.ceil(len(names) / columns)
    figure, grid = panel_grid(lines, columns, width=2.6 * columns + 1, height=2.6 * lines + 0.4)
    panels = grid.ravel()
    lowest = min(0.0, float(np.nanmin(rows["mean"].to_numpy(float)))) if rows["mean"].notna().any() else 0.0
    shown: Any = None
    texts = []
    for ax in panels[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(panels, names, strict=False):
        matrix, runs = _clustered(rows[rows.detector == name], [model.run for model in material.run.models_of(name)])
        shown = ax.imshow(matrix, cmap=colormap, vmin=lowest, vmax=1)
        ax.set_title(safe(name))
        named = distinct(runs, 8) if len(runs) <= MOST_NAMED_RUNS else []
        ax.set_xticks(range(len(named)), named, rotation=90, fontsize=7)
        ax.set_yticks(range(len(named)), named, fontsize=7)
        off = matrix[~np.eye(len(runs), dtype=bool)]
        if np.isfinite(off).any():
            texts.append(f"{printable_line(name)}: pairs of runs from {np.nanmin(off):.2f} to {np.nanmax(off):.2f}")
    figure.colorbar(shown, ax=panels.tolist(), shrink=0.8, label="similarity of maps")
    return Drawn(row.file, row.title, f"{'; '.join(texts)}.", figure)


def _clustered(rows: pd.DataFrame, runs: list[str]) -> tuple[Float[np.ndarray, "R R"], list[str]]:
    matrix = np.eye(len(runs))
    for row in records(rows):
        matrix[runs.index(row["run"]), runs.index(row["other_run"])] = row["mean"]
    if len(runs) > 2 and np.isfinite(matrix).all():
        distance = np.clip(1 - (matrix + matrix.T) / 2, 0, None)
        np.fill_diagonal(distance, 0)
        order = leaves_list(linkage(squareform(distance, checks=False), "average"))
        matrix, runs = matrix[np.ix_(order, order)], [runs[i] for i in order]
    return matrix, runs


def scatter(material: Material, colormap: Colormap) -> Drawn | None:
    """Each pair of scores against each other, a point an image and detector."""
    scores = [score for score in material.tables.columns if material.scores[score.key].notna().any()]
    if len(scores) < 2:
        return None
    last = len(scores) - 1
    figure, panels = panel_grid(last, last, width=1.7 * last + 1, height=1.7 * last + 0.8)
    rng = np.random.default_rng(0)
    for (y, x), ax in np.ndenumerate(panels):
        if x > y:
            ax.set_axis_off()
            continue
        ax.tick_params(labelsize=6)
        for i, detector in enumerate(material.tables.detectors):
            rows = material.scores[material.scores.detector == detector]
            rows = rows.iloc[np.sort(rng.permutation(len(rows))[:MOST_POINTS])]
            values = rows[scores[x].key], rows[scores[y + 1].key]
            ax.plot(*values, ".", color=colour_of(i), markersize=2, alpha=0.5, rasterized=True)
    for line, ax, x_score, y_score in zip(panels[:, 0], panels[-1], scores, scores[1:], strict=False):
        line.set_ylabel(y_score.name.replace(", ", ",\n"), fontsize=7)
        ax.set_xlabel(x_score.name.replace(", ", ",\n"), fontsize=7)
    add_legend(figure, material.tables.detectors)
    names = ", ".join(score.name for score in scores)
    text = f"Scatter plots of {names}; at most {MOST_POINTS} images of each detector."
    return Drawn("scatter", "Scores against each other, by image", text, figure)
