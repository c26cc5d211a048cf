"""Sheets on a terminal of any width: a wide one is split over several tables, its label columns repeated."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from explain2me.report.formats import share
from explain2me.report.sheets.comparisons import aurocs, differences
from explain2me.report.sheets.data import precision, quarantine
from explain2me.report.sheets.measures import by_group, by_source, details
from explain2me.report.sheets.sheet import Cell, Column, Sheet, cut, stacked
from explain2me.report.summary import LARGE_DEAD_SHARE, Tables
from explain2me.statistics.scores import CLEAN, MEASURES
from explain2me.text import printable

if TYPE_CHECKING:
    from explain2me.run.folder import Run

MOST_REFUSED = 5
MOST_FINDINGS = 12
MOST_ROWS = 1000
"""Of each table."""
GAP = 2
"""Spaces between two columns."""
LEAST_LABEL = 8
"""To this width label columns are narrowed, where there is too little room for numbers."""


def show_run(run: "Run", console: Console, *, brief: bool = False) -> None:
    """Print every table of a run; ``brief`` only the measures over all images, AUROC, and the notes."""
    tables = Tables(run)
    for sheet in _sheets(tables, brief):
        for table in split(sheet, console.width):
            console.print(table)
            console.print()
        if sheet.note:
            console.print(Text(printable(sheet.note), style="dim"), soft_wrap=False)
            console.print()
    if not tables.columns:
        console.print("No measures: all are switched off in this run.")
    if not len(tables.performance):
        console.print("No AUROC: the images have no labels, or only one class.")
    for line in _notes(tables):
        console.print(printable(line), markup=False)


def show_findings(findings: Sequence[tuple[str, str]], console: Console) -> None:
    """Print what the numbers say, kind and text of each finding, the most decisive first; the report has the rest."""
    console.print(Text("What the numbers say", style="bold"))
    for kind, text in findings[:MOST_FINDINGS]:
        console.print(Padding(Text(f"{printable(kind)}: ", style="bold") + Text(printable(text)), (0, 0, 0, 2)))
    if not findings:
        console.print("  Nothing stands out.")
    if len(findings) > MOST_FINDINGS:
        console.print(f"  and {len(findings) - MOST_FINDINGS} more, in the report")


def split(sheet: Sheet, width: int) -> Iterator[Table]:
    """A sheet as tables of at most ``width`` columns of text; the first label is printed once in a block of rows."""
    labels = _label_widths(sheet, width)
    room = width - sum(labels) - GAP * (len(labels) - 1)
    first = sheet.heads
    while first < len(sheet.columns):
        stop, used = first, 0
        while stop < len(sheet.columns) and (stop == first or used + GAP + _natural(sheet, stop) <= room):
            used += GAP + _natural(sheet, stop)
            stop += 1
        continued = ", continued" if first > sheet.heads else ""
        yield _table(sheet, labels, range(first, stop), f"{sheet.title}{continued}")
        first = stop


def _sheets(tables: Tables, brief: bool) -> Iterator[Sheet]:
    measures = list(MEASURES.values())
    overview = stacked(
        "Measures over all images (↓ lower is better, ↑ higher is better)",
        (details(tables, measure, groups=False) for measure in measures),
    )
    by_sources = stacked(
        "By source: mean ± std, below it chance level and share of dead maps",
        (by_source(tables, measure) for measure in measures),
    )
    by_groups = [] if brief else [by_sources, *(by_group(tables, measure) for measure in measures)]
    compared = [] if brief else [differences(tables)]
    candidates = [overview, *by_groups, aurocs(tables), *compared, quarantine(tables), precision(tables)]
    where = str(tables.run.folder / "summary")
    return (cut(sheet, MOST_ROWS, where) for sheet in candidates if sheet and sheet.rows)


def _label_widths(sheet: Sheet, width: int) -> list[int]:
    """Widths of the label columns: as wide as their texts, or narrowed to leave half of the terminal to the numbers."""
    widths = [_natural(sheet, i) for i in range(sheet.heads)]
    numbers = [_natural(sheet, i) for i in range(sheet.heads, len(sheet.columns))]
    if sum(widths) + sum(numbers) + GAP * (len(sheet.columns) - 1) <= width:
        return widths
    room = max(width // 2, width - max(numbers, default=0) - GAP * 2) if len(numbers) == 1 else width // 2
    while sum(widths) + GAP * (len(widths) - 1) > room and max(widths) > LEAST_LABEL:
        widths[widths.index(max(widths))] -= 1
    return widths


def _natural(sheet: Sheet, column: int) -> int:
    """Width of a column without wrapping; the heading of a number column may wrap between words."""
    cells = [line for row in sheet.rows for line in (row[column].text, *row[column].below.split("\n"))]
    heading = sheet.columns[column]
    words = [heading.name] if column < sheet.heads else re.split(r"\s+", heading.name)
    return max(Text(printable(text)).cell_len for text in (*cells, *words, heading.detail))


def _table(sheet: Sheet, labels: Sequence[int], numbers: range, title: str) -> Table:
    """Some number columns of a sheet beside all of its label columns."""
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
        padding=(0, GAP - 1, 0, 0),
    )  # fmt: skip
    for column, width in zip(sheet.columns, labels, strict=False):
        table.add_column(_heading(column), width=width, overflow="fold")
    for i in numbers:
        table.add_column(_heading(sheet.columns[i]), justify="right", width=_natural(sheet, i))
    firsts = list(_first_labels(sheet, labels[0]))
    for n, row in enumerate(sheet.rows):
        ends = n + 1 == len(sheet.rows) or sheet.rows[n + 1][0] != row[0]
        cells = [Text(firsts[n]), *(_text(cell) for cell in row[1 : sheet.heads]), *(_text(row[i]) for i in numbers)]
        table.add_row(*cells, end_section=ends and sheet.heads > 1)
    return table


def _first_labels(sheet: Sheet, width: int) -> Iterator[str]:
    """The first label of each row: printed once in a block of rows, its wrapped lines spread over the rows of the block."""
    for label, rows in itertools.groupby(row[0].text for row in sheet.rows):
        lines = _wrapped(printable(label), width)
        for left in range(sum(1 for _ in rows), 0, -1):
            yield "\n".join(lines[:1] if left > 1 else lines)
            lines = lines[1:]


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most ``width``, cut after spaces, underscores, hyphens and ``@`` where there are any."""
    lines = [""]
    for piece in re.split(r"(?<=[ _@-])", text):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]


def _heading(column: Column) -> Text:
    return Text(printable(column.name) + (f"\n{printable(column.detail)}" if column.detail else ""))


def _text(cell: Cell) -> Text:
    """A cell without markup and control characters; further lines are dim."""
    below = "\n".join(map(printable, cell.below.split("\n")))
    return Text.assemble(printable(cell.text), (f"\n{below}", "dim") if below else "")


def _notes(tables: Tables) -> Iterator[str]:
    """Images that were refused, and detectors with many dead maps."""
    refused = tables.run.quarantine().to_pylist() if len(tables.quarantine) else []
    yield from (f"quarantined: {row['path']}: {row['message']}" for row in refused[:MOST_REFUSED])
    if len(refused) > MOST_REFUSED:
        yield f"and {len(refused) - MOST_REFUSED} more: {tables.run.folder / 'quarantine'}"
    of_maps = [score for score in tables.columns if not score.compares and score.condition == CLEAN]
    for name, row in tables.totals(of_maps[0]).items() if of_maps else ():
        if row["dead_share"] >= LARGE_DEAD_SHARE:
            yield (
                f"warning: {share(row['dead_share'])} of the clean maps of {name} are dead (they show no evidence for the class). "
                f"Its scores are means over the other maps, so do not compare them with those of other detectors."
            )
    yield f"Every number, also by source: {tables.run.folder / 'summary'}"
