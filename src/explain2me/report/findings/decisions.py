"""Scores that change with the explained class, and measures whose two opposite scores are in the wrong order."""

from collections.abc import Iterator, Sequence
from typing import Any

from explain2me.report.findings.kinds import Finding, Rows
from explain2me.report.formats import is_known, number, share, value_interval
from explain2me.report.summary import LARGE_DEAD_SHARE, Row, RunScore, Tables, condition_words
from explain2me.statistics.scores import CLEAN, MEASURES, VARIANTS


def against_fixed(tables: Sequence[tuple[RunScore, Rows, Rows]]) -> Iterator[Finding]:
    """Detectors whose two variants disagree; one finding for all scores of a detector that decisions change.

    Each score has the rows of its variant ``predicted`` and those of ``fixed``.
    """
    changed: dict[str, list[str]] = {}
    for score, rows, fixed in tables:
        for name, row in rows.items():
            other = fixed.get(name)
            if other is None or not (_outside(row["mean"], other) and _outside(other["mean"], row)):
                continue
            if score.of_pairs:
                yield _depends_on_class(score, name, row, other)
            else:
                changed.setdefault(name, []).append(_change(score, row, other))
    for name, changes in changed.items():
        yield Finding(
            "decision",
            f"The maps of {name} change partly because its decisions change, not only because it looks elsewhere. Predicted class "
            f"against the class predicted for the clean image: {'; '.join(changes)}.",
            (name,),
        )


def wrong_way(tables: Tables) -> Iterator[Finding]:
    """Measures with two scores of opposite direction where the one that should be lower is significantly higher."""
    for measure in MEASURES.values():
        scores = [score for score in tables.columns if score.measure == measure.name]
        by_direction = {score.higher_is_better: score for score in scores}
        if len(scores) == len(by_direction) == 2:
            yield from _scores_wrong_way(tables, by_direction[False], by_direction[True])
    for measure in MEASURES.values():
        directions = {score.higher_is_better: score.condition for score in measure.scores}
        if measure.auroc and len(measure.scores) == len(directions) == 2:
            yield from _aurocs_wrong_way(tables, str(directions[False]), str(directions[True]))


def _depends_on_class(score: RunScore, name: str, row: Any, other: Any) -> Finding:
    disagree = f" {share(1 - row['kept_share'])} of the pairs of runs disagree." if is_known(row["kept_share"]) else ""
    text = (
        f"In {score.name}, the value of {name} depends on the explained class: {number(row['mean'])} for the predicted class, "
        f"{number(other['mean'])} for the true class.{disagree}"
    )
    return Finding("decision", text, (name,))


def _change(score: RunScore, row: Any, other: Any) -> str:
    """Both values of a score, with what explains their difference in brackets."""
    dead = max(each.get("dead_share") or 0.0 for each in (row, other))
    reasons = [f"{share(1 - row['kept_share'])} of the decisions changed"] if is_known(row["kept_share"]) else []
    if dead >= LARGE_DEAD_SHARE:
        reasons.append(f"the two values are over different images, because {share(dead)} of the maps of one are dead")
    because = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{score.name} {number(row['mean'])} against {number(other['mean'])}{because}"


def _scores_wrong_way(tables: Tables, lower: RunScore, higher: RunScore) -> Iterator[Finding]:
    """Detectors with both variants in the wrong order; maps that die have changed most, so few may be dead."""
    low_words, high_words = (condition_words(str(score.condition)) for score in (lower, higher))
    lows, highs = ({variant: tables.totals(score, variant) for variant in VARIANTS} for score in (lower, higher))
    for name in tables.detectors:
        if all(_in_wrong_order(lows[variant].get(name), highs[variant].get(name)) for variant in VARIANTS):
            low, high = lows[lower.variant][name], highs[higher.variant][name]
            yield Finding(
                "wrong-way",
                f"The {lower.measure} of {name} goes the wrong way: its similarity should be lower with the {low_words} than with the "
                f"{high_words}, but it is higher ({_value(low, 'mean')} against {_value(high, 'mean')}), also with the class held fixed.",
                (name,),
            )


def _in_wrong_order(lower: Row | None, higher: Row | None) -> bool:
    if lower is None or higher is None or max(lower["dead_share"], higher["dead_share"]) >= LARGE_DEAD_SHARE:
        return False
    return bool(lower["ci_low"] > higher["ci_high"])


def _aurocs_wrong_way(tables: Tables, lower: str, higher: str) -> Iterator[Finding]:
    clean, low_rows, high_rows = (tables.aurocs(condition) for condition in (CLEAN, lower, higher))
    for name in (name for name in low_rows if name in high_rows and name in clean):
        low, high = low_rows[name], high_rows[name]
        if clean[name]["ci_low"] > 0.5 and low["ci_low"] > high["ci_high"]:
            yield Finding(
                "wrong-way",
                f"The AUROC of {name} goes the wrong way: it should be lower with the {condition_words(lower)} than with the "
                f"{condition_words(higher)}, but it is higher ({_value(low, 'auroc')} against {_value(high, 'auroc')}).",
                (name,),
            )


def _value(row: Row, column: str) -> str:
    return value_interval(row[column], row["ci_low"], row["ci_high"])


def _outside(value: float, row: Any) -> bool:
    """Whether a value lies outside a known interval."""
    return is_known(row["ci_low"]) and not row["ci_low"] <= value <= row["ci_high"]
