"""A run in a notebook: styled tables and figures."""

import sys
from types import SimpleNamespace

import pyarrow as pa
import pytest
from matplotlib.figure import Figure

from explain2me import open_run
from explain2me.report.notebook import as_html
from explain2me.report.write import Plots


def test_figures_for_notebooks(reported):
    plots = Plots(reported)
    assert isinstance(plots.radar(), Figure)
    assert isinstance(plots.roc(), Figure)
    assert "mean_maps" in dir(plots)
    with pytest.raises(AttributeError, match="no figure 'raddar'"):
        plots.raddar()


def test_a_run_in_a_notebook(reported, monkeypatch):
    shown = {}

    class Shell:
        class display_formatter:
            formatters = {"text/html": SimpleNamespace(for_type=shown.__setitem__)}

    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=Shell))
    run = open_run(reported.folder)
    summary = run.summary()
    assert isinstance(summary, pa.Table)
    assert summary.equals(reported.summary())
    html = shown[pa.Table](summary)
    assert 10 < html.count("<tr>") < len(summary)
    assert shown[pa.Table](run.scores()) is None
    assert isinstance(run.plot.radar(), Figure)


def test_a_hostile_run_in_a_notebook(hostile):
    html = as_html(open_run(hostile.folder).summary())
    assert html is not None
    assert "<img" not in html
