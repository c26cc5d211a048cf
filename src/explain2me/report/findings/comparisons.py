"""Pairs of detectors: which are significantly different in a score, and whether that holds above chance and for a fixed class."""

from collections.abc import Iterator, Sequence

from explain2me.report.findings.kinds import Finding, Pair, Pairs, Rows, sign
from explain2me.report.formats import is_known, number, share, value_interval
from explain2me.report.summary import AUROC, LARGE_DEAD_SHARE, Row, RunScore, Tables, single_run_detectors

MOST_PAIRS = 100
"""Named in one finding; 14 detectors have fewer."""


def compare(score: RunScore, rows: Rows, pairs: Pairs, fixed: Pairs) -> Iterator[Finding]:
    """Each pair of detectors in one score: which one is better, or that they are not significantly different.

    ``rows`` hold the mean of each detector, ``pairs`` their differences, ``fixed`` those in the variant ``fixed`` if there is one.
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


def _difference(score: RunScore, rows: Rows, row: Row, fixed: Row | None) -> Finding:
    """One detector is better, and what limits that."""
    better, worse = _ordered(row, score)
    return Finding(
        "differs",
        f"{better} is better than {worse} in {score.name} ({score.better} is better): {number(rows[better]['mean'])} against "
        f"{number(rows[worse]['mean'])}, a difference of {_signed(row, better)}.{_single_runs(score, row)}"
        f"{_changes(score, row, fixed, better)}{_dead_shares(score, better, worse, rows)}",
        (better, worse),
    )


def _ordered(row: Row, score: RunScore, column: str = "difference") -> tuple[str, str]:
    """The better detector of a pair, and the other."""
    names = (row["detector"], row["other_detector"])
    return names if (row[column] > 0) == score.higher_is_better else names[::-1]


def _signed(row: Row, first: str, name: str = "") -> str:
    """A difference with its interval, of ``first`` minus the other; ``name`` is that of another difference in the row."""
    value, low, high = (row[column] for column in _columns(name))
    if first != row["detector"]:
        value, low, high = -value, -high, -low
    return value_interval(value, low, high, signed=True)


def _columns(name: str) -> tuple[str, str, str]:
    """Columns of a difference and its interval."""
    return (name, f"{name}_low", f"{name}_high") if name else ("difference", "ci_low", "ci_high")


def _single_runs(score: RunScore, row: Row) -> str:
    """A warning where the difference says nothing about other training runs."""
    names = single_run_detectors(row)
    number_of_runs = f"{'have' if len(names) > 1 else 'has'} {'one pair of runs' if score.of_pairs else 'one run'}"
    reason = f"{' and '.join(names)} {number_of_runs}"
    return f" This difference does not generalise to other training runs, because {reason}." if names else ""


def _changes(score: RunScore, row: Row, fixed: Row | None, better: str) -> str:
    """How a difference changes above the chance levels, with the same class explained throughout, or only with both."""
    held, reason = "true class explained", ""
    if not score.of_pairs:
        held, reason = "class held fixed", ": a difference in decisions"
    with_class = _change(f"With the {held}", row, fixed, better, reason=reason)
    if not score.higher_is_better:
        return with_class
    changes = _change("Above chance", row, row, better, column="corrected") + with_class
    return changes or _change(f"Above chance and with the {held} together", row, fixed, better, column="corrected")


def _change(change: str, row: Row, other: Row | None, better: str, *, column: str = "", reason: str = "") -> str:
    """How a difference changes in another row or column, with the reason why it disappears; empty where it stays significant."""
    if other is None:
        return ""
    direction = sign(*(other[name] for name in _columns(column)[1:]))
    if direction in (None, sign(row["ci_low"], row["ci_high"])):
        return ""
    words = "the difference is reversed" if direction else "not significantly different"
    return f" {change}, {words} ({_signed(other, better, column)}){'' if direction else reason}."


def _only_above_chance(score: RunScore, row: Row) -> Iterator[Finding]:
    """A difference that is significant only above the chance levels."""
    if score.higher_is_better and sign(row["corrected_low"], row["corrected_high"]):
        better, worse = _ordered(row, score, "corrected")
        yield Finding(
            "chance",
            f"In {score.name}, {better} and {worse} are not significantly different, but above chance {better} is better "
            f"({_signed(row, better, 'corrected')}).{_single_runs(score, row)}",
            (better, worse),
        )


def _dead_shares(score: RunScore, better: str, worse: str, rows: Rows) -> str:
    """A warning where the two values are means over different images."""
    shares = [rows[name].get("dead_share") or 0.0 for name in (better, worse)]
    if max(shares) < LARGE_DEAD_SHARE:
        return ""
    dead = "pairs of maps hold a dead one" if score.compares else "maps are dead"
    return (
        f" Caution: {share(shares[0])} and {share(shares[1])} of their {dead} and are in no mean, so the two values are over "
        f"different images."
    )


def _names(pairs: Sequence[Pair]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for pair in pairs for name in pair))


def _listed_pairs(pairs: Sequence[Pair]) -> str:
    more = f", and {len(pairs) - MOST_PAIRS} more pairs (tables/differences.csv)" if len(pairs) > MOST_PAIRS else ""
    return ", ".join(" and ".join(pair) for pair in pairs[:MOST_PAIRS]) + more
