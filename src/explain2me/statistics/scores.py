"""THE TABLE of measures and their scores: one row a measure. Everything that names a measure reads this table.

Config fields, conditions, score files, tables, figures, findings and the notebook are derived from the rows. To add a
measure, write one file in ``measures/`` and one row here. This module imports no other module of the library and no
heavy package, so a config is checked before PyTorch is imported. A row names its function as ``module:name``;
:meth:`Measure.load` imports it.
"""

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

ALL = "all"
"""How tables call every label, every source and the mean over runs; no label, source or run may have this name."""
CLEAN = "clean"
"""Name of the condition without a perturbation."""
VARIANTS = ("predicted", "fixed")
"""Class that a map explains where two maps are compared: the predicted class, or one class for both maps."""


class Score(NamedTuple):
    """One number of the tables by detector.

    Attributes:
        key: short unique name; names the column in tables with one row an image.
        label: the score in words; ``{condition}`` stands for the name of the condition.
        condition: name of the condition that is scored; None: the mean over all conditions of the measure; ``"level"``:
            one score for each condition, where each condition is one level.
        higher_is_better: the direction in the paper.
        preferred: for ``"level"``: the condition that text and figures use where a run has it.
        words: the condition in words, where it is fixed.
    """

    key: str
    label: str
    condition: str | None
    higher_is_better: bool
    preferred: str = ""
    words: str = ""


class FigureRow(NamedTuple):
    """A figure of a measure: name of the function that draws it, name of its file, title, its name in ``run.plot``."""

    draw: str
    file: str
    title: str
    plot: str = ""


@dataclass(frozen=True)
class Measure:
    """One measure of section 3 of the paper.

    Attributes:
        name: as in configs, score files and tables.
        title: heading of its section in the report.
        question: the question that the measure answers, for people.
        meaning: what its lowest and highest value mean and which direction is better, for people.
        of: ``map``: scores a single clean map. ``perturbation``: compares a perturbed map with the clean map of the same
            image. ``pairs``: compares the clean maps of each pair of training runs of a detector.
        scores: the numbers that tables, figures and findings show.
        function: ``module:name``. For ``map``: (maps (N, h, w), variant) -> (N,). For ``perturbation`` and ``pairs``:
            (maps (N, h, w), other maps (N, h, w), kind of the condition, input size, similarity=name) -> (N,);
            "" takes the plain similarity of the two maps.
        variants: for ``map``: the estimators. For the others: :data:`VARIANTS`.
        perturbation: for ``perturbation``: a key of :data:`explain2me.run.conditions.PERTURBATIONS`; else "".
        groups: groups of conditions whose means the tables show beside the single conditions.
        auroc: whether AUROC on its perturbed images is also reported source by source.
        low, high: range of its values.
        figures: the figures of the measure, in the order of the page.
        by_map: how the clean map changes the image, as a participle (``blurred``): each detector sees another image.
            "" where the perturbation does not depend on the map.
    """

    name: str
    title: str
    question: str
    meaning: str
    of: Literal["map", "perturbation", "pairs"]
    scores: tuple[Score, ...]
    function: str = ""
    variants: tuple[str, ...] = VARIANTS
    perturbation: str = ""
    groups: tuple[str, ...] = ()
    auroc: bool = False
    low: float = -1.0
    high: float = 1.0
    figures: tuple[FigureRow, ...] = ()
    by_map: str = ""

    @property
    def compares(self) -> bool:
        """Whether a value compares two maps. Then it has a chance level, and a split into kept and flipped decisions."""
        return self.of != "map"

    @property
    def of_pairs(self) -> bool:
        """Whether a value is of a pair of training runs."""
        return self.of == "pairs"

    @property
    def runs_per_value(self) -> int:
        """Number of training runs that one value is computed from: 1, or 2 for ``pairs``."""
        return 2 if self.of_pairs else 1

    @property
    def has_levels(self) -> bool:
        """Whether its config field lists kinds and levels of corruptions; else the field is true or false."""
        return self.perturbation == "corruption"

    @property
    def has_mean_over_conditions(self) -> bool:
        """Whether the tables show the mean over all its conditions."""
        return any(score.condition is None for score in self.scores)

    def load(self) -> Callable[..., Any] | None:
        """Import its function; None where the plain similarity is taken."""
        return pkgutil.resolve_name(self.function) if self.function else None


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        Measure(
            name="entropy",
            title="Entropy",
            question="Does the detector look at something, or everywhere?",
            meaning="0: all salience in one cell. 1: spread evenly. Lower is more focused; but a focused detector may "
            "look at the wrong place, so see the maps.",
            of="map",
            function="explain2me.measures.entropy:entropy",
            variants=("spatial", "intensity"),
            low=0.0,
            scores=(Score("entropy", "entropy", CLEAN, higher_is_better=False),),
            figures=(FigureRow("extremes", "fig2-entropy", "Focused and spread maps", "entropy_gallery"),),
        ),
        Measure(
            name="noise",
            title="Reaction to noise",
            question="Does it look at the same place when the image is noisy?",
            meaning="1: the map did not change. Higher is better, and only as far as it is above the chance level.",
            of="perturbation",
            perturbation="corruption",
            scores=(
                Score("noise", "noise ({condition})", "level", higher_is_better=True, preferred="salt_pepper@0.05"),
            ),
            figures=(
                FigureRow("level_curve", "fig4-noise", "Similarity of maps against the level of noise", "noise_curve"),
                FigureRow("perturbed", "fig3-noise", "What noise does to a map", "noise_gallery"),
            ),
        ),
        Measure(
            name="resilience",
            title="Resilience to transforms",
            question="Does its gaze follow the object when it is shifted, flipped or turned?",
            meaning="1: the map, moved back, is the one before. Higher is better.",
            of="perturbation",
            function="explain2me.measures.resilience:resilience",
            perturbation="transform",
            groups=("shifts", "flips", "rotations"),
            scores=(Score("resilience", "resilience", None, higher_is_better=True),),
            figures=(
                FigureRow(
                    "transforms", "fig5-transforms", "Maps of transformed images, and moved back", "transform_gallery"
                ),
            ),
        ),
        Measure(
            name="focus",
            title="Focus",
            question="Is the region that the map marks the one that matters?",
            meaning="With the salient region blurred the map should change (lower is better); with the rest blurred it "
            "should not (higher is better). AUROC should follow.",
            of="perturbation",
            perturbation="blur",
            auroc=True,
            scores=(
                Score(
                    "focus_salient",
                    "focus, salient blurred",
                    "focus_salient",
                    higher_is_better=False,
                    words="salient region blurred",
                ),
                Score(
                    "focus_nonsalient",
                    "focus, rest blurred",
                    "focus_nonsalient",
                    higher_is_better=True,
                    words="rest blurred",
                ),
            ),
            figures=(FigureRow("perturbed", "fig7-focus", "What blurring by salience does", "focus_gallery"),),
            by_map="blurred",
        ),
        Measure(
            name="stability",
            title="Stability across training runs",
            question="Do independently trained copies look at the same place?",
            meaning="1: all training runs give the same map. Higher is better: a low value says that the next training "
            "may look elsewhere.",
            of="pairs",
            scores=(Score("stability", "stability", CLEAN, higher_is_better=True),),
            figures=(
                FigureRow(
                    "matrices", "stability-matrix", "Agreement of each pair of training runs", "stability_matrices"
                ),
                FigureRow("runs", "fig6-runs", "One image, every training run", "runs_gallery"),
            ),
        ),
    )
}
"""Every measure by its name, in the order of the paper."""


def scores() -> Iterator[tuple[Measure, Score]]:
    """Every score with its measure, in the order of the tables."""
    for measure in MEASURES.values():
        for score in measure.scores:
            yield measure, score
