"""What the numbers say, in plain words. Pure: summary rows in, sentences out; every sentence follows from a stated rule."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from explain2me.report.material import AUROC, Material, Score, records
from explain2me.statistics.cells import FEW_CELLS, LARGE_DEAD_SHARE
from explain2me.statistics.differences import without_runs
from explain2me.text import printable_line

Kind = Literal["none", "differs", "runs", "alike", "chance", "focus", "decision", "dead", "absent", "note"]


TAGS: dict[Kind, str] = {
    "none": "none to choose",
    "differs": "differs",
    "alike": "not told apart",
    "note": "note",
    "runs": "few training runs",
    "chance": "chance",
    "focus": "focus",
    "decision": "decision",
    "dead": "dead maps",
    "absent": "absent",
}
"""Each kind in words, most decisive first."""
FEW_IMAGES = 0.5
"""Share of the images below which a score is said to rest on few of them."""
ROUNDING = 1e-6
"""A chance level that is no further from 1 is 1: single maps are float32."""
STUCK_CHANCE = 0.5
"""From this chance level on the maps of different images are much alike."""
OF_RUNS = {2: 50, 3: 75, 4: 79, 5: 84, 6: 86, 7: 87, 8: 88, 9: 89}
"""By the number of training runs, where these, normally distributed, are all that varies: percent of bootstrap intervals of one
detector that hold the true mean."""


OF_PAIRS = {3: 50, 4: 74, 5: 78, 6: 81, 7: 82, 8: 85, 9: 86}
"""The same for means over pairs of runs; of two runs there is one pair, and nothing is drawn."""
RULES = (
    "Two detectors differ where the 95 % interval of their difference, over other images and other training runs, excludes 0; where it "
    "holds 0, the data do not tell them apart, which is not to say that they are alike. "
    "A difference that comes or goes when each score is taken above its chance level is told, and one that goes only with the class "
    "held fixed as well. "
    "A score is not told from chance where the interval of its chance-corrected value reaches 0 or lies below it. A score "
    "reflects changed decisions where the mean of each variant, predicted and fixed, lies outside the interval of the other; a "
    "difference between detectors that is gone in the variant fixed is a difference of decisions, not of focus. Focus goes the wrong "
    "way where the intervals with the salient region and with the rest blurred do not overlap and lie in the wrong order, in both "
    "variants and with few dead maps; the same of AUROC after blurring, where AUROC before is above 0.5. No detector is told from chance "
    "where the interval of the AUROC of each, over all images, holds 0.5. Runs that predict one class for images of several, and maps of fewer than 25 cells, "
    "are told."
)


Pair = tuple[str, str]


Rows = Mapping[str, Mapping[str, Any]]
"""A row of the summary by detector."""


class Finding(NamedTuple):
    """One sentence, of what kind it is, and which detectors it is about; where they are alike, which pairs in which score."""

    kind: Kind
    text: str
    detectors: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    score: str = ""


def findings(material: Material) -> list[Finding]:
    """Everything that a reader should know before choosing, most decisive first."""
    found = [*_performance(material)]
    variants: list[tuple[Score, Rows, Rows]] = []
    for score in material.columns:
        rows = material.totals(score.measure, score.variant, score.condition or "all")
        found += compare(score, rows, material.pairs(score, score.variant), material.pairs(score, "fixed"))
        if score.measure != "entropy":
            found += against_chance(score, rows)
            variants.append((score, rows, material.totals(score.measure, "fixed", score.condition or "all")))
    found += against_fixed(variants)
    found += _one_class(material)
    found += _wrong_way(material)
    found += _few_runs(material)
    found += _comparisons(material)
    found += _dead(material)
    found += _few_images(material)
    found += _few_cells(material)
    found += _absent(material)
    found = _together(found)
    order = list(TAGS)
    return sorted(found, key=lambda finding: order.index(finding.kind))


def _together(found: Sequence[Finding]) -> list[Finding]:
    """One sentence for all scores in which the same pairs are not told apart."""
    scores: dict[tuple[Pair, ...], list[str]] = {}
    for finding in found:
        if finding.kind == "alike":
            scores.setdefault(finding.pairs, []).append(finding.score)
    alike = [_alike("; ".join(some), pairs) for pairs, some in scores.items()]
    return [*(finding for finding in found if finding.kind != "alike"), *alike]


def _alike(score: str, pairs: Sequence[Pair]) -> Finding:
    text = f"Not told apart in {score}: {_listed_pairs(pairs)}."
    return Finding("alike", text, _names(pairs), tuple(pairs), score)


def sign(row: Mapping[str, Any]) -> int | None:
    """-1, 1, or 0 where the interval of a difference holds 0; None where it is not known.

    >>> sign({"ci_low": -0.3, "ci_high": -0.1})
    -1
    """
    if math.isnan(row["ci_low"]) or math.isnan(row["ci_high"]):
        return None
    return int(row["ci_low"] > 0) - int(row["ci_high"] < 0)


def _performance(material: Material) -> Iterator[Finding]:
    rows = auroc_rows(material)
    if not rows:
        return
    means = {name: row | {"mean": row["auroc"]} for name, row in rows.items()}
    yield from compare(AUROC, means, material.pairs(AUROC, AUROC.variant), {})
    if len(rows) == len(material.detectors) > 1 and all(
        row["ci_low"] <= 0.5 <= row["ci_high"] for row in rows.values()
    ):
        yield Finding(
            "none",
            "No detector's AUROC over all images together is told from chance (0.5): it gives no reason to choose one of them. A single "
            "source may still be told apart; see AUROC.",
            tuple(rows),
        )
    for name, row in rows.items():
        if not math.isnan(row["ci_high"]) and row["ci_high"] < 0.5:
            yield Finding(
                "chance",
                f"The AUROC of {name} is below 0.5 ({_interval(row | {'mean': row['auroc']})}): its classes may be in "
                f"another order than its logits (data.classes).",
                (name,),
            )
        elif not math.isnan(row["ci_low"]) and row["ci_low"] <= 0.5:
            yield Finding(
                "chance",
                f"The AUROC of {name} is not told from chance, 0.5 ({_interval(row | {'mean': row['auroc']})}).",
                (name,),
            )


def auroc_rows(material: Material, condition: str = "clean") -> dict[str, dict[str, Any]]:
    """The row of each detector over all images, mean over runs, for the clean images or another condition."""
    rows = material.performance
    if not len(rows):
        return {}
    rows = rows[(rows.run == "all") & (rows.score == "softmax") & (rows.condition == condition)]
    rows = rows[(rows.positives == "all") & (rows.negatives == "all")]
    return {row["detector"]: row for row in records(rows) if not math.isnan(row["auroc"])}


Pairs = Mapping[Pair, Mapping[str, Any]]
"""Two detectors -> the row of their difference."""


def compare(score: Score, rows: Rows, pairs: Pairs, fixed: Pairs) -> Iterator[Finding]:
    """Each pair of detectors in one score: which does better, or not told apart; and whether that holds otherwise.

    Args:
        score: of which ``rows`` hold the mean of each detector.
        rows: by detector.
        pairs: the differences in this score.
        fixed: those in its variant ``fixed``; none where it has none.
    """
    alike: list[Pair] = []
    unknown: list[Pair] = []
    for names, row in pairs.items():
        direction = sign(row)
        if direction:
            yield _differs(score, rows, row, fixed.get(names))
        elif direction == 0:
            alike.append(names)
            yield from _apart_above_chance(score, row)
        elif not math.isnan(row["difference"]):
            unknown.append(names)
    if alike:
        yield _alike(score.name, alike)
    if unknown:
        text = f"Too few images or training runs with a value to compare in {score.name}: {_listed_pairs(unknown)}."
        yield Finding("absent", text, _names(unknown))


def _names(pairs: Sequence[Pair]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for pair in pairs for name in pair))


def _listed_pairs(pairs: Sequence[Pair]) -> str:
    return _listed([" and ".join(pair) for pair in pairs])


def _differs(score: Score, rows: Rows, row: Mapping[str, Any], fixed: Mapping[str, Any] | None) -> Finding:
    """One does better; and what there is to know about that."""
    better, worse = _ordered(row, score)
    which = "higher" if score.higher_is_better else "lower"
    return Finding(
        "differs",
        f"{better} does better than {worse} in {score.name} ({which} is better): {rows[better]['mean']:.3f} against "
        f"{rows[worse]['mean']:.3f}, a difference of {_signed(row, better)}.{_of_these_trainings(score, row)}"
        f"{_above_chance(score, row)}{_held_fixed(score, row, fixed, better)}{_both(score, row, fixed, better)}"
        f"{_dead_shares(better, worse, rows)}",
        (better, worse),
    )


def _ordered(row: Mapping[str, Any], score: Score, column: str = "difference") -> tuple[str, str]:
    """The better detector of a pair, and the other."""
    names = (row["detector"], row["other_detector"])
    return names if (row[column] > 0) == score.higher_is_better else names[::-1]


def _signed(row: Mapping[str, Any], first: str, name: str = "") -> str:
    """A difference with its interval, of ``first`` less the other; ``name`` is that of a further score of the row."""
    columns = [f"{name}_low", f"{name}_high", name] if name else ["ci_low", "ci_high", "difference"]
    low, high, value = (row[column] for column in columns)
    if first != row["detector"]:
        low, high, value = -high, -low, -value
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _of_these_trainings(score: Score, row: Mapping[str, Any]) -> str:
    """A warning where the training runs of a detector say nothing of others."""
    named = without_runs(row)
    if not named:
        return ""
    what = "one pair of runs" if score.measure == "stability" else "one run"
    return f" Nothing is known of other trainings of {' and '.join(named)}, of which there is {what}."


def _above_chance(score: Score, row: Mapping[str, Any]) -> str:
    """What becomes of a difference when each score is taken above its chance level; nothing where it stays."""
    above = sign(_corrected(row))
    if not score.higher_is_better or above in (None, sign(row)):
        return ""
    says = "not told apart" if above == 0 else "the other way round"
    return f" Above chance, {says} ({_signed(row, _ordered(row, score)[0], 'corrected')})."


def _apart_above_chance(score: Score, row: Mapping[str, Any]) -> Iterator[Finding]:
    """A difference that only chance levels hide."""
    if score.higher_is_better and sign(_corrected(row)):
        better, worse = _ordered(row, score, "corrected")
        yield Finding(
            "chance",
            f"In {score.name}, {better} and {worse} are not told apart; above chance {better} does better "
            f"({_signed(row, better, 'corrected')}).{_of_these_trainings(score, row)}",
            (better, worse),
        )


def _corrected(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"ci_low": row["corrected_low"], "ci_high": row["corrected_high"]}


def _dead_shares(better: str, worse: str, rows: Rows) -> str:
    """A warning where the two values are means over different images."""
    shares = [rows[name].get("dead_share") or 0.0 for name in (better, worse)]
    if max(shares) < LARGE_DEAD_SHARE:
        return ""
    return f" Beware: {shares[0]:.1%} and {shares[1]:.1%} of their maps are dead and in no mean, so the two are of different images."


def _held_fixed(score: Score, row: Mapping[str, Any], fixed: Mapping[str, Any] | None, better: str) -> str:
    """What becomes of a difference when the same class is explained throughout; nothing where it stays."""
    if fixed is None or sign(fixed) in (None, sign(row)):
        return ""
    held = "the true class is explained" if score.measure == "stability" else "the class is held fixed"
    if sign(fixed):
        return f" The other way round once {held} ({_signed(fixed, better)})."
    why = "" if score.measure == "stability" else ": a difference of decisions"
    return f" Not told apart once {held} ({_signed(fixed, better)}){why}."


def _both(score: Score, row: Mapping[str, Any], fixed: Mapping[str, Any] | None, better: str) -> str:
    """What becomes of a difference that either leaves as it is, with the class held fixed and above chance."""
    if fixed is None or _above_chance(score, row) or _held_fixed(score, row, fixed, better):
        return ""
    both = sign(_corrected(fixed))
    if not score.higher_is_better or both in (None, sign(row)):
        return ""
    held = "the true class explained" if score.measure == "stability" else "the class held fixed"
    says = "not told apart" if both == 0 else "the other way round"
    return f" Above chance and with {held} together, {says} ({_signed(fixed, better, 'corrected')})."


def against_chance(score: Score, rows: Rows) -> Iterator[Finding]:
    """Detectors whose chance-corrected value may be 0 or has no meaning: stuck on one place, or unlike anything."""
    for name, row in rows.items():
        low = row["corrected_low"]
        stuck = row["chance"] is not None and row["chance"] >= 1 - ROUNDING  # nothing can be above that
        reaches = low is not None and not math.isnan(low) and low <= 0
        if score.higher_is_better and (reaches or stuck):
            why = (
                "It looks at the same place whatever the image."
                if row["chance"] >= STUCK_CHANCE
                else "Its maps are not shown to agree more than those of unrelated images."
            )
            yield Finding(
                "chance",
                f"In {score.name}, {name} is {'no better than' if stuck else 'not told from'} chance: {row['mean']:.3f} where "
                f"maps of other images of the same class reach {row['chance']:.3f}{_above(row)}. {why}",
                (name,),
            )


def _above(row: Mapping[str, Any]) -> str:
    """The score above chance with its interval, in brackets; nothing where it is not known."""
    numbers = [row["corrected"], row["corrected_low"], row["corrected_high"]]
    if any(number is None or math.isnan(number) for number in numbers):
        return ""
    return " (above chance {:.3f} [{:.3f}, {:.3f}])".format(*numbers)


def against_fixed(tables: Sequence[tuple[Score, Rows, Rows]]) -> Iterator[Finding]:
    """Detectors whose two variants disagree; one sentence for all scores of a detector in which decisions changed.

    Args:
        tables: scores, each with the rows of its variant ``predicted``, and of ``fixed``.
    """
    changed: dict[str, list[str]] = {}
    for score, rows, fixed in tables:
        for name, row in rows.items():
            other = fixed.get(name)
            if other is None or not (_outside(row["mean"], other) and _outside(other["mean"], row)):
                continue
            share = "" if row["kept_share"] is None or math.isnan(row["kept_share"]) else f"{1 - row['kept_share']:.0%}"
            if score.measure == "stability":
                disagree = f" {share} of the pairs of runs disagree." if share else ""
                yield Finding(
                    "decision",
                    f"In {score.name}, the value of {name} depends on the class that is explained: {row['mean']:.3f} for the predicted "
                    f"class, {other['mean']:.3f} for the true class.{disagree}",
                    (name,),
                )
            else:
                dead = max(each.get("dead_share") or 0.0 for each in (row, other))
                beside = [f"{share} of the decisions changed"] if share else []
                if dead >= LARGE_DEAD_SHARE:
                    beside.append(f"the two are of different images, as {dead:.0%} of the maps of one are dead")
                said = f" ({'; '.join(beside)})" if beside else ""
                changed.setdefault(name, []).append(f"{score.name} {row['mean']:.3f} against {other['mean']:.3f}{said}")
    for name, which in changed.items():
        yield Finding(
            "decision",
            f"What changes {name}'s maps is in part that its decisions change, not only its focus. For the predicted class against the class "
            f"predicted on the clean image: {'; '.join(which)}.",
            (name,),
        )


def _outside(value: float, row: Mapping[str, Any]) -> bool:
    """Whether a value lies outside a known interval."""
    low, high = row["ci_low"], row["ci_high"]
    return low is not None and not math.isnan(low) and not low <= value <= high


def _one_class(material: Material) -> Iterator[Finding]:
    """Trainings that decide nothing, which no AUROC tells."""
    have = auroc_rows(material)
    for name in material.detectors:
        runs: dict[str, list[str]] = {}
        for run, predicted in material.one_class[name].items():
            runs.setdefault(predicted, []).append(run)
        for predicted, which in runs.items():
            count = len(material.run.models_of(name))
            where = f" in {len(which)} of its {count} runs ({_listed(which)})" if count > 1 else ""
            ranks = "; its AUROC tells only how it ranks the images" if name in have else ""
            yield Finding(
                "chance",
                f"{name} takes every image for {predicted!r}{where}: it tells no two apart there{ranks}.",
                (name,),
            )


def _wrong_way(material: Material) -> Iterator[Finding]:
    """Detectors to which the region that they mark matters less than the rest."""
    for name in material.detectors:
        found = [_blurred(material, name, variant) for variant in ("predicted", "fixed")]
        if all(both and both[0]["ci_low"] > both[1]["ci_high"] for both in found) and found[0]:
            salient, rest = found[0]
            yield Finding(
                "focus",
                f"The focus of {name} goes the wrong way: its maps stay more alike with the salient region blurred (similarity "
                f"{_interval(salient)}) than with the rest blurred ({_interval(rest)}), also where the class is held fixed.",
                (name,),
            )
    clean, after, without = (auroc_rows(material, name) for name in ("clean", "focus_salient", "focus_nonsalient"))
    for name in (name for name in after if name in without and name in clean):
        ours, theirs = ({**rows[name], "mean": rows[name]["auroc"]} for rows in (after, without))
        if clean[name]["ci_low"] > 0.5 and ours["ci_low"] > theirs["ci_high"]:
            yield Finding(
                "focus",
                f"The AUROC of {name} goes the wrong way: it is higher with the salient region blurred ({_interval(ours)}) than with "
                f"the rest blurred ({_interval(theirs)}).",
                (name,),
            )


def _blurred(material: Material, name: str, variant: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The rows of focus with the salient region and with the rest blurred; None where they are of few maps.

    A map that dies of the blur has changed most and is in no mean.
    """
    rows = [
        material.totals("focus", variant, condition).get(name) for condition in ("focus_salient", "focus_nonsalient")
    ]
    if rows[0] is None or rows[1] is None or max(row["dead_share"] for row in rows if row) >= LARGE_DEAD_SHARE:
        return None
    return rows[0], rows[1]


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
            text = _too_narrow(f"{count} training runs of {whose}", OF_RUNS[count], OF_PAIRS.get(count))
        else:
            continue
        yield Finding("runs", text, tuple(names))


def _too_narrow(which: str, holds: int, holds_pairs: int | None) -> str:
    of_stability = "; that of stability draws none" if holds_pairs is None else ""
    beside = "" if holds_pairs is None else f" ({holds_pairs} % of those of stability)"
    but = " but for stability" if holds_pairs is None else ""
    return (
        f"{which}: the interval of a score draws these anew{of_stability}. So few make it too narrow for what other trainings would "
        f"give: where runs are all that varies, {holds} % of such intervals{beside} hold the true mean, not 95 %. The "
        f"intervals of differences between detectors allow for it{but}."
    )


def _comparisons(material: Material) -> Iterator[Finding]:
    """How many differences chance alone would make, among those that know of other trainings."""
    rows = [row for score in (AUROC, *material.columns) for row in material.pairs(score, score.variant).values()]
    signs = [sign(row) for row in rows if not without_runs(row)]
    alone = sum(bool(without_runs(row)) for row in rows)
    left_out = f" ({alone} over single runs or pairs of runs not counted)" if alone else ""
    count, differ = sum(found is not None for found in signs), sum(map(bool, signs))
    if count > 1 and differ:
        expected = f"{0.05 * count:.2f}".rstrip("0").rstrip(".")
        yield Finding(
            "note",
            f"{differ} of {count} comparisons over images and training runs came out as different{left_out}; were all detectors alike, "
            f"about {expected} would.",
        )


def _dead(material: Material) -> Iterator[Finding]:
    for name in material.detectors:
        counts = material.dead[name]  # by image: runs whose clean map is dead
        total, dead = material.num_clean[name], int(counts.sum())
        if dead:
            share = dead / max(total, 1)
            of_runs = ", ".join(f"{run} {number}" for run, number in material.dead_of_runs[name].items())
            by_run = f", by run: {of_runs}" if len(material.dead_of_runs[name]) > 1 else ""
            text = f"{dead} of {name}'s {total} clean maps ({share:.1%}) are dead{by_run}: nothing speaks for the class. They are in no mean"
            yield Finding(
                "dead",
                text
                + (
                    "; its scores are those of the rest and do not compare with those of others."
                    if share >= LARGE_DEAD_SHARE
                    else "."
                ),
                (name,),
            )


def _few_images(material: Material) -> Iterator[Finding]:
    """Scores and AUROCs that are left with few of the images; mostly because the maps of the others are dead."""
    total = len(material.run.image_table)
    for score in material.columns:
        for name, row in material.totals(score.measure, score.variant, score.condition or "all").items():
            if 0 < row["num_images"] < FEW_IMAGES * total:
                yield Finding(
                    "dead",
                    f"The {score.name} of {name} is that of {row['num_images']} of {total} images, the only ones that have a value: "
                    f"neither it nor its differences say anything of the others.",
                    (name,),
                )
    rows = material.performance
    if not len(rows):
        return
    rows = rows[(rows.run != "all") & (rows.score == "softmax") & (rows.positives == "all") & (rows.negatives == "all")]
    for name in material.detectors:
        of_it = rows[rows.detector == name]
        clean = of_it[of_it.condition == "clean"].n.max()
        least = of_it[of_it.condition.str.startswith("focus_")].n.min()  # NaN without focus
        if least < FEW_IMAGES * clean:
            yield Finding(
                "dead",
                f"The AUROC of {name} after blurring is in one run that of {int(least)} of {int(clean)} images, as the others could not "
                f"be blurred by their maps; do not compare it with that of others.",
                (name,),
            )


def _few_cells(material: Material) -> Iterator[Finding]:
    """Maps so coarse that a similarity of them rests on a handful of numbers."""
    for (height, width), names in _grouped(material.map_sizes).items():
        if height * width < FEW_CELLS:
            yield Finding(
                "note",
                f"The maps of {_listed(names)} have {height} x {width} cells: they say little of where a model looks, and a similarity is "
                f"that of {height * width} numbers. A bigger input or an earlier layer gives finer maps.",
                tuple(names),
            )


def _grouped(sizes: Mapping[str, tuple[int, int]]) -> dict[tuple[int, int], list[str]]:
    groups: dict[tuple[int, int], list[str]] = {}
    for name, size in sizes.items():
        groups.setdefault(size, []).append(name)
    return groups


def _absent(material: Material) -> Iterator[Finding]:
    config = material.run.config
    labels = set(material.run.image_table["label"].to_pylist())
    names = {score.measure for score in material.columns}
    missing = [name for name in ("entropy", "noise", "resilience", "focus", "stability") if name not in names]
    if missing:
        yield Finding("absent", f"Not measured in this run: {_listed(missing)}.")
    if not material.labelled:
        yield Finding("absent", "The images have no labels: there is no AUROC, and stability has no fixed variant.")
    elif config.data.positive not in labels or len(labels) == 1:
        yield Finding(
            "absent",
            f"There is no AUROC: the images have one class only, or none is {config.data.positive!r}.",
        )
    else:
        have = auroc_rows(material)
        for name in material.detectors:
            if name not in have:
                why = "no run of it has finite logits for images of both classes"
                yield Finding("absent", f"There is no AUROC of {name}: {why}.", (name,))
    for score in material.columns:
        rows = material.totals(score.measure, score.variant, score.condition or "all")
        for name in material.detectors:
            if name not in rows or math.isnan(rows[name]["mean"]):
                why = "all of its maps are dead" if score.measure == "entropy" else "no two maps of it can be compared"
                yield Finding("absent", f"There is no {score.name} of {name}: {why}.", (name,))
    if len(material.detectors) == 1:
        yield Finding("absent", "There is one detector, so nothing is compared.")
    if len(material.stretches) == 1:
        yield Finding("absent", "All images come from one source: nothing can be said about others.")
    if len(material.quarantine):
        count = int(material.quarantine.num_images.sum())
        images = "image" if count == 1 else "images"
        first = printable_line(material.run.quarantine()["message"][0].as_py())
        yield Finding("note", f"{count} {images} could not be used, first {first}. All are in the folder quarantine.")


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
