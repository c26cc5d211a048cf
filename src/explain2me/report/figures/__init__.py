"""Every figure of the paper and some beyond it, from one code for page, PDF, SVG and PNG. Each returns None if it has no data.

``Drawn.text`` says in words what a figure shows, for people who do not see it.
"""

from explain2me.report.figures.drawing import Draw
from explain2me.report.figures.galleries import (
    entropy_gallery,
    focus_gallery,
    mean_maps,
    noise_gallery,
    runs_gallery,
    samples,
    transform_gallery,
)
from explain2me.report.figures.plots import chance_bars, noise_curve, radar, roc, scatter, stability_matrices, violins
from explain2me.report.material import Material, Score

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
