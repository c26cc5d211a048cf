"""What the numbers say, in plain words. Pure: summary rows in, sentences out; every sentence follows from a stated rule."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from explain2me.report.material import Material, Score, records

Kind = Literal["differs", "alike", "chance", "decision", "dead", "absent", "note"]
LARGE_DEAD_SHARE = 0.05
RULES = (
    "Two detectors differ where their 95 % intervals do not overlap; where they overlap, the data do not tell them apart. "
    "A score is no better than chance where the interval of its chance-corrected value reaches 0 or lies below it. A score "
    "reflects changed decisions where the variants predicted and fixed lie outside each other's intervals."
)


class Finding(NamedTuple):
    """One sentence, and of what kind it is."""

    kind: Kind
    measure: str
    text: str


def findings(material: Material) -> list[Finding]:
    """Everything that a reader should know before choosing, most decisive first."""
    found = [*_performance(material)]
    for score in material.columns:
        rows = material.totals(score.measure, score.variant, score.condition or "all")
        found += _compare(score, rows)
        if score.measure != "entropy":
            found += _against_chance(score, rows)
            fixed = material.totals(score.measure, "fixed", score.condition or "all")
            found += _against_fixed(score, rows, fixed)
    found += _dead(material)
    found += _absent(material)
    order = ("differs", "chance", "decision", "dead", "absent", "alike", "note")
    return sorted(found, key=lambda finding: order.index(finding.kind))


def overlaps(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool | None:
    """Whether two 95 % intervals overlap; None where one of them is not known.

    >>> overlaps({"ci_low": 0.1, "ci_high": 0.3}, {"ci_low": 0.25, "ci_high": 0.5})
    True
    """
    limits = [a["ci_low"], a["ci_high"], b["ci_low"], b["ci_high"]]
    if any(limit is None or math.isnan(limit) for limit in limits):
        return None
    return bool(limits[0] <= limits[3] and limits[2] <= limits[1])


def _performance(material: Material) -> Iterator[Finding]:
    rows = auroc_rows(material)
    if not rows:
        return
    score = Score("auroc", "AUROC", "auroc", "", None, True)
    yield from _compare(score, {name: row | {"mean": row["auroc"]} for name, row in rows.items()})
    for name, row in rows.items():
        if not math.isnan(row["ci_high"]) and row["ci_high"] < 0.5:
            yield Finding(
                "chance",
                "auroc",
                f"The AUROC of {name} is below 0.5 ({_interval(row | {'mean': row['auroc']})}): its classes may be in "
                f"another order than its logits (data.classes).",
            )
        elif not math.isnan(row["ci_low"]) and row["ci_low"] <= 0.5:
            yield Finding(
                "chance",
                "auroc",
                f"The AUROC of {name} is not above chance ({_interval(row | {'mean': row['auroc']})}).",
            )


def auroc_rows(material: Material) -> dict[str, dict[str, Any]]:
    """The row of each detector over all images, mean over runs, for the clean images."""
    rows = material.performance
    if not len(rows):
        return {}
    rows = rows[(rows.run == "all") & (rows.score == "softmax") & (rows.condition == "clean")]
    rows = rows[(rows.positives == "all") & (rows.negatives == "all")]
    return {row["detector"]: row for row in records(rows) if not math.isnan(row["auroc"])}


def _compare(score: Score, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Each pair of detectors in one score: better beyond the intervals, or not told apart."""
    known = {name: row for name, row in rows.items() if not math.isnan(row["mean"])}
    alike: list[str] = []
    for a, b in itertools.combinations(known, 2):
        overlap = overlaps(known[a], known[b])
        if overlap is None:
            continue
        if overlap:
            alike.append(f"{a} and {b}")
            continue
        better, worse = sorted((a, b), key=lambda name: known[name]["mean"], reverse=score.higher_is_better)
        direction = "higher" if score.higher_is_better else "lower"
        yield Finding(
            "differs",
            score.measure,
            f"{better} does better than {worse} in {score.name} ({direction} is better): {_interval(known[better])} "
            f"against {_interval(known[worse])}.",
        )
    if alike:
        yield Finding("alike", score.measure, f"Not told apart in {score.name}: {_listed(alike)}.")


def _against_chance(score: Score, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    for name, row in rows.items():
        low = row["corrected_low"]
        if score.higher_is_better and low is not None and not math.isnan(low) and low <= 0:
            yield Finding(
                "chance",
                score.measure,
                f"In {score.name}, {name} is no better than chance: {row['mean']:.3f} where maps of other images of the same "
                f"class reach {row['chance']:.3f}. It looks at the same place whatever the image.",
            )


def _against_fixed(
    score: Score, rows: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    for name, row in rows.items():
        other = fixed.get(name)
        if other is None or overlaps(row, other) is not False:
            continue
        kept = row["kept_share"]
        share = "" if kept is None or math.isnan(kept) else f" {1 - kept:.0%} of the decisions changed."
        asks = "the true class" if score.measure == "stability" else "the class predicted on the clean image"
        yield Finding(
            "decision",
            score.measure,
            f"In {score.name}, the value of {name} reflects changed decisions, not only changed focus: {row['mean']:.3f} for the "
            f"predicted class, {other['mean']:.3f} for {asks}.{share}",
        )


def _dead(material: Material) -> Iterator[Finding]:
    rows = material.totals("entropy", "spatial", "clean")
    for name, row in rows.items():
        share = row["dead_share"]
        if share and not math.isnan(share):
            weight = "many" if share >= LARGE_DEAD_SHARE else "few"
            text = (
                f"{row['num_dead']} of {name}'s {row['num_dead'] + row['n']} clean maps ({share:.1%}) are dead: nothing speaks for "
                f"the class. They are in no mean"
            )
            yield Finding(
                "dead", "entropy", text + ("; its scores are those of the rest." if weight == "many" else ".")
            )


def _absent(material: Material) -> Iterator[Finding]:
    config = material.run.config
    names = {score.measure for score in material.columns}
    missing = [name for name in ("entropy", "noise", "resilience", "focus", "stability") if name not in names]
    if missing:
        yield Finding("absent", "", f"Not measured in this run: {_listed(missing)}.")
    if not material.labelled:
        yield Finding(
            "absent", "auroc", "The images have no labels: there is no AUROC, and stability has no fixed variant."
        )
    elif not auroc_rows(material):
        yield Finding(
            "absent",
            "auroc",
            f"There is no AUROC: the images have one class only, or none is {config.data.positive!r}.",
        )
    if len(material.detectors) == 1:
        yield Finding("absent", "", "There is one detector, so nothing is compared.")
    if len(material.stretches) == 1:
        yield Finding("absent", "", "All images come from one source: nothing can be said about others.")
    if len(material.quarantine):
        count = int(material.quarantine.num_images.sum())
        yield Finding("note", "", f"{count} images could not be used; they are listed with the reason under Data.")


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["ci_low"], row["ci_high"]
    known = low is not None and not math.isnan(low)
    return f"{row['mean']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if known else "")


def _listed(words: Sequence[str]) -> str:
    """With commas.

    >>> _listed(["a", "b", "c"])
    'a, b, c'
    """
    return ", ".join(words)
