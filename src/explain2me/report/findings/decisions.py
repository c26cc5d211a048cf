"""Scores that change with the explained class, and measures whose two opposite scores are in the wrong order."""

from collections.abc import Iterator, Sequence
from typing import Any

from explain2me.report.findings.kinds import Finding, Rows
from explain2me.report.formats import is_known, number, share, value_interval
from explain2me.report.summary import LARGE_DEAD_SHARE, Row, RunScore, Tables, condition_words
from explain2me.statistics.scores import CLEAN, MEASURES, VARIANTS


def against_fixed(tables: Sequence[tuple[RunScore, Rows, Rows]]) -> Iterator[Finding]:
    """Detectors whose two variants disagree; one finding for all scores of a detector that decisions change.

    Args:
        tables: scores, each with the rows of its variant ``predicted``, and of ``fixed``.
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
        if len(scores) != 2 or scores[0].higher_is_better == scores[1].higher_is_better:
            continue
        lower, higher = sorted(scores, key=lambda score: score.higher_is_better)
        yield from _scores_wrong_way(tables, lower, higher)
    for measure in MEASURES.values():
        directions = {score.higher_is_better: score.condition for score in measure.scores}
        if measure.auroc and len(measure.scores) == len(directions) == 2:
            yield from _aurocs_wrong_way(tables, str(directions[False]), str(directions[True]))


def _depends_on_class(score: RunScore, name: str, row: Any, other: Any) -> Finding:
    disagree = f" {share(1 - row['kept_share'])} of the pairs of runs disagree." if is_known(row["kept_share"]) else ""
    return Finding(
        "decision",
        f"In {score.name}, the value of {name} depends on the explained class: {number(row['mean'])} for the predicted "
        f"class, {number(other['mean'])} for the true class.{disagree}",
        (name,),
    )


def _change(score: RunScore, row: Any, other: Any) -> str:
    """Both values of a score, with what explains their difference in brackets."""
    dead = max(each.get("dead_share") or 0.0 for each in (row, other))
    reasons = [f"{share(1 - row['kept_share'])} of the decisions changed"] if is_known(row["kept_share"]) else []
    if dead >= LARGE_DEAD_SHARE:
        reasons.append(f"the two values are over different images, because {share(dead)} of the maps of one are dead")
    return f"{score.name} {number(row['mean'])} against {number(other['mean'])}" + (
        f" ({'; '.join(reasons)})" if reasons else ""
    )


def _scores_wrong_way(tables: Tables, lower: RunScore, higher: RunScore) -> Iterator[Finding]:
    """Detectors with both variants in the wrong order; maps that die have changed most, so few may be dead."""
    totals = {variant: [tables.totals(score, variant) for score in (lower, higher)] for variant in VARIANTS}
    for name in tables.detectors:
        rows = {variant: [by.get(name) for by in both] for variant, both in totals.items()}
        if all(_in_wrong_order(*both) for both in rows.values()):
            first, second = (_value(row, row["mean"]) for row in rows[lower.variant] if row)
            yield Finding(
                "wrong-way",
                f"The {lower.measure} of {name} goes the wrong way: its similarity should be lower with the {_words(lower)} than with the "
                f"{_words(higher)}, but it is higher ({first} against {second}), also with the class held fixed.",
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
                f"{condition_words(higher)}, but it is higher ({_value(low, low['auroc'])} against {_value(high, high['auroc'])}).",
                (name,),
            )


def _words(score: RunScore) -> str:
    return condition_words(str(score.condition))


def _value(row: Row, value: float) -> str:
    return value_interval(value, row["ci_low"], row["ci_high"])


def _outside(value: float, row: Any) -> bool:
    """Whether a value lies outside a known interval."""
    return is_known(row["ci_low"]) and not row["ci_low"] <= value <= row["ci_high"]
