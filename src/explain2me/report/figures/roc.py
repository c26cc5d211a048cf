"""Fig. 9: ROC curves of the clean images and under each condition with an AUROC."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from explain2me.report.figures.drawing import LINES, Drawn, add_legend, colour_of
from explain2me.report.formats import value_interval
from explain2me.report.material import Material
from explain2me.report.summary import SOFTMAX
from explain2me.statistics.performance import ranking_score
from explain2me.text import printable_line


def roc(material: Material, colormap: Colormap) -> Drawn | None:
    """Fig. 9: ROC curves, mean over runs, a panel a condition."""
    labels = material.run.image_table["label"].to_pylist()
    positive = np.array([label == material.run.config.data.positive for label in labels])
    present = {condition for _, condition in material.logits}
    conditions = {name: words for name, words in material.tables.auroc_conditions().items() if name in present}
    if positive.all() or not positive.any() or not conditions:
        return None
    figure = Figure(figsize=(3.1 * len(conditions) + 0.4, 3.8))
    panels = figure.subplots(1, len(conditions), sharey=True, squeeze=False)[0]
    texts = []
    for ax, (condition, words) in zip(panels, conditions.items(), strict=True):
        texts += [f"{words}, {text}" for text in _panel(ax, material, condition, positive)]
        ax.set_title(words)
        ax.set_xlabel("false positive rate")
        ax.set_box_aspect(1)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(title="AUROC [95 %]", loc="lower right", fontsize=7, title_fontsize=7, frameon=False)
    panels[0].set_ylabel("true positive rate")
    add_legend(figure, material.tables.detectors)
    return Drawn("fig9-roc", "ROC curves of clean and perturbed images", f"{'; '.join(texts)}.", figure)


def _panel(ax: Axes, material: Material, condition: str, positive: np.ndarray) -> list[str]:
    """Draw the curves of all detectors; returns each in words."""
    grid = np.linspace(0, 1, 101)
    clean, rows = material.tables.aurocs(), material.tables.aurocs(condition)
    texts = []
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=0.8)
    for i, detector in enumerate(material.tables.detectors):
        curves = _curves(material, detector, condition, positive, grid)
        row = rows.get(detector)
        if not curves or row is None:
            continue
        label = value_interval(row["auroc"], row["ci_low"], row["ci_high"])
        if detector in clean and row["n"] != clean[detector]["n"]:  # dead maps perturb no image
            label += f"\n{row['n']} images, before {row['auroc_clean']:.3f}"
        ax.plot(grid, np.mean(curves, axis=0), color=colour_of(i), linestyle=LINES[i % 4], label=label)
        texts.append(f"{printable_line(detector)}: AUROC {label.replace(chr(10), ', ')}")
    return texts


def _curves(
    material: Material, detector: str, condition: str, positive: np.ndarray, grid: np.ndarray
) -> list[np.ndarray]:
    """The true positive rate of each run at the false positive rates of the grid."""
    index = material.run.classes.index(material.run.config.data.positive)
    curves = []
    for logits in material.logits.get((detector, condition), ()):
        score = ranking_score(logits, index, SOFTMAX)
        finite = np.isfinite(score)
        if positive[finite].any() and not positive[finite].all():
            false, true, _ = roc_curve(positive[finite], score[finite])
            curves.append(np.interp(grid, false, true))
    return curves
