"""Sheets as files: CSV and LaTeX."""

import csv
import io

from explain2me.report.sheets.sheet import Sheet
from explain2me.text import no_formula

SPECIAL = {
    "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}", ">": "\\textgreater{}",
    "|": "\\textbar{}", "±": "$\\pm$", "↑": "$\\uparrow$", "↓": "$\\downarrow$",
} | {mark: f"\\{mark}" for mark in "&%$#_{}"}  # fmt: skip
"""Marks that LaTeX would run, or that its own fonts print as others."""


def to_csv(sheet: Sheet) -> str:
    """The table as CSV. Second lines of cells have a column of their own; labels that a spreadsheet would run get an apostrophe."""
    below = [i >= sheet.heads and any(row[i].below for row in sheet.rows) for i in range(len(sheet.columns))]
    names: list[str] = []
    for column, double in zip(sheet.columns, below, strict=True):
        names += [column.name, f"{column.name}: {column.below}"] if double else [column.name]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(no_formula, names))
    for row in sheet.rows:
        texts = [no_formula(cell.text) for cell in row[: sheet.heads]]
        for cell, double in zip(row[sheet.heads :], below[sheet.heads :], strict=True):
            texts += [cell.text, cell.below.replace("\n", "; ")] if double else [cell.text]
        writer.writerow(texts)
    return stream.getvalue()


def to_latex(sheet: Sheet) -> str:
    """First lines of the cells with booktabs rules, to be put into a paper with ``\\input``."""
    layout = "l" * sheet.heads + "r" * (len(sheet.columns) - sheet.heads)
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{tabular}{" + layout + "}",
        "\\toprule",
        " & ".join(latex(column.name) for column in sheet.columns) + " \\\\",
        "\\midrule",
        *(" & ".join(latex(cell.text) for cell in row) + " \\\\\\relax" for row in sheet.rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def latex(text: str) -> str:
    """Text with everything that LaTeX would run made harmless.

    >>> latex("50 % of a_b ± 1")
    '50 \\\\% of a\\\\_b $\\\\pm$ 1'
    """
    return "".join(SPECIAL.get(mark, mark) for mark in text)
