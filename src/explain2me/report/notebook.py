"""A run as notebooks see it: the tables of :class:`Run`, styled, and its figures."""

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from explain2me.report.write import Plots
from explain2me.run.folder import Run
from explain2me.statistics.scores import ALL

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler


SUMMARY = b"explain2me summary"
BARS = ("mean", "chance", "corrected", "auroc", "kept_share", "dead_share")


def style(table: pa.Table) -> "Styler":
    """Rows of a summary table over all images as a styled frame: three decimals, bars behind numbers in [0, 1]."""
    frame = table.to_pandas()
    if {"label", "source"} <= set(frame):
        frame = frame[(frame.label == ALL) & (frame.source == ALL)].drop(columns=["label", "source"])
    styled = frame.style.format(precision=3, na_rep="-", escape="html").hide(axis="index")
    shown = [name for name in BARS if name in frame]
    return styled.bar(subset=shown, vmin=0, vmax=1, color="#cfe3f5", width=90) if len(frame) and shown else styled


class OpenRun(Run):
    """A run folder: ``maps()``, ``scores()`` and ``summary()`` are tables, ``plot`` has its figures.

    In a notebook a summary table is shown as a styled frame.
    """

    def summary(self, table: str = "measures") -> pa.Table:
        """A summary table; names as of :meth:`Run.summary`."""
        rows = super().summary(table)
        return rows.replace_schema_metadata({**(rows.schema.metadata or {}), SUMMARY: table})

    @functools.cached_property
    def plot(self) -> Plots:
        """``run.plot.radar()`` and the like return matplotlib figures."""
        return Plots(Run(self.folder))


def as_html(table: pa.Table) -> str | None:
    """A summary table as a notebook shows it, styled; None for other tables, which are shown as text."""
    return style(table).to_html() if SUMMARY in (table.schema.metadata or {}) else None


def open_run(folder: str | Path) -> OpenRun:
    """Open a run folder, or the folder ``run`` of a study, for reading.

    Raises:
        RunFolderError: there is no run.json, or it cannot be read.
    """
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(pa.Table, as_html)
    return OpenRun(Path(folder))
