"""Fig. 10: all measures of each detector in one chart."""

import math

import numpy as np
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from explain2me.report.figures.drawing import LINES, Drawn, colour_of, look_of, safe
from explain2me.report.material import Material
from explain2me.report.summary import RunScore, Tables
from explain2me.text import printable_line


def radar(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 10: the measures of each detector, each turned so that the rim is good."""
    tables = material.tables
    axes = radar_values(tables)
    names = list(dict.fromkeys(axis for values in axes.values() for axis in values))
    if len(names) < 3:
        return None
    figure = Figure(figsize=(6.2, 4.6))
    ax = figure.add_subplot(projection="polar")
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    for i, detector in enumerate(tables.detectors):
        ring = np.array([axes[detector].get(name, math.nan) for name in [*names, names[0]]])
        closed = np.append(angles, angles[0])
        ax.plot(closed, ring, linestyle=LINES[i % 4], markersize=4, label=safe(detector), **look_of(i))
        ax.fill(closed, np.nan_to_num(ring), color=colour_of(i), alpha=0.06)
    ax.set_theta_zero_location("N")  # type: ignore[attr-defined]
    ax.set_rlabel_position(35)  # type: ignore[attr-defined]
    ax.set_xticks(angles, names)
    known = {name: {axis: v for axis, v in values.items() if not math.isnan(v)} for name, values in axes.items()}
    ax.set_ylim(min([0.0, *(v for values in known.values() for v in values.values())]), 1)
    ax.tick_params(axis="x", pad=8)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    words = {name: ", ".join(f"{axis} {v:.2f}" for axis, v in values.items()) for name, values in known.items()}
    texts = (f"{printable_line(detector)}: {values}" for detector, values in words.items())
    return Drawn("fig10-radar", "All measures; the rim is good", f"Radar chart. {'; '.join(texts)}.", figure)


def radar_values(tables: Tables) -> dict[str, dict[str, float]]:
    """Value of each axis by detector: the mean over the scores of a measure, each turned so that 1 is good.

    A measure is left out for a detector that lacks one of its scores.
    """
    scores: dict[str, list[RunScore]] = {}
    for score in tables.columns:
        scores.setdefault(score.measure, []).append(score)
    axes: dict[str, dict[str, float]] = {detector: {} for detector in tables.detectors}
    for measure, of_measure in scores.items():
        name = f"1 - {measure}" if [score.higher_is_better for score in of_measure] == [False] else measure
        rows = [(score.higher_is_better, tables.totals(score)) for score in of_measure]
        for detector, values in axes.items():
            means = [(higher, by[detector]["mean"]) for higher, by in rows if detector in by]
            if len(means) == len(rows):
                values[name] = sum(mean if higher else 1 - mean for higher, mean in means) / len(means)
    return axes
