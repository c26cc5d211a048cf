"""Figures of numbers: radar, ROC, curves, violins, chance levels, matrices, scatter."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from sklearn.metrics import roc_curve

from explain2me.report.figures.drawing import LINES, MARKERS, Drawn, add_legend, colour_of, safe
from explain2me.report.material import BLURS, Material, Score, records
from explain2me.run.schema import ALL
from explain2me.statistics.performance import ranking_score
from explain2me.text import printable_line


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
            ax.plot(grid, np.mean(curves, axis=0), color=colour_of(i), linestyle=LINES[i % 4], label=label)
            said.append(f"{titles[condition]}, {printable_line(detector)}: AUROC {label.replace(chr(10), ', ')}")
        ax.set_title(titles[condition])
        ax.set_xlabel("false positive rate")
        ax.set_box_aspect(1)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(title="AUROC [95 %]", loc="lower right", fontsize=7, title_fontsize=7, frameon=False)
    panels[0].set_ylabel("true positive rate")
    add_legend(figure, material.detectors)
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
                style = {"color": colour_of(i), "marker": MARKERS[i % 10], "markersize": 4, "linewidth": width}
                ax.plot(found.level, found["mean"], linestyle="-" if variant == "predicted" else "--", **style)
                if variant == "predicted":
                    if len(found) > 1:
                        ax.fill_between(found.level, found.ci_low, found.ci_high, color=colour_of(i), alpha=0.15)
                    else:  # one level has no band: a bar, and a short line for chance
                        ax.vlines(found.level, found.ci_low, found.ci_high, color=colour_of(i))
                    marker = {"marker": "_", "markersize": 14} if len(found) == 1 else {}
                    ax.plot(found.level, found.chance, color=colour_of(i), linestyle=":", linewidth=0.8, **marker)
                    values = ", ".join(
                        f"{level:g}: {mean:.2f}" for level, mean in zip(found.level, found["mean"], strict=True)
                    )
                    said.append(f"{kind}, {printable_line(detector)}: {values}")
        ax.set_xlabel(f"level of {kind.replace('_', ' ')} noise")
        ax.set_ylabel("similarity to the clean map")
    add_legend(figure, material.detectors, ("predicted class", "-"), ("fixed class", "--"), ("chance", ":"))
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
                    ax.plot(g + (i + 0.5) * step - 0.4, values[0], color=colour_of(i), marker=MARKERS[i % 10])
                    drawn = True
                continue
            found = ax.violinplot(
                values, [g + (i + 0.5) * step - 0.4], widths=0.9 * step, showmedians=True, showextrema=False
            )
            for body in found["bodies"]:  # type: ignore[attr-defined]
                body.set(facecolor=colour_of(i), alpha=0.5)
            found["cmedians"].set_color(colour_of(i))
            drawn = True
    if not drawn:
        return None
    ax.set_xticks(range(len(groups)), [safe(name) for name in material.source_names()], rotation=20, ha="right")
    arrow = "higher is better" if score.higher_is_better else "lower is better"
    ax.set_ylabel(f"{score.name}\n({arrow})")
    add_legend(figure, material.detectors)
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
            ax.bar(x, row["mean"], width=0.9 * step, color=colour_of(i), alpha=0.35)
            ax.hlines(row["chance"], x - 0.45 * step, x + 0.45 * step, color="0.1", linewidth=1.4)
            ax.errorbar(
                x, row["corrected"], [[max(0, row["corrected"] - row["corrected_low"])],
                [max(0, row["corrected_high"] - row["corrected"])]] if not math.isnan(row["corrected_low"]) else None,
                color=colour_of(i), marker=MARKERS[i % 10], markersize=5, capsize=2,
            )  # fmt: skip
            said.append(
                f"{score.name}, {printable_line(detector)}: raw {row['mean']:.2f}, chance {row['chance']:.2f}, "
                f"corrected {row['corrected']:.2f}"
            )
    ax.axhline(0, color="0.6", linewidth=0.8)
    ax.set_xticks(range(len(scores)), [score.name.replace(", ", ",\n").replace(" (", "\n(") for score in scores])
    ax.set_ylabel("bar: raw; black line: chance;\nmarker: (raw - chance) / (1 - chance)")
    add_legend(figure, material.detectors)
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
                    color=colour_of(i),
                    markersize=2,
                    alpha=0.5,
                    rasterized=True,
                )
            ax.tick_params(labelsize=6)
            if y == count - 1:
                ax.set_xlabel(keys[x].name.replace(", ", ",\n"), fontsize=7)
            if x == 0:
                ax.set_ylabel(keys[y].name.replace(", ", ",\n"), fontsize=7)
    add_legend(figure, material.detectors)
    return Drawn(
        "scatter", "Scores against each other, by image", f"Scatter plots of {', '.join(k.name for k in keys)}; at most 300 "
        "images of each detector.", figure,
    )  # fmt: skip


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
