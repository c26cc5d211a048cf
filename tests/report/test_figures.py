"""Figures: the radar chart, names as matplotlib draws them, and a description of each figure in words."""

import matplotlib
import pytest

from explain2me.report.figures import all_figures, draws
from explain2me.report.figures.drawing import safe, wrapped
from explain2me.report.figures.radar import radar_values


def test_radar_turns_every_axis_so_that_the_rim_is_good(material):
    values = radar_values(material.tables)["second"]
    means = {score.key: material.tables.totals(score)["second"]["mean"] for score in material.tables.columns}
    entropy, focus = means["entropy"], (means["focus_salient"], means["focus_nonsalient"])
    assert values["1 - entropy"] == pytest.approx(1 - entropy)
    assert values["focus"] == pytest.approx((1 - focus[0] + focus[1]) / 2)
    assert list(values) == ["1 - entropy", "noise", "resilience", "focus", "stability"]


def test_every_figure_is_described_in_words(material):
    for _, draw in all_figures(material):
        drawn = draw(material, matplotlib.colormaps["viridis"])
        assert drawn is not None
        assert len(drawn.text) > 30
        assert "nan" not in drawn.text


def test_names_in_figures_are_no_formulas():
    assert "\\$" in safe("a$b$")
    assert wrapped("resnet50-cross-entropy-guided") == "resnet50-cross-\nentropy-guided"


def test_figures_in_notebooks_keep_their_names():
    names = "chance_bars entropy_gallery focus_gallery mean_maps noise_curve noise_gallery radar roc runs_gallery samples scatter"
    assert {*names.split(), "stability_matrices", "transform_gallery"} == set(draws())
