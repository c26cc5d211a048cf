"""Terminal tables of a run in the paper's layout: Table 1 (detector x source), Table 2 (transforms), AUROC, differences."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from explain2me.run.schema import ALL
from explain2me.text import printable

if TYPE_CHECKING:
    from explain2me.report.findings import Finding
    from explain2me.run.folder import Run


Row = dict[str, Any]


NAMES = {
    "entropy": "entropy ↓",
    "resilience": "resilience ↑",
    "focus_salient": "focus, salient blurred ↓",
    "focus_nonsalient": "focus, rest blurred ↑",
    "stability": "stability ↑",
    "auroc": "AUROC ↑",
}


VARIANTS = ("spatial", "intensity", "predicted", "fixed", "softmax", "released")


CELL_WIDTH = 16
MOST_REFUSED = 5
MOST_FINDINGS = 12


def show_run(run: "Run", console: Console, *, brief: bool = False) -> None:
    """Print every table of a run to a terminal of any width; wide ones are cut into several by source.

    Args:
        run: with its summary.
        console: to print to.
        brief: only the measures over all sources, AUROC, and the notes.
    """
    measures: list[Row] = run.summary("measures").to_pylist()
    performance: list[Row] = run.summary("performance").to_pylist()
    several = len(run.config.detectors) > 1
    differences: list[Row] = run.summary("differences").to_pylist() if several and not brief else []
    wanted = [row for row in measures if row["measure"] != "resilience" or row["condition"] == ALL]
    wanted.sort(key=lambda row: VARIANTS.index(row["variant"]))
    blocks = _grouped(wanted, "measure", "condition", "similarity")
    if blocks:
        for table in _overview_tables(blocks, console.width):
            console.print(table)
        for table in () if brief else _source_tables(blocks, _images_of(run), console.width):
            console.print(table)
    else:
        console.print("No measures: all five are switched off in this run.")
    for variant in ("predicted", "fixed"):
        transforms = [row for row in measures if row["measure"] == "resilience" and row["variant"] == variant]
        if transforms and not brief:
            console.print(_transform_table(transforms, variant))
    if performance:
        console.print(_auroc_table(performance))
    else:
        console.print("No AUROC: the images have no labels, or only one class.")
    for table in _difference_tables(differences, console.width) if differences else ():
        console.print(table)
    _print_notes(run, console)


def show_findings(found: "Sequence[Finding]", console: Console) -> None:
    """What the numbers say, most decisive first; the report has the rest."""
    from explain2me.report.findings import TAGS

    console.print(Text("What the numbers say", style="bold"))
    for finding in found[:MOST_FINDINGS]:
        tag = Text(f"{TAGS[finding.kind]}: ", style="bold")
        console.print(Padding(tag + _text(finding.text), (0, 0, 0, 2)))
    if not found:
        console.print("  Nothing stands out.")
    if len(found) > MOST_FINDINGS:
        console.print(f"  and {len(found) - MOST_FINDINGS} more, in the report")


def _overview_tables(blocks: dict[tuple[Any, ...], list[Row]], width: int) -> Iterator[Table]:
    """Every measure over all sources, with what is needed to read it; in narrow terminals two or three tables."""
    columns: dict[str, Callable[[Row], str]] = {
        "mean ± std": _mean_std,
        "95 % interval": lambda row: "-" if row["ci_low"] is None else f"[{row['ci_low']:.3f}, {row['ci_high']:.3f}]",
        "n": lambda row: str(row["n"]),
        "kept": lambda row: _share(row["kept_share"]),
        "if kept": lambda row: _number(row["mean_kept"]),
        "if flipped": lambda row: _number(row["mean_flipped"]),
        "chance": lambda row: _number(row["chance"]),
        "corrected": lambda row: _number(row["corrected"]),
        "dead": lambda row: _share(row["dead_share"]),
    }
    cuts = [0, 9] if width >= 130 else [0, 4, 9] if width >= 100 else [0, 2, 6, 9]
    for first, last in itertools.pairwise(cuts):
        title = "The five measures over all sources" + (", continued" if first else "")
        yield _overview_table(
            blocks, f"{title} (↓ lower is better, ↑ higher is better)", list(columns.items())[first:last]
        )


def _overview_table(
    blocks: dict[tuple[Any, ...], list[Row]], title: str, columns: list[tuple[str, Callable[[Row], str]]]
) -> Table:
    """A row a measure, detector and variant."""
    table = _table(title)
    for name in ("measure", "detector"):
        table.add_column(name, overflow="fold")
    table.add_column("variant", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)  # the words give way, not the numbers
    for block, rows in blocks.items():
        total = [row for row in rows if row["label"] == row["source"] == ALL]
        for i, row in enumerate(_by_detector(total)):
            names = (_block_name(*block) if i == 0 else "", row["detector"], row["variant"])
            table.add_row(*map(_text, names), *(cell(row) for _, cell in columns), end_section=i == len(total) - 1)
    return table


def _source_tables(
    blocks: dict[tuple[Any, ...], list[Row]], count: Counter[tuple[str, str]], width: int
) -> Iterator[Table]:
    """Table 1: a row a measure, detector and variant, a column a source; as many tables as the width asks for."""
    every = [row for rows in blocks.values() for row in rows]
    columns = _columns(every)
    taken = 6 + max(len(_block_name(*block)) for block in blocks) + max(len(row["detector"]) for row in every) + 12
    per_table = max(1, (width - taken) // (CELL_WIDTH + 2))
    for first in range(0, len(columns), per_table):
        some = columns[first : first + per_table]
        table = _table(
            "By source: mean ± std, below it chance level and share of dead maps" + (", continued" if first else "")
        )
        for name in ("measure", "detector", "variant"):
            table.add_column(name)
        for key in some:
            table.add_column(Text(f"{_heading(*key)}\nn = {count[key]}"), justify="right")
        for block, rows in blocks.items():
            groups = _grouped(_by_detector(rows), "detector", "variant")
            for i, ((detector, variant), group) in enumerate(groups.items()):
                by_source = {(row["label"], row["source"]): row for row in group}
                cells = [_two_lines(by_source[key]) for key in some]
                name = _block_name(*block) if i == 0 else ""
                what = Text.assemble(printable(variant), (f"\n{_second_line(block[0])}", "dim"))
                table.add_row(_text(name), _text(detector), what, *cells, end_section=i == len(groups) - 1)
        yield table


def _images_of(run: "Run") -> Counter[tuple[str, str]]:
    """Images of each source, each label, and all, by the names of the summary."""
    images = run.image_table
    pairs = Counter(zip(images["label"].to_pylist(), images["source"].to_pylist(), strict=True))
    counts: Counter[tuple[str, str]] = Counter()
    for (label, source), number in pairs.items():
        for key in {(label or ALL, source), (label or ALL, ALL), (ALL, ALL)}:
            counts[key] += number
    return counts


def _second_line(measure: str) -> str:
    """What stands below the mean of a cell: entropy compares nothing, and so has no chance level."""
    return "dead" if measure == "entropy" else "chance, dead"


def _two_lines(row: Row) -> Text:
    """``0.712 ± 0.104``, and below it the chance level and the share of dead maps."""
    chance = "" if row["measure"] == "entropy" else f"{_number(row['chance'])}, "
    return Text.assemble(_mean_std(row), (f"\n{chance}{_share(row['dead_share'])}", "dim"))


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
    table = _table(
        f"Resilience by transform, variant {variant}, all sources: mean ± std, below it chance level and share of dead maps"
    )
    table.add_column("detector")
    groups = ("shifts", "flips", "rotations", ALL)
    for group in groups:
        table.add_column(group, justify="right")
    total = [row for row in rows if row["label"] == row["source"] == ALL and row["condition"] in groups]
    for (detector, similarity), found in _grouped(total, "detector", "similarity").items():
        by_group = {row["condition"]: row for row in found}
        name = detector if similarity == "ssim" else f"{detector} [{similarity}]"
        what = Text.assemble(printable(name), (f"\n{_second_line('resilience')}", "dim"))
        table.add_row(what, *(_two_lines(by_group[group]) for group in groups))
    return table


def _auroc_table(performance: list[Row]) -> Table:
    """AUROC before and after both removals, mean over runs with its 95 % interval, overall and by source.

    Where a removal leaves images out (no blur without a live clean map), its cell says how many are left, and the AUROC
    before over those.
    """
    table = _table("AUROC (softmax), mean over runs [95 % interval]: before, and after blurring by salience")
    for name in ("detector", "positives", "negatives"):
        table.add_column(name)
    conditions = ("clean", "focus_salient", "focus_nonsalient")
    for name in ("before", "salient removed", "rest removed", "images of a run"):
        table.add_column(name, justify="right")
    wanted = [row for row in performance if row["score"] == "softmax"]
    for names, rows in _grouped(wanted, "detector", "positives", "negatives").items():
        by_condition = {row["condition"]: row for row in rows if row["run"] == ALL}
        of_runs = [row for row in rows if row["run"] != ALL and row["auroc"] is not None]
        counts = {c: [row["n"] for row in of_runs if row["condition"] == c] for c in conditions}
        clean = by_condition["clean"]
        cells = [_after(by_condition[c], clean, counts[c]) if c in by_condition else Text("-") for c in conditions]
        table.add_row(*map(_text, names), *cells, str(clean["n"]))
    return table


def _difference_tables(differences: list[Row], width: int) -> Iterator[Table]:
    """Each pair of detectors in each score over all images; in narrow terminals two tables."""
    from explain2me.statistics.differences import without_runs

    columns: dict[str, Callable[[Row], str]] = {
        "difference": lambda row: _signed(row, "difference", "ci") + ("*" if without_runs(row) else ""),
        "images": lambda row: "-" if row["num_images"] is None else str(row["num_images"]),
        "p": lambda row: "-" if row["p"] is None else "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}",
        "above chance": lambda row: _signed(row, "corrected", "corrected"),
    }
    wanted = [row for row in differences if row["label"] == row["source"] == ALL]
    wanted = [row for row in wanted if row["measure"] != "resilience" or row["condition"] == ALL]
    wanted.sort(key=lambda row: VARIANTS.index(row["variant"]))
    blocks = _grouped(wanted, "measure", "condition", "similarity")
    for first, last in itertools.pairwise([0, 4] if width >= 128 else [0, 3, 4]):
        more = ", continued" if first else ""
        yield _difference_table(
            blocks,
            f"Differences over all sources{more}: detector less other detector [95 % interval over images and training runs; *: over images "
            f"alone, with one run or one pair of runs]",
            list(columns.items())[first:last],
        )


def _difference_table(
    blocks: dict[tuple[Any, ...], list[Row]], title: str, columns: list[tuple[str, Callable[[Row], str]]]
) -> Table:
    """A row a score, pair of detectors and variant."""
    table = _table(title)
    for name in ("score", "detector", "other detector"):
        table.add_column(name, overflow="fold")
    table.add_column("variant", no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for block, rows in blocks.items():
        names = [_block_name(*block)]
        for pair, of_pair in _grouped(rows, "detector", "other_detector").items():
            names += pair
            for row in of_pair:
                table.add_row(*map(_text, [*names, row["variant"]]), *(cell(row) for _, cell in columns))
                names = ["", "", ""]
            names = [""]
        table.add_section()
    return table


def _signed(row: Row, name: str, limits: str) -> str:
    """``+0.123 [-0.001, +0.247]``."""
    value, low, high = row[name], row[f"{limits}_low"], row[f"{limits}_high"]
    if value is None:
        return "-"
    return f"{value:+.3f}" + ("" if low is None else f" [{low:+.3f}, {high:+.3f}]")


def _after(row: Row, clean: Row, counts: list[int]) -> Text:
    """``counts`` are the images of each run that has an AUROC."""
    from explain2me.statistics.performance import from_to

    if row["n"] == clean["n"]:
        return Text(_interval(row))
    count = from_to(counts or [row["n"]])
    return Text.assemble(_interval(row), (f"\nn = {count}, before {_number(row['auroc_clean'])}", "dim"))


def _print_notes(run: "Run", console: Console) -> None:
    from explain2me.statistics.cells import LARGE_DEAD_SHARE

    def say(line: str, style: str | None = None) -> None:
        console.print(printable(line), style=style, markup=False)

    for row in run.summary("precision").to_pylist():
        name = " ".join(row[column] for column in ("measure", "variant", "similarity") if row[column])
        numbers = f"largest difference {_number(row['max_difference'], 4)}, mean {_number(row['mean_difference'], 4)}"
        if row["num_one_sided"]:
            numbers += f", {row['num_one_sided']} value(s) in one of them only"
        say(f"{run.config.compute.precision} against float32, {row['detector']}, {name}: {numbers}")
    for row in run.summary("quarantine").to_pylist():
        say(f"quarantined: {row['num_images']} image(s), {row['kind']} ({row['stage']})")
    refused = run.quarantine().to_pylist()
    for row in refused[:MOST_REFUSED]:
        say(f"  {row['path']}: {row['message']}")
    if len(refused) > MOST_REFUSED:
        say(f"  and {len(refused) - MOST_REFUSED} more: {run.folder / 'quarantine'}")
    for row in run.summary("measures").to_pylist():
        whole = row["label"] == row["source"] == ALL and row["variant"] == "spatial"
        if whole and row["dead_share"] is not None and row["dead_share"] >= LARGE_DEAD_SHARE:
            say(
                f"warning: {_share(row['dead_share'])} of the clean maps of {row['detector']} are dead (nothing speaks for the "
                f"class): its scores are those of the rest and do not compare with those of other detectors"
            )
    say(
        "mean ± std over n values: one for each image and run (for stability: image and pair of runs), averaged first over "
        "the transforms of a group; std is the spread of these values. Below a source, n is its images. predicted: the map "
        "of the class predicted for each image (the paper). fixed: of the class predicted for the clean image (for "
        "stability: of the label). kept: share of pairs with the same predicted class; if kept, if flipped: mean over the "
        "single values, not averaged over transforms. chance: the same similarity to another image of the same source, "
        "label and predicted class; corrected = (S - chance) / (1 - chance). dead: share of pairs with a map that has "
        "nothing in it; they are in no mean. released: ranked by the logit of the positive class alone, as the authors' scripts do. "
        "AUROC: n counts the images of one run (from the fewest to the most); where a "
        "removal leaves images out (no blur without a live clean map), the AUROC before over the same images stands below. "
        f"Every number by source, and more: {run.folder / 'summary'}",
        style="dim",
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


def _text(name: str) -> Text:
    """A name from a manifest or a config: no markup, no control character."""
    return Text(printable(name))


def _heading(label: str, source: str) -> str:
    if source != ALL:
        return printable(source)
    return "total" if label == ALL else f"all {printable(label)}"


def _mean_std(row: Row) -> str:
    if row["mean"] is None:
        return "-"
    return _number(row["mean"]) + ("" if row["std"] is None else f" ± {row['std']:.3f}")


def _interval(row: Row) -> str:
    if row["auroc"] is None:
        return "-"
    return f"{row['auroc']:.3f}" + ("" if row["ci_low"] is None else f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]")


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %" if value in (0, 1) else f"{100 * value:.1f} %"
