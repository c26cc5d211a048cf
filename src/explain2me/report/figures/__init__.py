"""Every figure of the paper and some beyond it, from one code for page, PDF, SVG and PNG. Each is None where it has no data.

Figures of all measures have a function each; those of one measure are drawn by generic functions, and the table of scores
lists the figures of each measure. ``Drawn.text`` describes a figure for people who do not see it.
"""

import functools

from explain2me.report.figures.drawing import Draw, DrawMeasure
from explain2me.report.figures.galleries import extremes, mean_maps, perturbed, runs, samples, transforms
from explain2me.report.figures.plots import chance_bars, level_curve, matrices, scatter, violins
from explain2me.report.figures.radar import radar
from explain2me.report.figures.roc import roc
from explain2me.report.material import Material
from explain2me.statistics.scores import MEASURES

GENERAL: dict[str, Draw] = {draw.__name__: draw for draw in (chance_bars, mean_maps, radar, roc, samples, scatter)}
"""Figures of all measures."""
OF_A_MEASURE: dict[str, DrawMeasure] = {
    draw.__name__: draw for draw in (extremes, level_curve, matrices, perturbed, runs, transforms)
}
"""Figures of one measure, by the names that the table of scores uses."""


def draws() -> dict[str, Draw]:
    """Every figure by its name in notebooks: ``run.plot.NAME()``."""
    by_name = dict(GENERAL)
    for measure in MEASURES.values():
        for row in measure.figures:
            name = row.plot or f"{measure.name}_{row.draw}"
            by_name[name] = functools.partial(OF_A_MEASURE[row.draw], measure=measure, row=row)
    return dict(sorted(by_name.items()))


def all_figures(material: Material) -> list[tuple[str, Draw]]:
    """Section of the page and figure, in order."""
    figures: list[tuple[str, Draw]] = [("top", radar), ("auroc", roc), ("top", chance_bars), ("top", mean_maps)]
    for measure in MEASURES.values():
        for row in measure.figures:
            figures.append((measure.name, functools.partial(OF_A_MEASURE[row.draw], measure=measure, row=row)))
    figures += [("data", samples), ("images", scatter)]
    columns = material.tables.columns
    return figures + [(score.measure, functools.partial(violins, score=score)) for score in columns]
