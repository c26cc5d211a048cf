"""Stage 4: from the tables of a run to a page, figures, tables for a paper and model cards."""

from explain2me.report.write import Plots, write_report

__all__ = ["Plots", "write_report"]
