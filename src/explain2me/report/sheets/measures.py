"""Sheets of the measures: the overview, and of each measure Table 1, Table 2 and everything over all images."""

import pandas as pd

from explain2me.report.formats import UNKNOWN, count, interval, mean_std, number, share
from explain2me.report.sheets.sheet import Cell, Column, Sheet
from explain2me.report.summary import (
    Row,
    RunScore,
    Tables,
    has_mean,
    label_of,
    main_first,
    main_similarity,
    over_all,
    records,
)
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


def overview(tables: Tables) -> Sheet:
    """A row a detector, a column AUROC and each score, with interval, chance level and share of dead maps below."""
    columns = [
        Column(score.name, f"{score.better} is better", "95 % interval, chance, dead") for score in tables.columns
    ]
    totals = [tables.totals(score) for score in tables.columns]
    performance = tables.aurocs()
    rows = []
    for detector in tables.detectors:
        auroc = performance.get(detector)
        cells = [
            Cell(count(len(tables.run.models_of(detector)))),
            Cell(number(auroc["auroc"]), interval(auroc["ci_low"], auroc["ci_high"])) if auroc else Cell(UNKNOWN),
            *(_overview_cell(score, by.get(detector)) for score, by in zip(tables.columns, totals, strict=True)),
        ]
        rows.append((Cell(printable_line(detector)), *cells))
    return Sheet(
        "overview", "overview", "All detectors over all images",
        (Column("detector"), Column("runs"), Column("AUROC", "higher is better", "95 % interval"), *columns), rows,
        "Below each mean: its 95 % interval, the chance level, and the share of dead maps where there are any.", 1,
    )  # fmt: skip


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
    headings = [Column(name, f"n = {images}", below) for name, images in keys.values()]
    rows = tables.measures
    rows = rows[(rows.measure == measure.name) & (rows.condition.eq(ALL) if has_mean(measure) else True)]
    lines: list[tuple[Cell, ...]] = []
    for (label, detector, variant), some in _blocks(rows, measure).items():
        by_key = {(row["label"], row["source"]): row for row in some}
        cells = [_source_cell(measure, by_key[key]) if key in by_key else Cell(UNKNOWN) for key in keys]
        lines.append((Cell(label), Cell(printable_line(detector)), Cell(variant, below), *cells))
    return Sheet(
        f"table1-{measure.name}", measure.name, f"{measure.name.capitalize()} by source: mean ± standard deviation",
        (*map(Column, ("score", "detector", "variant")), *headings), lines, SOURCE_NOTE, 3,
    )  # fmt: skip


def _source_cell(measure: Measure, row: Row) -> Cell:
    chance = f"{number(row['chance'])}, " if measure.compares else ""
    return Cell(mean_std(row["mean"], row["std"]), f"{chance}{share(row['dead_share'])}")


def details(tables: Tables, measure: Measure, *, groups: bool = True) -> Sheet:
    """Everything that is reported of a score over all images: a row a score, detector and variant.

    Args:
        tables: of the run.
        measure: of MEASURES.
        groups: whether a measure with groups of conditions has rows for each group, beside those for all of its conditions.
    """
    names = ["mean ± std", "95 % interval", "n", "dead"]
    if measure.compares:
        names += ["kept", "if kept", "if flipped", "chance", "corrected", "95 % interval of corrected"]
    rows = over_all(tables.measures)
    rows = rows[rows.measure == measure.name]
    if has_mean(measure):
        rows = rows[rows.condition.isin([ALL, *measure.groups] if groups else [ALL])]
    lines: list[tuple[Cell, ...]] = []
    for (label, detector, variant), (row,) in _blocks(rows, measure).items():
        cells = [
            mean_std(row["mean"], row["std"]), interval(row["ci_low"], row["ci_high"]), count(row["n"]), share(row["dead_share"]),
            share(row["kept_share"]), number(row["mean_kept"]), number(row["mean_flipped"]), number(row["chance"]),
            number(row["corrected"]), interval(row["corrected_low"], row["corrected_high"]),
        ]  # fmt: skip
        lines.append(tuple(map(Cell, (label, printable_line(detector), variant, *cells[: len(names)]))))
    return Sheet(
        measure.name, measure.name, f"{measure.name.capitalize()} over all images",
        tuple(map(Column, ("score", "detector", "variant", *names))), lines, PAIRS_NOTE if measure.compares else MAPS_NOTE, 3,
    )  # fmt: skip


def by_group(tables: Tables, measure: Measure) -> Sheet:
    """Table 2: a column each group of conditions of a measure, and each condition; no rows where it has no groups."""
    rows = over_all(tables.measures)
    rows = rows[(rows.measure == measure.name) & tables.main_similarity(rows)] if measure.groups else rows[:0]
    rows = rows.assign(condition=[name.partition("@")[0] for name in rows.condition])  # pixels depend on the input
    conditions = list(dict.fromkeys(rows.condition))
    groups = [name for name in (ALL, *measure.groups) if name in conditions]
    conditions = [*groups, *(name for name in conditions if name not in groups)]
    kind = f"{measure.perturbation}s"
    lines: list[tuple[Cell, ...]] = []
    for detector in dict.fromkeys(rows.detector):
        for variant in measure.variants:
            some = rows[(rows.detector == detector) & (rows.variant == variant)]
            by_condition = {row["condition"]: row for row in records(some)}
            cells = [
                _source_cell(measure, by_condition[name]) if name in by_condition else Cell(UNKNOWN)
                for name in conditions
            ]
            if by_condition:
                lines.append((Cell(printable_line(detector)), Cell(variant, "chance, dead"), *cells))
    names = [f"all {kind}" if name == ALL else name for name in conditions]
    return Sheet(
        f"table2-{kind}", measure.name, f"{measure.name.capitalize()} by {measure.perturbation}: mean ± standard deviation",
        (*map(Column, ("detector", "variant")), *(Column(name, "", "chance, dead") for name in names)), lines,
        "Over images and runs; a group is averaged within an image first. Below: the chance level and the share of dead maps.", 2,
    )  # fmt: skip


def _blocks(rows: pd.DataFrame, measure: Measure) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by label, detector and variant, in the order of the tables: the mean over conditions and SSIM come first."""
    similarity = main_similarity(rows.similarity) if len(rows) else ""
    conditions = list(dict.fromkeys([ALL, *measure.groups, *rows.condition]))
    detectors = list(dict.fromkeys(rows.detector))

    def place(row: Row) -> tuple[object, ...]:
        return (
            conditions.index(row["condition"]), main_first(row["similarity"], similarity), detectors.index(row["detector"]),
            measure.variants.index(row["variant"]),
        )  # fmt: skip

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
