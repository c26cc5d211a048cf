"""What the numbers say, in plain words. Pure: summary rows in, sentences out; every sentence follows from a stated rule."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from explain2me.report.material import Material, Score, records

Kind = Literal["differs", "runs", "alike", "chance", "decision", "dead", "absent", "note"]
LARGE_DEAD_SHARE = 0.05
STUCK_CHANCE = 0.5
"""From this chance level on the maps of different images are much alike."""
OF_RUNS = {2: (50, 33), 3: (75, 10), 4: (79, 7), 5: (84, 5), 6: (86, 4), 7: (87, 3), 8: (88, 3), 9: (89, 2)}
"""By the number of training runs, where these, normally distributed, are all that varies: percent of intervals that hold the
true mean, and of pairs of detectors which are alike and whose intervals do not overlap."""
OF_PAIRS = {3: (50, 33), 4: (74, 10), 5: (78, 8), 6: (81, 6), 7: (82, 5), 8: (85, 4), 9: (86, 3)}
"""The same for means over pairs of runs; of two runs there is one pair, and nothing is drawn."""
RULES = (
    "Two detectors differ where their 95 % intervals do not overlap; where they overlap, the data do not tell them apart. "
    "A score is no better than chance where the interval of its chance-corrected value reaches 0 or lies below it. A score "
    "reflects changed decisions where the mean of each variant, predicted and fixed, lies outside the interval of the other; a "
    "difference between detectors that is gone in the variant fixed is a difference of decisions, not of focus."
)


class Finding(NamedTuple):
    """One sentence, of what kind it is, and which detectors it is about."""

    kind: Kind
    measure: str
    text: str
    detectors: tuple[str, ...] = ()


def findings(material: Material) -> list[Finding]:
    """Everything that a reader should know before choosing, most decisive first."""
    found = [*_performance(material)]
    for score in material.columns:
        rows = material.totals(score.measure, score.variant, score.condition or "all")
        fixed = material.totals(score.measure, "fixed", score.condition or "all")
        found += compare(score, rows, fixed)
        if score.measure != "entropy":
            found += against_chance(score, rows)
            found += against_fixed(score, rows, fixed)
    found += _few_runs(material)
    found += _dead(material)
    found += _absent(material)
    order = ("differs", "runs", "chance", "decision", "dead", "absent", "alike", "note")
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
    yield from compare(score, {name: row | {"mean": row["auroc"]} for name, row in rows.items()}, {})
    for name, row in rows.items():
        if not math.isnan(row["ci_high"]) and row["ci_high"] < 0.5:
            yield Finding(
                "chance",
                "auroc",
                f"The AUROC of {name} is below 0.5 ({_interval(row | {'mean': row['auroc']})}): its classes may be in "
                f"another order than its logits (data.classes).",
                (name,),
            )
        elif not math.isnan(row["ci_low"]) and row["ci_low"] <= 0.5:
            yield Finding(
                "chance",
                "auroc",
                f"The AUROC of {name} is not above chance ({_interval(row | {'mean': row['auroc']})}).",
                (name,),
            )


def auroc_rows(material: Material) -> dict[str, dict[str, Any]]:
    """The row of each detector over all images, mean over runs, for the clean images."""
    rows = material.performance
    if not len(rows):
        return {}
    rows = rows[(rows.run == "all") & (rows.score == "softmax") & (rows.condition == "clean")]
    rows = rows[(rows.positives == "all") & (rows.negatives == "all")]
    return {row["detector"]: row for row in records(rows) if not math.isnan(row["auroc"])}


def compare(
    score: Score, rows: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    """Each pair of detectors in one score: better beyond the intervals, or not told apart; and whether that holds in `fixed`."""
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
            f"against {_interval(known[worse])}.{_held_fixed(better, worse, fixed, score)}{_dead_shares(better, worse, known)}",
            (better, worse),
        )
    if alike:
        yield Finding("alike", score.measure, f"Not told apart in {score.name}: {_listed(alike)}.", tuple(known))


def _dead_shares(better: str, worse: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A warning where the two values are means over different images."""
    shares = [rows[name].get("dead_share") or 0.0 for name in (better, worse)]
    if max(shares) < LARGE_DEAD_SHARE:
        return ""
    return f" Beware: {shares[0]:.1%} and {shares[1]:.1%} of their maps are dead and in no mean, so the two are of different images."


def _held_fixed(better: str, worse: str, fixed: Mapping[str, Mapping[str, Any]], score: Score) -> str:
    """What becomes of a difference when the same class is explained throughout; nothing where it stays."""
    if better not in fixed or worse not in fixed:
        return ""
    a, b = fixed[better], fixed[worse]
    held = "the true class is explained" if score.measure == "stability" else "the class is held fixed"
    if overlaps(a, b) is not False:
        why = "" if score.measure == "stability" else ": a difference of decisions"
        return f" Not told apart once {held} ({_interval(a)} against {_interval(b)}){why}."
    if (a["mean"] > b["mean"]) != score.higher_is_better:
        return f" The other way round once {held} ({_interval(a)} against {_interval(b)})."
    return ""


def against_chance(score: Score, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """Detectors whose chance-corrected value may be 0: stuck on one place, or unlike anything."""
    for name, row in rows.items():
        low = row["corrected_low"]
        if score.higher_is_better and low is not None and not math.isnan(low) and low <= 0:
            why = (
                "It looks at the same place whatever the image."
                if row["chance"] >= STUCK_CHANCE
                else "Its maps agree no more than those of unrelated images."
            )
            yield Finding(
                "chance",
                score.measure,
                f"In {score.name}, {name} is no better than chance: {row['mean']:.3f} where maps of other images of the same "
                f"class reach {row['chance']:.3f}. {why}",
                (name,),
            )


def against_fixed(
    score: Score, rows: Mapping[str, Mapping[str, Any]], fixed: Mapping[str, Mapping[str, Any]]
) -> Iterator[Finding]:
    """Detectors whose two variants disagree."""
    for name, row in rows.items():
        other = fixed.get(name)
        if other is None or not (_outside(row["mean"], other) and _outside(other["mean"], row)):
            continue
        kept = row["kept_share"]
        pairs = score.measure == "stability"
        what = "pairs of runs disagree" if pairs else "decisions changed"
        share = "" if kept is None or math.isnan(kept) else f" {1 - kept:.0%} of the {what}."
        says = (
            "depends on the class that is explained" if pairs else "reflects changed decisions, not only changed focus"
        )
        asks = "the true class" if pairs else "the class predicted on the clean image"
        yield Finding(
            "decision",
            score.measure,
            f"In {score.name}, the value of {name} {says}: {row['mean']:.3f} for the predicted class, {other['mean']:.3f} for "
            f"{asks}.{share}",
            (name,),
        )


def _outside(value: float, row: Mapping[str, Any]) -> bool:
    """Whether a value lies outside a known interval."""
    low, high = row["ci_low"], row["ci_high"]
    return low is not None and not math.isnan(low) and not low <= value <= high


def _few_runs(material: Material) -> Iterator[Finding]:
    """A percentile bootstrap of few clusters is too narrow, and one of a single cluster does not know that it is one."""
    if not material.run.config.summary.bootstrap:
        return
    counts = {name: len(material.run.models_of(name)) for name in material.detectors}
    for count in sorted(set(counts.values())):
        names = [name for name in material.detectors if counts[name] == count]
        whose = "each detector" if len(names) == len(counts) else _listed(names)
        if count == 1:
            text = f"1 training run of {whose}: the intervals say nothing of what another training would give."
        elif count in OF_RUNS:
            text = _too_narrow(f"{count} training runs of {whose}", *OF_RUNS[count], *OF_PAIRS.get(count, ()))
        else:
            continue
        yield Finding("runs", "", text, tuple(names))


def _too_narrow(
    which: str, holds: int, apart: int, holds_pairs: int | None = None, apart_pairs: int | None = None
) -> str:
    of_stability = "; that of stability draws none" if holds_pairs is None else ""
    beside = "" if holds_pairs is None else f" ({holds_pairs} % of those of stability)"
    also = "" if apart_pairs is None else f" ({apart_pairs} % in stability)"
    return (
        f"{which}: the intervals draw these anew{of_stability}. So few make them too narrow for what other trainings would give: where "
        f"runs are all that varies, {holds} % of such intervals{beside} hold the true mean, not 95 %, and two detectors that are "
        f"alike come out as different in {apart} % of cases{also}."
    )


def _dead(material: Material) -> Iterator[Finding]:
    for name in material.detectors:
        counts = material.dead[name]  # by image: runs whose clean map is dead
        total, dead = material.num_clean[name], int(counts.sum())
        if dead:
            share = dead / max(total, 1)
            text = f"{dead} of {name}'s {total} clean maps ({share:.1%}) are dead: nothing speaks for the class. They are in no mean"
            yield Finding(
                "dead",
                "",
                text
                + (
                    "; its scores are those of the rest and do not compare with those of others."
                    if share >= LARGE_DEAD_SHARE
                    else "."
                ),
                (name,),
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
    for score in material.columns:
        rows = material.totals(score.measure, score.variant, score.condition or "all")
        for name in material.detectors:
            if name not in rows or math.isnan(rows[name]["mean"]):
                why = "all of its maps are dead" if score.measure == "entropy" else "no two maps of it can be compared"
                yield Finding("absent", score.measure, f"There is no {score.name} of {name}: {why}.", (name,))
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
