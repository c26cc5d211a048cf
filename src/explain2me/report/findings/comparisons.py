"""Pairs of detectors: which are significantly different in a score, and whether that holds above chance and for a fixed class."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from explain2me.report.findings.kinds import Finding, Pair, Pairs, Rows, sign
from explain2me.report.formats import is_known, number, share, value_interval
from explain2me.report.summary import AUROC, LARGE_DEAD_SHARE, RunScore, Tables, single_run_detectors


def compare(score: RunScore, rows: Rows, pairs: Pairs, fixed: Pairs) -> Iterator[Finding]:
    """Each pair of detectors in one score: which one is better, or that they are not significantly different.

    Args:
        score: of which ``rows`` hold the mean of each detector.
        rows: by detector.
        pairs: the differences in this score.
        fixed: those in its variant ``fixed``; empty where it has none.
    """
    alike: list[Pair] = []
    unknown: list[Pair] = []
    for names, row in pairs.items():
        direction = sign(row["ci_low"], row["ci_high"])
        if direction:
            yield _difference(score, rows, row, fixed.get(names))
        elif direction == 0:
            alike.append(names)
            yield from _only_above_chance(score, row)
        elif is_known(row["difference"]):
            unknown.append(names)
    if alike:
        yield _not_different(score.name, alike)
    if unknown:
        text = f"Too few images or training runs with a value to compare in {score.name}: {_listed_pairs(unknown)}."
        yield Finding("absent", text, _names(unknown))


def together(findings: Sequence[Finding]) -> list[Finding]:
    """One sentence for all scores in which the same pairs are not significantly different; other findings as they are."""
    scores: dict[tuple[Pair, ...], list[str]] = {}
    for finding in findings:
        if finding.kind == "alike":
            scores.setdefault(finding.pairs, []).append(finding.score)
    alike = [_not_different("; ".join(names), pairs) for pairs, names in scores.items()]
    return [*(finding for finding in findings if finding.kind != "alike"), *alike]


def number_of_comparisons(tables: Tables) -> Iterator[Finding]:
    """How many differences would be significant by chance, among those over several training runs."""
    rows = [row for score in (AUROC, *tables.columns) for row in tables.pairs(score).values()]
    single = [row for row in rows if single_run_detectors(row)]
    signs = [sign(row["ci_low"], row["ci_high"]) for row in rows if not single_run_detectors(row)]
    total, significant = sum(one is not None for one in signs), sum(map(bool, signs))
    not_counted = f" ({len(single)} over single runs or single pairs of runs not counted)" if single else ""
    if total > 1 and significant:
        expected = f"{0.05 * total:.2f}".rstrip("0").rstrip(".")
        yield Finding(
            "note",
            f"{significant} of {total} comparisons over images and training runs are significant{not_counted}. With no true "
            f"differences, about {expected} of {total} would be significant by chance.",
        )


def _not_different(score: str, pairs: Sequence[Pair]) -> Finding:
    text = f"Not significantly different in {score}: {_listed_pairs(pairs)}."
    return Finding("alike", text, _names(pairs), tuple(pairs), score)


def _difference(score: RunScore, rows: Rows, row: Mapping[str, Any], fixed: Mapping[str, Any] | None) -> Finding:
    """One detector is better, and what limits that."""
    better, worse = _ordered(row, score)
    return Finding(
        "differs",
        f"{better} is better than {worse} in {score.name} ({score.better} is better): {number(rows[better]['mean'])} against "
        f"{number(rows[worse]['mean'])}, a difference of {_signed(row, better)}.{_single_runs(score, row)}"
        f"{_above_chance(score, row)}{_class_fixed(score, row, fixed, better)}{_both(score, row, fixed, better)}"
        f"{_dead_shares(better, worse, rows)}",
        (better, worse),
    )


def _ordered(row: Mapping[str, Any], score: RunScore, column: str = "difference") -> tuple[str, str]:
    """The better detector of a pair, and the other."""
    names = (row["detector"], row["other_detector"])
    return names if (row[column] > 0) == score.higher_is_better else names[::-1]


def _signed(row: Mapping[str, Any], first: str, name: str = "") -> str:
    """A difference with its interval, of ``first`` minus the other; ``name`` is that of another difference in the row."""
    columns = [name, f"{name}_low", f"{name}_high"] if name else ["difference", "ci_low", "ci_high"]
    value, low, high = (row[column] for column in columns)
    if first != row["detector"]:
        value, low, high = -value, -high, -low
    return value_interval(value, low, high, signed=True)


def _single_runs(score: RunScore, row: Mapping[str, Any]) -> str:
    """A warning where the difference says nothing about other training runs."""
    names = single_run_detectors(row)
    if not names:
        return ""
    runs = "one pair of runs" if score.of_pairs else "one run"
    verb = "have" if len(names) > 1 else "has"
    return f" It does not generalise to other training runs: {' and '.join(names)} {verb} {runs}."


def _above_chance(score: RunScore, row: Mapping[str, Any]) -> str:
    """How a difference changes when each score is taken above its chance level; empty where it stays significant."""
    direction = sign(row["corrected_low"], row["corrected_high"])
    if not score.higher_is_better or direction in (None, sign(row["ci_low"], row["ci_high"])):
        return ""
    return f" Above chance, {_in_words(direction)} ({_signed(row, _ordered(row, score)[0], 'corrected')})."


def _only_above_chance(score: RunScore, row: Mapping[str, Any]) -> Iterator[Finding]:
    """A difference that is significant only above the chance levels."""
    if score.higher_is_better and sign(row["corrected_low"], row["corrected_high"]):
        better, worse = _ordered(row, score, "corrected")
        yield Finding(
            "chance",
            f"In {score.name}, {better} and {worse} are not significantly different, but above chance {better} is better "
            f"({_signed(row, better, 'corrected')}).{_single_runs(score, row)}",
            (better, worse),
        )


def _class_fixed(score: RunScore, row: Mapping[str, Any], fixed: Mapping[str, Any] | None, better: str) -> str:
    """How a difference changes when the same class is explained throughout; empty where it stays significant."""
    direction = sign(fixed["ci_low"], fixed["ci_high"]) if fixed else None
    if fixed is None or direction in (None, sign(row["ci_low"], row["ci_high"])):
        return ""
    reason = "" if score.of_pairs or direction else ": a difference in decisions"
    return f" With the {_fixed_class(score)}, {_in_words(direction)} ({_signed(fixed, better)}){reason}."


def _both(score: RunScore, row: Mapping[str, Any], fixed: Mapping[str, Any] | None, better: str) -> str:
    """How a difference that survives each change alone changes with both: the class held fixed, and above chance."""
    if fixed is None or _above_chance(score, row) or _class_fixed(score, row, fixed, better):
        return ""
    direction = sign(fixed["corrected_low"], fixed["corrected_high"])
    if not score.higher_is_better or direction in (None, sign(row["ci_low"], row["ci_high"])):
        return ""
    change = f"Above chance and with the {_fixed_class(score)} together"
    return f" {change}, {_in_words(direction)} ({_signed(fixed, better, 'corrected')})."


def _fixed_class(score: RunScore) -> str:
    return "true class explained" if score.of_pairs else "class held fixed"


def _in_words(direction: int | None) -> str:
    return "the difference is reversed" if direction else "not significantly different"


def _dead_shares(better: str, worse: str, rows: Rows) -> str:
    """A warning where the two values are means over different images."""
    shares = [rows[name].get("dead_share") or 0.0 for name in (better, worse)]
    if max(shares) < LARGE_DEAD_SHARE:
        return ""
    return f" Caution: {share(shares[0])} and {share(shares[1])} of their maps are dead and in no mean, so the two values are over different images."


def _names(pairs: Sequence[Pair]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for pair in pairs for name in pair))


def _listed_pairs(pairs: Sequence[Pair]) -> str:
    return ", ".join(" and ".join(pair) for pair in pairs)
