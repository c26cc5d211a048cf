"""THE TABLE of measures and their scores: one row a measure. Everything that names a measure is derived from it.

Config fields, conditions, score files, tables, figures, findings and the notebook read these rows. To add a measure,
write one file in ``measures/`` and one row here. This module imports nothing, so that the config can be checked before
PyTorch is there; functions are named as ``module:name`` and imported when they are called.
"""

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

CLEAN = "clean"
"""Name of the condition without a perturbation."""
VARIANTS = ("predicted", "fixed")
"""The class that a map of a compared pair explains: the predicted one, or one held fixed."""


class Score(NamedTuple):
    """One number of the tables by detector.

    Attributes:
        key: short unique name, used for columns of scores by image.
        label: in words; ``{condition}`` stands for the name of the condition.
        condition: the condition that it is of; None for the mean over all conditions of the measure; ``"level"`` for
            one condition for each level.
        higher_is_better: the direction of the paper.
    """

    key: str
    label: str
    condition: str | None
    higher_is_better: bool


class FigureRow(NamedTuple):
    """A figure that a measure feeds: name of the drawing function, name of its file, title."""

    draw: str
    file: str
    title: str


@dataclass(frozen=True)
class Measure:
    """One measure of the paper's section 3.

    Attributes:
        name: as in configs, score files and tables.
        title: heading of its section.
        question: that it answers, for people.
        meaning: of its ends and its direction, for people.
        of: ``map`` scores a single clean map, ``perturbation`` compares a perturbed map with the clean one, ``pairs``
            compares the clean maps of each pair of training runs of a detector.
        function: for ``map``: (maps (N, h, w), estimator) -> (N,); for ``perturbation``: (clean maps, perturbed maps,
            condition kind, input size, similarity) -> (N,), or "" for the plain similarity; "" for ``pairs``.
        variants: of a ``map`` measure, the estimators; of the others, the class that is explained.
        perturbation: of a ``perturbation`` measure, a key of :data:`explain2me.run.conditions.PERTURBATIONS`.
        groups: groups of its conditions that tables show beside their mean over all.
        auroc: whether AUROC is also taken on its perturbed images.
        low, high: range of its values.
        scores: its numbers in tables, figures and findings.
        figures: what is drawn of it, in the order of the page.
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

    @property
    def compares(self) -> bool:
        """Whether a value compares two maps, and so has a chance level and a split into kept and flipped decisions."""
        return self.of != "map"

    @property
    def of_pairs(self) -> bool:
        """Whether a value is of a pair of training runs instead of one run."""
        return self.of == "pairs"

    @property
    def has_levels(self) -> bool:
        """Whether its config field is a list of levels instead of true or false."""
        return any(score.condition == "level" for score in self.scores)

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
            figures=(FigureRow("extremes", "fig2-entropy", "Focused and spread maps"),),
        ),
        Measure(
            name="noise",
            title="Reaction to noise",
            question="Does it look at the same place when the image is noisy?",
            meaning="1: the map did not change. Higher is better, and only as far as it is above the chance level.",
            of="perturbation",
            perturbation="corruption",
            scores=(Score("noise", "noise ({condition})", "level", higher_is_better=True),),
            figures=(
                FigureRow("level_curve", "fig4-noise", "Similarity of maps against the level of noise"),
                FigureRow("perturbed", "fig3-noise", "What noise does to a map"),
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
            figures=(FigureRow("transforms", "fig5-transforms", "Maps of transformed images, and moved back"),),
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
                Score("focus_salient", "focus, salient blurred", "focus_salient", higher_is_better=False),
                Score("focus_nonsalient", "focus, rest blurred", "focus_nonsalient", higher_is_better=True),
            ),
            figures=(FigureRow("perturbed", "fig7-focus", "What blurring by salience does"),),
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
                FigureRow("matrices", "stability-matrix", "Agreement of each pair of training runs"),
                FigureRow("runs", "fig6-runs", "One image, every training run"),
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
