"""Tables in the paper's layout as rows of text, for the page, CSV and LaTeX; the numbers are those of summary/."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from explain2me.report.material import AUROC, Material, records
from explain2me.run.schema import ALL
from explain2me.statistics.differences import without_runs
from explain2me.statistics.performance import from_to
from explain2me.text import printable_line

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


class Sheet(NamedTuple):
    """A table: ``name`` of its files, ``title``, names of columns, rows of text; ``note`` says how to read it.

    The first ``heads`` columns are words, the others numbers.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str
    heads: int


def sheets(material: Material) -> Iterator[tuple[str, Sheet]]:
    """Section of the page and table."""
    differences = by_pair(material)
    if differences.rows:
        yield "decide", differences
    for measure in ("entropy", "noise", "resilience", "focus", "stability"):
        sheet = by_source(material, measure)
        if sheet.rows:
            yield measure, sheet
            yield measure, details(material, measure)
    transforms = by_transform(material)
    if transforms.rows:
        yield "resilience", transforms
    performance = auroc(material)
    if performance.rows:
        yield "auroc", performance


def training_in_words(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(title, text) of how the runs of one detector were trained, each as :func:`explain2me.detectors.cards.trained` tells it."""
    scores = [
        (name, [run[key] for run in runs]) for key, name in (("val_auroc", "AUROC"), ("val_accuracy", "accuracy"))
    ]
    of_each = [
        f"{name} {', '.join('-' if value is None else f'{value:.3f}' for value in values)}"
        for name, values in scores
        if any(value is not None for value in values)
    ]
    epochs = ", ".join(f"{run['taken']} of {run['epochs']}" for run in runs)
    if len({run["epochs"] for run in runs}) == 1:
        epochs = f"{', '.join(str(run['taken']) for run in runs)} of {runs[0]['epochs']}"
    told = [
        ("loss", _one_of(run["loss"] for run in runs)),
        ("human maps", _one_of(run["human_maps"] for run in runs)),
        ("images to train on", _one_of(run["images"] for run in runs)),
        ("started from", _one_of(run["start"] for run in runs)),
        ("epoch taken", epochs),
        ("validation", "; ".join(of_each) or "none"),
    ]
    return [(title, printable_line(text)) for title, text in told]


def _one_of(texts: Iterable[str]) -> str:
    """What all runs share, or each of what they have."""
    return "; ".join(dict.fromkeys(texts))


def by_source(material: Material, measure: str) -> Sheet:
    """Table 1: a row a detector and variant, a column a source: mean +- std."""
    rows = material.measures
    rows = rows[(rows.measure == measure) & material.main_similarity(rows)]
    if measure == "resilience":
        rows = rows[rows.condition == ALL]
    keys = _sources(material)
    lines = []
    for condition in dict.fromkeys(rows.condition):
        for detector in material.detectors:
            for variant in dict.fromkeys(rows.variant):
                found = rows[(rows.condition == condition) & (rows.detector == detector) & (rows.variant == variant)]
                by_key = {(row["label"], row["source"]): row for row in records(found)}
                if by_key:
                    cells = [mean_std(by_key[key]) if key in by_key else "-" for key in keys]
                    lines.append((_condition(condition), printable_line(detector), variant, *cells))
    headings = _headings(material)
    names = tuple(headings[key] for key in keys)
    return Sheet(
        f"table1-{measure}",
        f"{measure.capitalize()} by source: mean ± standard deviation",
        ("condition", "detector", "variant", *names),
        lines,
        "Over images and runs.",
        3,
    )


def by_pair(material: Material) -> Sheet:
    """Each pair of detectors in AUROC and each score: their difference with its interval, held fixed, and above chance."""
    lines = []
    for score in (AUROC, *material.columns):
        fixed = material.pairs(score, "fixed")
        for names, row in material.pairs(score, score.variant).items():
            held = fixed.get(names)
            lines.append(
                (
                    score.name,
                    *map(printable_line, names),
                    "-" if _unknown(row["num_images"]) else str(int(row["num_images"])),
                    number(row["difference"]),
                    interval(row["ci_low"], row["ci_high"]) + ("*" if without_runs(row) else ""),
                    "<0.001" if row["p"] < 0.001 else number(row["p"]),
                    number(held["difference"]) if held else "-",
                    interval(held["ci_low"], held["ci_high"]) if held else "-",
                    number(row["corrected"]),
                    interval(row["corrected_low"], row["corrected_high"]),
                )
            )
    columns = (
        "score", "detector", "other detector", "images", "difference", "95 % interval", "p", "class held fixed",
        "95 % interval of fixed", "above chance", "95 % interval of above chance",
    )  # fmt: skip
    note = (
        "Detector less other detector, each over all images that have a value of it; images: those that have one of both, on which "
        "the two are compared as pairs. Intervals: over other images, and (but where marked *, with one run or one pair of runs) over other "
        "training runs (Student's t, Satterthwaite's degrees of freedom). p: of no difference; of many comparisons some are "
        "below 0.05 by chance. Above chance: of (mean - chance) / (1 - chance)."
    )
    return Sheet("differences", "Differences between detectors", columns, lines, note, 3)


def details(material: Material, measure: str) -> Sheet:
    """Everything of "Reported with every number" over all images: a row a detector, variant and condition."""
    rows = material.measures
    rows = rows[(rows.measure == measure) & (rows.label == ALL) & (rows.source == ALL)]
    if measure == "resilience":
        rows = rows[rows.condition.isin(["shifts", "flips", "rotations", ALL])]
    order = {name: i for i, name in enumerate(material.detectors)}
    lines: list[tuple[str, ...]] = []
    for row in sorted(records(rows), key=lambda row: order[row["detector"]]):
        kept = row["kept_share"]
        lines.append(
            (
                _condition(row["condition"]), printable_line(row["detector"]), row["variant"], row["similarity"] or "-",
                number(row["mean"]), interval(row["ci_low"], row["ci_high"]), str(row["n"]), share(row["dead_share"]),
                share(kept), number(row["mean_kept"]), number(row["mean_flipped"]), number(row["chance"]),
                number(row["corrected"]), interval(row["corrected_low"], row["corrected_high"]),
            )
        )  # fmt: skip
    columns = (
        "condition", "detector", "variant", "similarity", "mean", "95 % interval", "n", "dead", "kept", "if kept",
        "if flipped", "chance", "corrected", "95 % interval of corrected",
    )  # fmt: skip
    if measure == "entropy":
        keep = [i for i, name in enumerate(columns) if name not in columns[3:4] + columns[8:]]
        return Sheet(
            "entropy", "Entropy over all images", tuple(columns[i] for i in keep),
            [tuple(line[i] for i in keep) for line in lines], NOTE, 3,
        )  # fmt: skip
    return Sheet(measure, f"{measure.capitalize()} over all images", columns, lines, NOTE, 4)


NOTE = (
    "n: values behind the mean. dead: share of maps with nothing in them, which are in no mean. kept: share of pairs with the "
    "same predicted class. chance: the same similarity to another image of the same source, label and predicted class. "
    "corrected: (mean - chance) / (1 - chance)."
)


def by_transform(material: Material) -> Sheet:
    """Table 2: resilience by group of transforms and transform."""
    rows = material.measures
    rows = rows[
        (rows.measure == "resilience") & (rows.label == ALL) & (rows.source == ALL) & material.main_similarity(rows)
    ]
    rows = (
        rows.assign(condition=rows.condition.str.partition("@")[0]) if len(rows) else rows
    )  # pixels depend on the input
    conditions = list(dict.fromkeys(rows.condition))
    groups = [name for name in ("shifts", "flips", "rotations", ALL) if name in conditions]
    conditions = [*groups, *(name for name in conditions if name not in groups)]
    lines = []
    for detector in material.detectors:
        for variant in dict.fromkeys(rows.variant):
            found = rows[(rows.detector == detector) & (rows.variant == variant)]
            by_condition = {row["condition"]: row for row in records(found)}
            if by_condition:
                lines.append(
                    (
                        printable_line(detector),
                        variant,
                        *(mean_std(by_condition[name]) if name in by_condition else "-" for name in conditions),
                    )
                )
    names = tuple("all transforms" if name == ALL else name for name in conditions)
    return Sheet(
        "table2-transforms", "Resilience by transform: mean ± standard deviation", ("detector", "variant", *names), lines,
        "Over images and runs; a group is averaged within an image first.", 2,
    )  # fmt: skip


def auroc(material: Material) -> Sheet:
    """AUROC before and after both removals, mean over runs with its interval, overall and by source."""
    rows = material.performance
    if len(rows):
        rows = rows[rows.condition.isin(["clean", "focus_salient", "focus_nonsalient"]) & (rows.score == "softmax")]
    of_runs: dict[tuple[str, ...], list[int]] = {}
    keys = ("detector", "condition", "positives", "negatives")
    for row in records(rows):
        if row["run"] != ALL and not math.isnan(row["auroc"]):
            of_runs.setdefault(tuple(row[key] for key in keys), []).append(row["n"])
    names = {"clean": "as they are", "focus_salient": "salient region blurred", "focus_nonsalient": "rest blurred"}
    lines: list[tuple[str, ...]] = []
    for row in records(rows):
        if row["run"] != ALL:
            continue
        counts = of_runs.get(tuple(row[key] for key in keys), [row["n"]])
        lines.append(
            (
                printable_line(row["detector"]), names[row["condition"]], _all(row["positives"]), _all(row["negatives"]),
                number(row["auroc"]), interval(row["ci_low"], row["ci_high"]), number(row["auroc_clean"]),
                from_to(counts), number(row["accuracy"]),
            )
        )  # fmt: skip
    columns = (
        "detector", "images", "positives", "negatives", "AUROC", "95 % interval", "AUROC before, same images", "n", "accuracy",
    )  # fmt: skip
    note = (
        "Mean over runs; n: images of one run, from the fewest to the most. An image whose clean map is dead cannot be blurred "
        "by it and is left out, also of the accuracy; the "
        "AUROC before blurring is over the images left."
    )
    return Sheet("auroc", "AUROC before and after blurring by salience", columns, lines, note, 4)


def to_csv(sheet: Sheet) -> str:
    """The table as CSV; cells that a spreadsheet would run get an apostrophe in front."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(_no_formula, sheet.columns))
    heads = sheet.heads
    writer.writerows([[*map(_no_formula, row[:heads]), *row[heads:]] for row in sheet.rows])
    return stream.getvalue()


def to_latex(sheet: Sheet) -> str:
    """The table with booktabs rules, to be put into a paper with ``\\input``."""
    layout = "l" * sheet.heads + "r" * (len(sheet.columns) - sheet.heads)
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{tabular}{" + layout + "}",
        "\\toprule",
        " & ".join(map(latex, sheet.columns)) + " \\\\",
        "\\midrule",
        *(" & ".join(map(latex, row)) + " \\\\\\relax" for row in sheet.rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Text with everything that LaTeX would run made harmless.

    >>> latex("50 % of a_b ± 1")
    '50 \\\\% of a\\\\_b $\\\\pm$ 1'
    """
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
    special |= {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}  # other signs in LaTeX's own fonts
    special |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
    return "".join(special.get(mark, mark) for mark in text)


def mean_std(row: dict[str, Any]) -> str:
    """``0.812 ± 0.034``; without a deviation where there is one value, ``-`` where there is none."""
    if _unknown(row["mean"]):
        return "-"
    return f"{row['mean']:.3f}" if _unknown(row["std"]) else f"{row['mean']:.3f} ± {row['std']:.3f}"


def number(value: float | None) -> str:
    """Three decimals, ``-`` where it is not known."""
    return "-" if _unknown(value) else f"{value:.3f}"


def share(value: float | None) -> str:
    """Per cent."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def interval(low: float | None, high: float | None) -> str:
    """``[0.1, 0.2]``."""
    return "-" if _unknown(low) or _unknown(high) else f"[{low:.3f}, {high:.3f}]"


def _unknown(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _sources(material: Material) -> list[tuple[str, str]]:
    """The total, labels that have several sources, sources."""
    stretches = [(stretch.label or ALL, stretch.source) for stretch in material.stretches]
    labels = [label for label, _ in stretches]
    several = [(label, ALL) for label in dict.fromkeys(labels) if label != ALL and labels.count(label) > 1]
    return [(ALL, ALL), *several, *stretches]


def _headings(material: Material) -> dict[tuple[str, str], str]:
    """Name of each column of :func:`_sources`."""
    names = {
        (s.label or ALL, s.source): printable_line(n)
        for s, n in zip(material.stretches, material.source_names(), strict=True)
    }
    return {
        key: names.get(key, "total" if key == (ALL, ALL) else f"all {printable_line(key[0])}")
        for key in _sources(material)
    }


def _condition(name: str) -> str:
    known = {"focus_salient": "salient region blurred", "focus_nonsalient": "rest blurred", ALL: "all transforms"}
    return known.get(name, name)


def _all(name: str) -> str:
    return name if name == ALL else printable_line(name)


def _no_formula(cell: str) -> str:
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell
