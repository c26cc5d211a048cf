"""The summary tables of a run, read when they are first used, and the questions that sheets, figures and findings ask.

Imports neither torch nor matplotlib, so that ``explain2me show`` starts at once.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd

from explain2me.errors import RunFolderError
from explain2me.run.checks.tables import refuse_empty_cells
from explain2me.run.folder import Run, Stretch, stretches_of
from explain2me.run.schema import TEXT_COLUMNS
from explain2me.statistics.scores import ALL, CLEAN, MEASURES, Measure, Score, scores

SOFTMAX = "softmax"
"""The ranking of the AUROC that stands in tables and text."""
LARGE_DEAD_SHARE = 0.05
"""From this share of dead maps on, means of two detectors are over images too different to compare."""

Row = dict[str, Any]
"""One row of a summary table."""


class RunScore(NamedTuple):
    """A score as one run has it: a noise level is chosen, and its name is complete.

    Attributes:
        key: short unique name, as in columns of scores by image.
        measure, variant, condition: where its rows are in the tables; condition None is the mean over all conditions.
    """

    key: str
    name: str
    measure: str
    variant: str
    condition: str | None
    higher_is_better: bool

    @property
    def compares(self) -> bool:
        """Whether a value compares two maps, and so has a chance level."""
        return self.measure in MEASURES and MEASURES[self.measure].compares

    @property
    def of_pairs(self) -> bool:
        """Whether a value is of a pair of training runs."""
        return self.measure in MEASURES and MEASURES[self.measure].of_pairs

    @property
    def better(self) -> str:
        """``higher`` or ``lower``."""
        return "higher" if self.higher_is_better else "lower"


AUROC = RunScore("auroc", "AUROC", "auroc", SOFTMAX, CLEAN, True)


def _summary(name: str) -> functools.cached_property[pd.DataFrame]:
    return functools.cached_property(lambda tables: tables._read(name))


class Tables:
    """Summary tables of a run as frames, see docs/design.md; names are as in the files, not yet made printable."""

    measures = _summary("measures")
    differences = _summary("differences")
    performance = _summary("performance")
    quarantine = _summary("quarantine")
    precision = _summary("precision")

    def __init__(self, run: Run) -> None:
        self.run = run
        self._made_from: bytes | None = None

    def matrix(self, measure: Measure) -> pd.DataFrame:
        """Mean agreement of each pair of training runs, in one measure of pairs."""
        return self._read(f"{measure.name}_matrix")

    @functools.cached_property
    def columns(self) -> list[RunScore]:
        """The scores that this run has, in the order of the tables."""
        present = set(zip(self.measures.measure, self.measures.variant, strict=True))
        return [
            self._run_score(measure, score)
            for measure, score in scores()
            if (measure.name, measure.variants[0]) in present
        ]

    @functools.cached_property
    def detectors(self) -> list[str]:
        """Names, in the order of the config."""
        return [detector.name for detector in self.run.config.detectors]

    @functools.cached_property
    def stretches(self) -> list[Stretch]:
        """Sources, in the order of the images."""
        return stretches_of(self.run.image_table)

    @property
    def labelled(self) -> bool:
        """Whether images have labels."""
        return self.run.image_table["label"].null_count < len(self.run.image_table)

    def first(self, num_detectors: int, num_sources: int) -> "Tables":
        """These tables, of which figures draw the first detectors and sources; the same object where there are no more."""
        if len(self.detectors) <= num_detectors and len(self.stretches) <= num_sources:
            return self
        some = copy.copy(self)
        some.detectors, some.stretches = self.detectors[:num_detectors], self.stretches[:num_sources]
        return some

    def trained(self, detector: str) -> list[Row]:
        """How each run of a detector was trained, where run.json has it."""
        trainings = self.run.record.get("trained", {})
        hashes = [model.weights_sha256 for model in self.run.models_of(detector)]
        return [trainings[sha256] for sha256 in hashes if sha256 in trainings]

    def source_names(self) -> list[str]:
        """A name for each stretch: its source, with its label in front where two labels share one."""
        sources = [stretch.source for stretch in self.stretches]
        return [
            f"{stretch.label} {stretch.source}" if sources.count(stretch.source) > 1 else stretch.source
            for stretch in self.stretches
        ]

    def totals(self, score: RunScore, variant: str | None = None) -> dict[str, Row]:
        """The row over all images of each detector in a score, in its own variant or another one."""
        return {row["detector"]: row for row in self._over_all(self.measures, score, variant)}

    def pairs(self, score: RunScore, variant: str | None = None) -> dict[tuple[str, str], Row]:
        """The difference over all images of each pair of detectors in a score; none where there is one detector."""
        rows = self._over_all(self.differences, score, variant) if len(self.detectors) > 1 else []
        return {(row["detector"], row["other_detector"]): row for row in rows}

    def _over_all(self, rows: pd.DataFrame, score: RunScore, variant: str | None) -> list[Row]:
        rows = rows[(rows.measure == score.measure) & (rows.variant == (variant or score.variant))]
        rows = over_all(rows[self.main_similarity(rows)])
        return records(rows[rows.condition == (score.condition or ALL)])

    def aurocs(self, condition: str = CLEAN) -> dict[str, Row]:
        """The row over all images of each detector, mean over runs, under a condition; only those with an AUROC."""
        rows = self.performance
        if not len(rows):
            return {}
        rows = rows[(rows.run == ALL) & (rows.score == SOFTMAX) & (rows.condition == condition)]
        rows = rows[(rows.positives == ALL) & (rows.negatives == ALL) & rows.auroc.notna()]
        return {row["detector"]: row for row in records(rows)}

    def auroc_conditions(self) -> dict[str, str]:
        """Conditions under which AUROC is reported, in words: the clean one first."""
        names = {CLEAN: "as they are"}
        for measure in MEASURES.values():
            if measure.auroc:
                fixed = [name for score in measure.scores if (name := score.condition) and score_of(name) == score]
                names |= {condition: condition_words(condition) for condition in [*fixed, *self.conditions_of(measure)]}
        present = set(self.performance.condition) if len(self.performance) else set()
        return {condition: words for condition, words in names.items() if condition in present}

    def conditions_of(self, measure: Measure) -> list[str]:
        """Names of the conditions, groups of conditions and ``all`` that a measure has rows of."""
        return list(dict.fromkeys(self.measures.condition[self.measures.measure == measure.name]))

    def main_similarity(self, rows: pd.DataFrame) -> "pd.Series[bool]":
        """Which rows are of the similarity that text and figures use: SSIM, or else the first that was taken."""
        return rows.similarity.isna() | (rows.similarity == main_similarity(rows.similarity))

    def _read(self, name: str) -> pd.DataFrame:
        table = self.run.summary(name)
        refuse_empty_cells(self.run.folder / "summary" / f"{name}.parquet", table)
        made_from = (table.schema.metadata or {}).get(b"scores")
        if self._made_from is not None and made_from != self._made_from:
            raise RunFolderError(
                f"another process replaced the tables of {str(self.run.folder)!r} while they were read; call the same command again"
            )
        self._made_from = made_from
        frame = table.to_pandas()
        if not _is_whole(frame):
            raise RunFolderError(
                f"the rows of {self.run.folder / 'summary' / name}.parquet are not those that were written: some are doubled "
                f"or missing; call `explain2me summarise {self.run.folder}`"
            )
        return frame

    def _run_score(self, measure: Measure, score: Score) -> RunScore:
        condition = score.condition
        if condition == "level":
            condition = headline(self.conditions_of(measure), preferred=score.preferred)
        label = score.label.format(condition=condition)
        return RunScore(score.key, label, measure.name, measure.variants[0], condition, score.higher_is_better)


def _is_whole(rows: pd.DataFrame) -> bool:
    """Whether the words of each row are its own, and each AUROC has one of the clean images beside it."""
    words = [name for name in rows if name in TEXT_COLUMNS]
    if rows.duplicated(words).any():
        return False
    if "auroc" not in rows:
        return True
    others = [name for name in words if name != "condition"]
    return len(rows.drop_duplicates(others)) == int((rows.condition == CLEAN).sum())


def headline(conditions: Sequence[str], *, preferred: str) -> str:
    """The level that stands for a measure of several: the preferred one, or else the smallest above 0.

    >>> headline(["salt_pepper@0", "salt_pepper@0.02", "salt_pepper@0.1"], preferred="salt_pepper@0.05")
    'salt_pepper@0.02'
    """
    positive = [name for name in conditions if level_of(name) > 0] or list(conditions)
    return preferred if preferred in positive else min(positive, key=level_of)


def level_of(condition: str) -> float:
    """The level in the name of a condition.

    >>> level_of("salt_pepper@0.05")
    0.05
    """
    return float(condition.partition("@")[2])


def main_similarity(names: "pd.Series[str]") -> str:
    """The similarity that text and figures use: SSIM, or else the first of the alphabet that was taken."""
    known = sorted(set(names.dropna()))
    return "ssim" if "ssim" in known or not known else known[0]


def records(frame: pd.DataFrame) -> list[Row]:
    """Rows of a table."""
    rows: Any = frame.to_dict("records")
    return rows


def over_all(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows over all labels and sources."""
    return rows[(rows.label == ALL) & (rows.source == ALL)]


def main_first(similarity: str | None, main: str) -> tuple[bool, str]:
    """A sort key that puts the main similarity before the others."""
    name = similarity if isinstance(similarity, str) else main
    return name != main, name


def single_run_detectors(row: Row) -> list[str]:
    """The detectors of a difference that have one run, or one pair of runs: its interval is over images alone."""
    measure = MEASURES.get(row["measure"])  # None for AUROC
    enough = 3 if measure and measure.of_pairs else 2
    counts = ((row["detector"], row["num_runs"]), (row["other_detector"], row["num_other_runs"]))
    return [name for name, count in counts if count < enough]


def score_of(condition: str) -> Score | None:
    """The score that a condition alone defines, as the two conditions of a blur do; None for any other condition."""
    return next((score for _, score in scores() if score.condition == condition != CLEAN), None)


def condition_words(condition: str) -> str:
    """A condition in words.

    >>> condition_words("salt_pepper@0.05")
    'salt pepper@0.05'
    """
    score = score_of(condition)
    return score.words if score and score.words else condition.replace("_", " ")


def label_of(measure: str, condition: str, similarity: str | None) -> str:
    """Name of a number in tables: its score, its similarity where that is not SSIM, and which direction is better."""
    if measure not in MEASURES:
        name, higher = AUROC.name, AUROC.higher_is_better
    else:
        of_measure = MEASURES[measure].scores
        score = next((score for score in of_measure if score.condition == condition), of_measure[0])
        name, higher = score.label.format(condition=condition), score.higher_is_better
        if score.condition not in (condition, "level") and condition != ALL:
            name = f"{measure}, {condition}"
    other = f" [{similarity}]" if isinstance(similarity, str) and similarity != "ssim" else ""
    return f"{name}{other} {'↑' if higher else '↓'}"
