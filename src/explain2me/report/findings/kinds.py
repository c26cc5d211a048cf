"""A finding, its kinds, and the rules that all findings follow."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from explain2me.report.formats import is_known
from explain2me.report.summary import LARGE_DEAD_SHARE, Row
from explain2me.statistics.cells import FEW_CELLS

Kind = Literal["none", "differs", "alike", "note", "runs", "chance", "wrong-way", "decision", "dead", "absent"]
TAGS: dict[Kind, str] = {
    "none": "no reason to choose",
    "differs": "significantly different",
    "alike": "not significantly different",
    "note": "note",
    "runs": "few training runs",
    "chance": "chance",
    "wrong-way": "wrong way",
    "decision": "decisions",
    "dead": "dead maps",
    "absent": "missing",
}
"""Each kind in words, the most decisive first."""
RULES = (
    "Two detectors are significantly different where the 95 % interval of their difference, over other images and other training runs, "
    "excludes 0. Where it contains 0 they are not significantly different, which does not show that they are equal. A difference that "
    "appears, disappears or reverses above the chance level, or that disappears or reverses with the class held fixed, is reported as such. A "
    "score is no better than chance where the interval of its chance-corrected value reaches 0 or lies below it. A score depends on "
    "changed decisions where the mean of each variant, predicted and fixed, lies outside the interval of the other. A difference between "
    "detectors that disappears in the variant fixed is a difference in decisions, not in where they look. A measure with two opposite "
    "scores goes the wrong way where their intervals do not overlap and are in the wrong order, in both variants and with less than "
    f"{LARGE_DEAD_SHARE:.0%} dead maps; so does AUROC under the same two conditions, where AUROC on the clean images is above 0.5. No "
    "detector ranks better than chance where the interval of every AUROC over all images contains 0.5. Runs that predict one class for images "
    f"of several classes, and maps with fewer than {FEW_CELLS} cells, are reported."
)

Pair = tuple[str, str]
Rows = Mapping[str, Row]
"""A row of the summary by detector."""
Pairs = Mapping[Pair, Row]
"""The row of a difference by its two detectors."""


class Finding(NamedTuple):
    """One sentence or two.

    Attributes:
        detectors: that it is about.
        pairs: that are not significantly different in ``score``.
    """

    kind: Kind
    text: str
    detectors: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    score: str = ""


def sign(low: float | None, high: float | None) -> int | None:
    """-1, 1, or 0 where the interval of a difference contains 0; None where it is not known.

    >>> sign(-0.3, -0.1), sign(-0.1, 0.1), sign(None, None)
    (-1, 0, None)
    """
    if not is_known(low) or not is_known(high):
        return None
    return int(low > 0) - int(high < 0)
