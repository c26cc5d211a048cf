"""Sheets of the measures: the overview, and of each measure Table 1, Table 2 and everything over all images."""

import pandas as pd

from explain2me.report.formats import UNKNOWN, count, interval, mean_std, number, share
from explain2me.report.sheets.sheet import Cell, Column, Sheet, cells
from explain2me.report.summary import Row, RunScore, Tables, label_of, main_first, main_similarity, over_all, records
from explain2me.statistics.scores import ALL, Measure
from explain2me.text import printable_line

MAPS_NOTE = (
    "mean ± std: over n values, one for each image and run. 95 % interval: of the mean. dead: share of maps without any salience; they "
    "are in no mean."
)
PAIRS_NOTE = (
    "mean ± std: over n values, one for each image and run (or image and pair of runs); the conditions of a group are averaged within an "
    "image first. 95 % interval: of the mean. predicted: maps of the class predicted for each image, as in the paper. fixed: maps of the "
    "class predicted for the clean image (for pairs of runs: of the true class). dead: share of pairs with a map without any salience; they "
    "are in no mean. kept: share of pairs with the same predicted class. if kept, if flipped: mean over single values where the predicted "
    "class is the same, or another one. chance: the same similarity to another image of the same source, label and predicted class. "
    "corrected: (mean - chance) / (1 - chance)."
)
SOURCE_NOTE = (
    "Mean ± standard deviation over images and runs; below it the chance level and the share of dead maps. n: images."
)
GROUP_NOTE = "Over images and runs; a group is averaged within an image first. Below: the chance level and the share of dead maps."


def overview(tables: Tables) -> Sheet:
    """A row a detector, a column AUROC and each score, with interval, chance level and share of dead maps below."""
    totals = [(score, tables.totals(score)) for score in tables.columns]
    aurocs = tables.aurocs()
    rows = []
    for detector in tables.detectors:
        auroc = aurocs.get(detector)
        limits = interval(auroc["ci_low"], auroc["ci_high"]) if auroc else ""
        scores = (_overview_cell(score, by_detector.get(detector)) for score, by_detector in totals)
        runs = count(len(tables.run.models_of(detector)))
        rows.append((*cells(detector, runs), Cell(number(auroc["auroc"] if auroc else None), limits), *scores))
    columns = (
        *map(Column, ("detector", "runs")),
        Column("AUROC", "higher is better", "95 % interval"),
        *(Column(score.name, f"{score.better} is better", "95 % interval, chance, dead") for score in tables.columns),
    )
    note = "Below each mean: its 95 % interval, the chance level, and the share of dead maps where there are any."
    return Sheet("overview", "overview", "All detectors over all images", columns, rows, 1, note)


def _overview_cell(score: RunScore, row: Row | None) -> Cell:
    if row is None:
        return Cell(UNKNOWN)
    lines = [interval(row["ci_low"], row["ci_high"])]
    lines += [f"chance {number(row['chance'])}"] if score.compares else []
    lines += [f"dead {share(row['dead_share'])}"] if row["dead_share"] else []
    return Cell(number(row["mean"]), "\n".join(lines))


def by_source(tables: Tables, measure: Measure) -> Sheet:
    """Table 1: a row a score, detector and variant, a column a source."""
    below = "chance, dead" if measure.compares else "dead"
    keys = _source_keys(tables)
    rows = tables.measures
    rows = rows[(rows.measure == measure.name) & (rows.condition.eq(ALL) if measure.has_mean_over_conditions else True)]
    lines = []
    for (label, detector, variant), some in _blocks(rows, measure).items():
        by_key = {(row["label"], row["source"]): row for row in some}
        means = (_source_cell(measure, by_key.get(key)) for key in keys)
        lines.append((*cells(label, detector), Cell(variant, below), *means))
    title = f"{measure.name.capitalize()} by source: mean ± standard deviation"
    headings = (Column(name, f"n = {images}", below) for name, images in keys.values())
    columns = (*map(Column, ("score", "detector", "variant")), *headings)
    return Sheet(f"table1-{measure.name}", measure.name, title, columns, lines, 3, SOURCE_NOTE)


def _source_cell(measure: Measure, row: Row | None) -> Cell:
    if row is None:
        return Cell(UNKNOWN)
    chance = f"{number(row['chance'])}, " if measure.compares else ""
    return Cell(mean_std(row["mean"], row["std"]), f"{chance}{share(row['dead_share'])}")


def details(tables: Tables, measure: Measure, *, groups: bool = True) -> Sheet:
    """Everything that is reported of a score over all images: a row a score, detector and variant.

    A measure with groups of conditions has rows for all of its conditions together, and, with ``groups``, for each group.
    """
    names = ["mean ± std", "95 % interval", "n", "dead"]
    if measure.compares:
        names += ["kept", "if kept", "if flipped", "chance", "corrected", "95 % interval of corrected"]
    rows = over_all(tables.measures)
    rows = rows[rows.measure == measure.name]
    if measure.has_mean_over_conditions:
        rows = rows[rows.condition.isin([ALL, *measure.groups] if groups else [ALL])]
    lines = []
    for heads, (row,) in _blocks(rows, measure).items():
        texts = [
            mean_std(row["mean"], row["std"]), interval(row["ci_low"], row["ci_high"]), count(row["n"]), share(row["dead_share"]),
            share(row["kept_share"]), number(row["mean_kept"]), number(row["mean_flipped"]), number(row["chance"]),
            number(row["corrected"]), interval(row["corrected_low"], row["corrected_high"]),
        ]  # fmt: skip
        lines.append(cells(*heads, *texts[: len(names)]))
    columns = tuple(map(Column, ("score", "detector", "variant", *names)))
    title = f"{measure.name.capitalize()} over all images"
    return Sheet(measure.name, measure.name, title, columns, lines, 3, PAIRS_NOTE if measure.compares else MAPS_NOTE)


def by_group(tables: Tables, measure: Measure) -> Sheet:
    """Table 2: a column each group of conditions of a measure, and each condition; no rows where it has no groups."""
    rows = over_all(tables.measures)
    rows = rows[(rows.measure == measure.name) & tables.main_similarity(rows)] if measure.groups else rows[:0]
    rows = rows.assign(condition=[name.partition("@")[0] for name in rows.condition])  # pixels depend on the input
    present = set(rows.condition)
    conditions = [name for name in dict.fromkeys((ALL, *measure.groups, *rows.condition)) if name in present]
    lines = []
    for detector in dict.fromkeys(rows.detector):
        for variant in measure.variants:
            some = rows[(rows.detector == detector) & (rows.variant == variant)]
            by_condition = {row["condition"]: row for row in records(some)}
            means = (_source_cell(measure, by_condition.get(name)) for name in conditions)
            if by_condition:
                lines.append((*cells(detector), Cell(variant, "chance, dead"), *means))
    kind = f"{measure.perturbation}s"
    names = (f"all {kind}" if name == ALL else name for name in conditions)
    columns = (*map(Column, ("detector", "variant")), *(Column(name, "", "chance, dead") for name in names))
    title = f"{measure.name.capitalize()} by {measure.perturbation}: mean ± standard deviation"
    return Sheet(f"table2-{kind}", measure.name, title, columns, lines, 2, GROUP_NOTE)


def _blocks(rows: pd.DataFrame, measure: Measure) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by label, detector and variant, in the order of the tables: the mean over conditions and SSIM come first."""
    similarity = main_similarity(rows.similarity)
    conditions = list(dict.fromkeys([ALL, *measure.groups, *rows.condition]))
    detectors = list(dict.fromkeys(rows.detector))

    def place(row: Row) -> tuple[object, ...]:
        condition, detector = conditions.index(row["condition"]), detectors.index(row["detector"])
        return condition, main_first(row["similarity"], similarity), detector, measure.variants.index(row["variant"])

    blocks: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(records(rows), key=place):
        label = label_of(row["measure"], row["condition"], row["similarity"])
        blocks.setdefault((label, row["detector"], row["variant"]), []).append(row)
    return blocks


def _source_keys(tables: Tables) -> dict[tuple[str, str], tuple[str, int]]:
    """(label, source) of each column of table 1 with its name and number of images: all, labels of several sources, sources."""
    stretches = tables.stretches
    keys = {(ALL, ALL): ("total", len(tables.run.image_table))}
    for label in dict.fromkeys(s.label for s in stretches if s.label is not None):
        sizes = [s.stop - s.start for s in stretches if s.label == label]
        if len(sizes) > 1:
            keys[label, ALL] = (f"all {printable_line(label)}", sum(sizes))
    names = zip(stretches, tables.source_names(), strict=True)
    return keys | {(s.label or ALL, s.source): (printable_line(name), s.stop - s.start) for s, name in names}
