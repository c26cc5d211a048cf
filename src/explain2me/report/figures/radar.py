"""Fig. 10: all measures of each detector in one chart."""

import math

import numpy as np
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from explain2me.report.figures.drawing import LINES, MARKERS, Drawn, colour_of, safe
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
        values = [axes[detector].get(name, math.nan) for name in names]
        ring = np.append(values, values[0])
        ax.plot(
            np.append(angles, angles[0]), ring, color=colour_of(i), linestyle=LINES[i % 4], marker=MARKERS[i % 10],
            markersize=4, label=safe(detector),
        )  # fmt: skip
        ax.fill(np.append(angles, angles[0]), np.nan_to_num(ring), color=colour_of(i), alpha=0.06)
    ax.set_theta_zero_location("N")  # type: ignore[attr-defined]
    ax.set_rlabel_position(35)  # type: ignore[attr-defined]
    ax.set_xticks(angles, names)
    lowest = min((v for values in axes.values() for v in values.values() if not math.isnan(v)), default=0.0)
    ax.set_ylim(min(0.0, lowest), 1)
    ax.tick_params(axis="x", pad=8)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return Drawn("fig10-radar", "All measures; the rim is good", f"Radar chart. {_in_words(axes)}.", figure)


def radar_values(tables: Tables) -> dict[str, dict[str, float]]:
    """Value of each axis by detector: the mean over the scores of a measure, each turned so that 1 is good.

    A measure is left out for a detector that lacks one of its scores.
    """
    scores: dict[str, list[RunScore]] = {}
    for score in tables.columns:
        scores.setdefault(score.measure, []).append(score)
    axes: dict[str, dict[str, float]] = {detector: {} for detector in tables.detectors}
    for measure, of_measure in scores.items():
        rows = [tables.totals(score) for score in of_measure]
        lower_is_better = [not score.higher_is_better for score in of_measure]
        name = f"1 - {measure}" if lower_is_better == [True] else measure
        for detector, values in axes.items():
            if all(detector in by_detector for by_detector in rows):
                means = [by_detector[detector]["mean"] for by_detector in rows]
                turned = [1 - mean if lower else mean for mean, lower in zip(means, lower_is_better, strict=True)]
                values[name] = sum(turned) / len(turned)
    return axes


def _in_words(axes: dict[str, dict[str, float]]) -> str:
    texts = (
        f"{printable_line(detector)}: "
        + ", ".join(f"{name} {value:.2f}" for name, value in values.items() if not math.isnan(value))
        for detector, values in axes.items()
    )
    return "; ".join(texts)
