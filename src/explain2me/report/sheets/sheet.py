"""A table as text, which the terminal, the page, CSV and LaTeX only lay out."""

from collections.abc import Iterable
from typing import NamedTuple

from explain2me.report.formats import UNKNOWN
from explain2me.text import printable_line


class Column(NamedTuple):
    """Heading of a column; ``detail`` is a second line of it, ``below`` names the second lines of its cells."""

    name: str
    detail: str = ""
    below: str = ""


class Cell(NamedTuple):
    """Text of a cell, with further lines below it, parted by line feeds."""

    text: str
    below: str = ""


class Sheet(NamedTuple):
    """A table as text.

    Attributes:
        section: of the page: ``overview``, ``decide``, ``auroc``, ``data`` or the name of a measure.
        columns: the first ``heads`` columns are labels, the others numbers.
        note: how to read it.
    """

    name: str
    section: str
    title: str
    columns: tuple[Column, ...]
    rows: list[tuple[Cell, ...]]
    heads: int
    note: str = ""


def cells(*texts: str) -> tuple[Cell, ...]:
    """Cells of one line each, with control characters made visible."""
    return tuple(Cell(printable_line(text)) for text in texts)


def cut(sheet: Sheet, most_rows: int, where: str) -> Sheet:
    """The first rows of a long table, with a sentence that says ``where`` all are; the same object where it is short."""
    if len(sheet.rows) <= most_rows:
        return sheet
    note = f"{sheet.note} These are the first {most_rows} of {len(sheet.rows)} rows; all are in {where}.".strip()
    return sheet._replace(rows=sheet.rows[:most_rows], note=note)


def stacked(title: str, parts: Iterable[Sheet]) -> Sheet | None:
    """Sheets with the same label columns below each other; a column that one of them lacks is empty there."""
    parts = [part for part in parts if part.rows]
    if not parts:
        return None
    columns = dict.fromkeys(column._replace(below="") for part in parts for column in part.columns)
    rows: list[tuple[Cell, ...]] = []
    for part in parts:
        positions = {column._replace(below=""): i for i, column in enumerate(part.columns)}
        rows += [tuple(row[positions[c]] if c in positions else Cell(UNKNOWN) for c in columns) for row in part.rows]
    note = max((part.note for part in parts), key=len)  # that of the sheet with the most columns explains all
    return Sheet("", parts[0].section, title, tuple(columns), rows, parts[0].heads, note)
