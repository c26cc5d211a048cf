"""Scores and AUROCs that are no better than chance, and detectors that predict one class."""

from collections.abc import Iterator

from explain2me.report.findings.comparisons import compare
from explain2me.report.findings.kinds import Finding, Rows
from explain2me.report.formats import is_known, number, share, value_interval
from explain2me.report.material import Material
from explain2me.report.summary import AUROC, RunScore, Tables

ROUNDING = 1e-6
"""A chance level this close to 1 counts as 1: single maps are float32."""
MANY_TIED = 0.001
"""Share of tied pairs from which on they can change the third digit of AUROC."""
STUCK_CHANCE = 0.5
"""From this chance level on, the maps of different images are much alike."""


def aurocs(tables: Tables) -> Iterator[Finding]:
    """AUROC of each pair of detectors, and those that are not above chance."""
    rows = tables.aurocs()
    if not rows:
        return
    means = {name: row | {"mean": row["auroc"]} for name, row in rows.items()}
    yield from compare(AUROC, means, tables.pairs(AUROC), {})
    if len(rows) == len(tables.detectors) > 1 and all(row["ci_low"] <= 0.5 <= row["ci_high"] for row in rows.values()):
        yield Finding(
            "none",
            "No detector has an AUROC over all images that is better than chance (0.5), so AUROC gives no reason to choose one of them. "
            "AUROC on a single source may still be above chance; see the tables of AUROC.",
            tuple(rows),
        )
    for name, row in rows.items():
        value = value_interval(row["auroc"], row["ci_low"], row["ci_high"])
        if is_known(row["ci_high"]) and row["ci_high"] < 0.5:
            text = f"The AUROC of {name} is below 0.5 ({value}): its classes may be in another order than its logits (data.classes)."
            yield Finding("chance", text, (name,))
        elif is_known(row["ci_low"]) and row["ci_low"] <= 0.5:
            yield Finding("chance", f"The AUROC of {name} is no better than chance, 0.5 ({value}).", (name,))
        tied = (row.get("num_tied_pairs") or 0) / (row["num_positive"] * row["num_negative"])  # None: an older table
        if tied >= MANY_TIED:
            yield Finding(
                "note",
                f"In {share(tied)} of the pairs of a positive and a negative image, {name} gives both the same score. Each such pair "
                f"counts one half in its AUROC, which could be {number(tied / 2)} higher or lower.",
                (name,),
            )


def against_chance(score: RunScore, rows: Rows) -> Iterator[Finding]:
    """Detectors whose chance-corrected value may be 0 or is not defined: their maps do not depend on the image, or hardly agree."""
    for name, row in rows.items():
        stuck = is_known(row["chance"]) and row["chance"] >= 1 - ROUNDING  # no score can be above that
        reaches = is_known(row["corrected_low"]) and row["corrected_low"] <= 0
        if score.higher_is_better and (reaches or stuck):
            reason = (
                "It looks at the same place in every image."
                if row["chance"] >= STUCK_CHANCE
                else "Its maps do not agree significantly more than maps of unrelated images."
            )
            limits = (row["corrected"], row["corrected_low"], row["corrected_high"])
            corrected = f" (above chance {value_interval(*limits)})" if all(map(is_known, limits)) else ""
            text = (
                f"In {score.name}, {name} is no better than chance: {number(row['mean'])}, where maps of other images of the same "
                f"class reach {number(row['chance'])}{corrected}. {reason}"
            )
            yield Finding("chance", text, (name,))


def one_class(material: Material) -> Iterator[Finding]:
    """Runs that predict one class for every image, which no AUROC shows."""
    aurocs_by_detector = material.tables.aurocs()
    for name in material.tables.detectors:
        runs: dict[str, list[str]] = {}
        for run, predicted in material.one_class[name].items():
            runs.setdefault(predicted, []).append(run)
        for predicted, names in runs.items():
            total = len(material.run.models_of(name))
            place = f" in {len(names)} of its {total} runs ({', '.join(names)})" if total > 1 else ""
            ranking = " Its AUROC shows only how it ranks the images." if name in aurocs_by_detector else ""
            yield Finding("chance", f"{name} predicts {predicted!r} for every image{place}.{ranking}", (name,))
