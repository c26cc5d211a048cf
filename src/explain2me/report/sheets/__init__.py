"""Every table, once: a :class:`Sheet` from the summary tables. The terminal, the page, CSV and LaTeX only lay it out."""

from collections.abc import Iterator

from explain2me.report.sheets.comparisons import aurocs, differences
from explain2me.report.sheets.data import precision, quarantine, sources, training
from explain2me.report.sheets.measures import by_group, by_source, details, overview
from explain2me.report.sheets.sheet import Sheet
from explain2me.report.summary import Tables
from explain2me.statistics.scores import MEASURES


def sheets(tables: Tables) -> Iterator[Sheet]:
    """Every table of a run that has rows, in the order of the page."""
    candidates = [overview(tables), differences(tables), aurocs(tables)]
    for measure in MEASURES.values():
        candidates += [by_source(tables, measure), details(tables, measure), by_group(tables, measure)]
    candidates += [sources(tables), training(tables), quarantine(tables), precision(tables)]
    return (sheet for sheet in candidates if sheet.rows)
