"""A report of very many detectors and sources stays a page that opens: it says what it leaves out, and where that is."""

import csv
import io
import shutil

import pytest
from rich.console import Console

from explain2me.report import material as materials
from explain2me.report import terminal
from explain2me.report.figures import all_figures
from explain2me.report.findings import data, findings
from explain2me.report.findings.comparisons import MOST_PAIRS, compare
from explain2me.report.material import drawn
from explain2me.report.page import render
from explain2me.report.page.viewer import viewer_data
from explain2me.report.sheets.sheet import Column, Sheet, cells, cut
from explain2me.report.summary import AUROC
from explain2me.report.write import write_report
from explain2me.run.folder import Run


@pytest.fixture
def small_limits(monkeypatch):
    for module in (materials, data):
        monkeypatch.setattr(module, "MOST_DETECTORS", 1)
        monkeypatch.setattr(module, "MOST_SOURCES", 2)
    monkeypatch.setattr(render, "MOST_CELLS", 20)
    monkeypatch.setattr(render, "MOST_OF_A_KIND", 1)


@pytest.mark.usefixtures("small_limits", "no_pdf")
def test_a_page_says_what_it_leaves_out_and_the_files_have_all(reported, tmp_path):
    shutil.copytree(reported.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    said = []
    page = write_report(run, run.config, on_findings=said.extend).read_text()
    with (tmp_path / "run/report/tables/differences.csv").open(newline="") as file:
        num_rows = len(list(csv.reader(file))) - 1
    assert f"These are the first 2 of {num_rows} rows; all are in tables/differences.csv." in page
    assert page.count("more of this kind, in findings.md.") == sum(
        1 for kind in {finding.kind for finding in said} if sum(finding.kind == kind for finding in said) > 1
    )
    text = "show the first 1 of 2 detectors and the first 2 of 3 sources; the tables"
    assert text in (tmp_path / "run/report/findings.md").read_text()
    assert {path.name for path in (tmp_path / "run/report/model-cards").iterdir()} == {"first-detector", "second"}


@pytest.mark.usefixtures("small_limits")
def test_figures_and_viewer_show_the_first_detectors_and_sources(material):
    some = drawn(material)
    assert viewer_data(some, lambda values: values[:, None].repeat(4, 1))["detectors"] == ["first-detector"]
    assert material.tables.detectors == ["first-detector", "second"]
    by_name = {getattr(draw, "__name__", ""): draw for _, draw in all_figures(some)}
    panels = by_name["mean_maps"](some, "viridis").figure.axes
    assert len(panels) == 1 * 2 + 1  # and the bar of colours
    assert len(by_name["samples"](some, "viridis").figure.axes) == 2 * 6


def test_an_ordinary_run_is_drawn_as_it_is(material):
    assert drawn(material) is material
    assert not [finding for finding in findings(material) if "Figures and the viewer" in finding.text]


def test_a_long_table_says_where_all_of_it_is():
    sheet = Sheet("t", "data", "T", (Column("a"),), [cells(str(i)) for i in range(5)], 1, "A note.")
    assert cut(sheet, 5, "t.csv") is sheet
    shorter = cut(sheet, 2, "t.csv")
    assert (shorter.rows, shorter.note) == (
        sheet.rows[:2],
        "A note. These are the first 2 of 5 rows; all are in t.csv.",
    )


def test_a_finding_names_a_hundred_pairs():
    row = {"ci_low": -1.0, "ci_high": 1.0, "difference": 0.0, "corrected_low": -1.0, "corrected_high": 1.0}
    (finding,) = compare(AUROC, {}, {(f"a{i}", "b"): row for i in range(MOST_PAIRS + 7)}, {})
    assert finding.text.endswith("a99 and b, and 7 more pairs (tables/differences.csv).")
    assert len(finding.pairs) == MOST_PAIRS + 7


def test_the_terminal_shows_the_first_rows(reported, monkeypatch):
    monkeypatch.setattr(terminal, "MOST_ROWS", 3)
    text = io.StringIO()
    terminal.show_run(reported, Console(file=text, width=200))
    assert f"all are in {reported.folder / 'summary'}" in " ".join(text.getvalue().split())
