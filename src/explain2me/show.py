"""Terminal tables of a run in the paper's layout: Table 1 (detector x source), Table 2 (transforms), AUROC."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from explain2me.store import Run

ALL = "all"
Row = dict[str, Any]
NAMES = {
    "entropy": "entropy ↓",
    "resilience": "resilience ↑",
    "focus_salient": "focus, salient blurred ↓",
    "focus_nonsalient": "focus, rest blurred ↑",
    "stability": "stability ↑",
}
VARIANTS = ("spatial", "intensity", "predicted", "fixed")
CELL_WIDTH = 16


def show_run(run: Run, console: Console) -> None:
    """Print every table of a run to a terminal of any width; wide ones are cut into several by source."""
    measures: list[Row] = run.summary("measures").to_pylist()
    performance: list[Row] = run.summary("performance").to_pylist()
    wanted = [row for row in measures if row["measure"] != "resilience" or row["condition"] == ALL]
    wanted.sort(key=lambda row: VARIANTS.index(row["variant"]))
    blocks = _grouped(wanted, "measure", "condition", "similarity")
    console.print(_overview_table(blocks))
    for table in _source_tables(blocks, console.width):
        console.print(table)
    for variant in ("predicted", "fixed"):
        transforms = [row for row in measures if row["measure"] == "resilience" and row["variant"] == variant]
        if transforms:
            console.print(_transform_table(transforms, variant))
    if performance:
        console.print(_auroc_table(performance))
    else:
        console.print("No AUROC: the images have no labels, or only one class.")
    _print_notes(run, console)


def _overview_table(blocks: dict[tuple[Any, ...], list[Row]]) -> Table:
    """Every measure over all sources, with what is needed to read it: a row a measure, detector and variant."""
    table = _table("The five measures over all sources (↓ lower is better, ↑ higher is better)")
    for name in ("measure", "detector", "variant"):
        table.add_column(name)
    for name in ("mean ± std", "95 % interval", "n", "kept", "if kept", "if flipped", "chance", "corrected", "dead"):
        table.add_column(name, justify="right")
    for block, rows in blocks.items():
        total = [row for row in rows if row["label"] == row["source"] == ALL]
        for i, row in enumerate(_by_detector(total)):
            numbers = [_number(row[name]) for name in ("mean_kept", "mean_flipped", "chance", "corrected")]
            interval = "-" if row["ci_low"] is None else f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
            cells = [
                _mean_std(row),
                interval,
                str(row["n"]),
                _share(row["kept_share"]),
                *numbers,
                _share(row["dead_share"]),
            ]
            table.add_row(
                Text(_block_name(*block) if i == 0 else ""), Text(row["detector"]), row["variant"], *cells,
                end_section=i == len(total) - 1,
            )  # fmt: skip
    return table


def _source_tables(blocks: dict[tuple[Any, ...], list[Row]], width: int) -> Iterator[Table]:
    """Table 1: a row a measure, detector and variant, a column a source; as many tables as the width asks for."""
    every = [row for rows in blocks.values() for row in rows]
    columns = _columns(every)
    count = {(row["label"], row["source"]): row["num_images"] for row in every if row["measure"] == every[0]["measure"]}
    taken = 6 + max(len(_block_name(*block)) for block in blocks) + max(len(row["detector"]) for row in every) + 11
    per_table = max(1, (width - taken) // (CELL_WIDTH + 2))
    for first in range(0, len(columns), per_table):
        some = columns[first : first + per_table]
        table = _table("By source: mean ± std" + (", continued" if first else ""))
        for name in ("measure", "detector", "variant"):
            table.add_column(name)
        for key in some:
            table.add_column(Text(f"{_heading(*key)}\nn = {count[key]}"), justify="right")
        for block, rows in blocks.items():
            groups = _grouped(_by_detector(rows), "detector", "variant")
            for i, ((detector, variant), group) in enumerate(groups.items()):
                by_source = {(row["label"], row["source"]): row for row in group}
                cells = [_mean_std(by_source[key]) for key in some]
                name = _block_name(*block) if i == 0 else ""
                table.add_row(Text(name), Text(detector), variant, *cells, end_section=i == len(groups) - 1)
        yield table


def _columns(rows: list[Row]) -> list[tuple[str, str]]:
    """The total, each label that has several sources, each source."""
    found = list(dict.fromkeys((row["label"], row["source"]) for row in rows))
    num_sources = Counter(label for label, source in found if source != ALL)
    labels = [key for key in found if key[1] == ALL and num_sources[key[0]] > 1]
    return [(ALL, ALL), *(key for key in labels if key[0] != ALL), *(key for key in found if key[1] != ALL)]


def _block_name(measure: str, condition: str, similarity: str | None) -> str:
    name = f"noise {condition} ↑" if measure == "noise" else NAMES[condition if measure == "focus" else measure]
    return name + (f" [{similarity}]" if similarity not in (None, "ssim") else "")


def _transform_table(rows: list[Row], variant: str) -> Table:
    """Table 2: a row a detector, a column a group of transforms."""
    table = _table(f"Resilience by transform, variant {variant}: mean ± std, all sources")
    table.add_column("detector")
    groups = ("shifts", "flips", "rotations", ALL)
    for group in groups:
        table.add_column(group, justify="right")
    total = [row for row in rows if row["label"] == row["source"] == ALL and row["condition"] in groups]
    for (detector, similarity), found in _grouped(total, "detector", "similarity").items():
        by_group = {row["condition"]: row for row in found}
        name = detector if similarity == "ssim" else f"{detector} [{similarity}]"
        table.add_row(Text(name), *(_mean_std(by_group[group]) for group in groups))
    return table


def _auroc_table(performance: list[Row]) -> Table:
    """AUROC before and after both removals, mean over runs with its 95 % interval, overall and by source."""
    table = _table("AUROC (softmax), mean over runs [95 % interval]: before, and after blurring by salience")
    for name in ("detector", "positives", "negatives"):
        table.add_column(name)
    conditions = ("clean", "focus_salient", "focus_nonsalient")
    for name in ("before", "salient removed", "rest removed", "n"):
        table.add_column(name, justify="right")
    wanted = [row for row in performance if row["run"] == ALL and row["score"] == "softmax"]
    for names, rows in _grouped(wanted, "detector", "positives", "negatives").items():
        by_condition = {row["condition"]: row for row in rows}
        cells = [_interval(by_condition[c]) if c in by_condition else "-" for c in conditions]
        count = by_condition["clean"]["num_positive"] + by_condition["clean"]["num_negative"]
        table.add_row(*map(Text, names), *cells, str(count))
    return table


def _print_notes(run: Run, console: Console) -> None:
    for row in run.summary("precision").to_pylist():
        what = f"{row['detector']}, {row['measure']} {row['variant']}"
        numbers = f"largest difference {row['max_difference']:.4f}, mean {row['mean_difference']:.4f}"
        console.print(f"{run.config.compute.precision} against float32, {what}: {numbers}", markup=False)
    for row in run.summary("quarantine").to_pylist():
        console.print(f"quarantined: {row['num_images']} image(s), {row['kind']} ({row['stage']})", markup=False)
    console.print(
        "mean ± std over images and runs. n: values averaged, below a source its images. predicted: the map of the class predicted for each image (the "
        "paper). fixed: of the class predicted for the clean image (for stability: of the label). kept: share of pairs "
        "with the same predicted class. chance: the same similarity to another image of the same source and label; "
        f"corrected = (S - chance) / (1 - chance). Every number by source, and more: {run.folder / 'summary'}",
        style="dim",
        markup=False,
    )


def _by_detector(rows: list[Row]) -> list[Row]:
    """Rows of one detector together, detectors in the order of the config."""
    order = list(dict.fromkeys(row["detector"] for row in rows))
    return sorted(rows, key=lambda row: order.index(row["detector"]))


def _grouped(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of some columns, in the order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def _table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _heading(label: str, source: str) -> str:
    if source != ALL:
        return source
    return "total" if label == ALL else f"all {label}"


def _mean_std(row: Row) -> str:
    if row["mean"] is None:
        return "-"
    return f"{row['mean']:.3f} ± {row['std']:.3f}" if row["n"] > 1 else f"{row['mean']:.3f}"


def _interval(row: Row) -> str:
    if row["auroc"] is None:
        return "-"
    return f"{row['auroc']:.3f}" + ("" if row["ci_low"] is None else f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %" if value in (0, 1) else f"{100 * value:.1f} %"
