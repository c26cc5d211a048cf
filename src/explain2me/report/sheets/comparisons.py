"""Sheets that compare detectors: their differences, and AUROC."""

import itertools
from collections.abc import Iterator, Sequence

import pandas as pd

from explain2me.report.formats import UNKNOWN, count, count_range, interval, is_known, number, p_value
from explain2me.report.sheets.sheet import Cell, Column, Sheet, cells
from explain2me.report.summary import (
    AUROC,
    SOFTMAX,
    Row,
    Tables,
    label_of,
    main_first,
    main_similarity,
    over_all,
    records,
    single_run_detectors,
)
from explain2me.statistics.scores import ALL, CLEAN, MEASURES

DIFFERENCES_NOTE = (
    "Detector minus other detector, each over all images with a value. images: those with a value of both detectors, compared as pairs. "
    "95 % interval: over other images and other training runs (Student's t, Satterthwaite's degrees of freedom); *: over images only, "
    "because a detector has one run or one pair of runs. p: of no difference; with many comparisons, some p are below 0.05 by chance. "
    "above chance: difference of (mean - chance) / (1 - chance)."
)
AUROC_NOTE = (
    "Mean over runs, with its 95 % interval. images of a run: the fewest and the most of any run. Images whose clean map "
    "is dead cannot be perturbed by it and are left out: then the cell gives n, the number of images used, and the AUROC of the clean images "
    "over the same images (before)."
)


def differences(tables: Tables) -> Sheet:
    """Each pair of detectors in AUROC and every score over all images, in each variant."""
    rows = over_all(tables.differences) if len(tables.detectors) > 1 else pd.DataFrame()
    lines = []
    for score, block in _difference_blocks(rows):
        for row in block:
            star = "*" if single_run_detectors(row) else ""
            lines.append(
                cells(
                    score, row["detector"], row["other_detector"], row["variant"], number(row["difference"], signed=True),
                    interval(row["ci_low"], row["ci_high"], signed=True) + star, p_value(row["p"]), count(row["num_images"]),
                    number(row["corrected"], signed=True), interval(row["corrected_low"], row["corrected_high"], signed=True),
                )
            )  # fmt: skip
    columns = (
        "score", "detector", "other detector", "variant", "difference", "95 % interval", "p", "images", "above chance",
        "95 % interval of above chance",
    )  # fmt: skip
    title = "Differences between detectors"
    return Sheet("differences", "decide", title, tuple(map(Column, columns)), lines, 4, DIFFERENCES_NOTE)


def _difference_blocks(rows: pd.DataFrame) -> Iterator[tuple[str, list[Row]]]:
    """Rows of each score, AUROC first; in it those of each pair of detectors together, variants in order."""
    if not len(rows):
        return
    similarity = main_similarity(rows.similarity)
    pairs = list(dict.fromkeys(zip(rows.detector, rows.other_detector, strict=True)))
    orders = {AUROC.measure: (SOFTMAX, "released")} | {name: measure.variants for name, measure in MEASURES.items()}
    for name, variants in orders.items():
        some = rows[(rows.measure == name) & rows.variant.isin(variants)]
        if name in MEASURES and MEASURES[name].has_mean_over_conditions:
            some = some[some.condition == ALL]
        places = {(*pair, variant): i for i, (pair, variant) in enumerate(itertools.product(pairs, variants))}
        blocks: dict[tuple[str, str | None], list[Row]] = {}
        for row in sorted(records(some), key=lambda row: main_first(row["similarity"], similarity)):
            blocks.setdefault((row["condition"], row["similarity"]), []).append(row)
        for (condition, of_similarity), block in blocks.items():
            block.sort(key=lambda row: places[row["detector"], row["other_detector"], row["variant"]])
            yield label_of(name, condition, of_similarity), block


def aurocs(tables: Tables) -> Sheet:
    """AUROC of the clean images and under each condition that has one: a row a detector and contrast of sources."""
    conditions = tables.auroc_conditions()
    rows = tables.performance
    if len(rows):
        rows = rows[rows.condition.isin(list(conditions)) & (rows.score == SOFTMAX)]
    means: dict[tuple[str, ...], dict[str, Row]] = {}
    counts: dict[tuple[str, ...], list[int]] = {}
    for row in records(rows):
        key = (row["detector"], row["positives"], row["negatives"])
        if row["run"] == ALL:
            means.setdefault(key, {})[row["condition"]] = row
        elif is_known(row["auroc"]):
            counts.setdefault((*key, row["condition"]), []).append(row["n"])
    lines = []
    for contrast, by_condition in means.items():
        clean = by_condition[CLEAN]
        shown = {name: by_condition.get(name) for name in conditions}
        scores = [_auroc_cell(row, clean, counts.get((*contrast, name))) for name, row in shown.items()]
        accuracies = [number(row["accuracy"] if row else None) for row in shown.values()]
        images = count_range(counts.get((*contrast, CLEAN), [clean["n"]]))
        lines.append((*cells(*contrast), *scores, *cells(*accuracies, images)))
    columns = (
        *map(Column, ("detector", "positives", "negatives")),
        *(Column(words, "AUROC", "95 % interval") for words in conditions.values()),
        *(Column(f"accuracy, {words}") for words in conditions.values()),
        Column("images of a run"),
    )
    return Sheet("auroc", "auroc", "AUROC (softmax) and accuracy", columns, lines, 3, AUROC_NOTE)


def _auroc_cell(row: Row | None, clean: Row, counts: Sequence[int] | None) -> Cell:
    """An AUROC with its interval; where images are left out, how many are used, and the AUROC of the clean ones."""
    if row is None:
        return Cell(UNKNOWN)
    below = interval(row["ci_low"], row["ci_high"])
    if row["n"] != clean["n"]:
        below += f"\nn = {count_range(counts or [row['n']])}, before {number(row['auroc_clean'])}"
    return Cell(number(row["auroc"]), below)
