"""A measure that is one row of the table of scores stands in every part of a report."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def toys(reported, make_once):
    """The run with three more measures, and what its report has: (folder of the report, contents)."""

    def fill(folder: Path) -> None:
        shutil.copytree(reported.folder, folder / "run", ignore=shutil.ignore_patterns("report"))
        command = [sys.executable, str(Path(__file__).with_name("toys.py")), str(folder / "run")]
        output = subprocess.run(command, capture_output=True, text=True, check=False)
        assert output.returncode == 0, output.stderr
        (folder / "contents.json").write_text(output.stdout.splitlines()[-1])

    folder = make_once("toys", fill)
    return folder / "run" / "report", json.loads((folder / "contents.json").read_text())


def test_it_is_in_the_tables(toys):
    report, contents = toys
    for name, labels in (("toy", {"toy ↑"}), ("pact", {"pact ↑", "pact [pearson] ↑"})):
        for file in (f"table1-{name}.csv", f"{name}.csv"):
            with (report / "tables" / file).open() as lines:
                assert {row["score"] for row in csv.DictReader(lines)} == labels
    with (report / "tables" / "overview.csv").open() as lines:
        (row, *_) = csv.DictReader(lines)
    assert {"toy", "tug, near", "tug, far", "pact"} <= set(row)
    with (report / "tables" / "differences.csv").open() as lines:
        assert {"toy ↑", "tug, near ↓", "tug, far ↑", "pact ↑"} <= {row["score"] for row in csv.DictReader(lines)}
    for label in ("toy ↑", "tug, near ↓", "tug, far ↑", "pact ↑"):
        assert label in contents["terminal"]


def test_it_is_in_the_figures(toys):
    report, contents = toys
    names = {path.stem for path in (report / "figures").glob("*.svg")}
    assert {
        "toy-extremes",
        "pact-runs",
        "pact-matrix",
        "violin-toy",
        "violin-tug_near",
        "violin-tug_far",
        "violin-pact",
    } <= names
    assert {"toy_extremes", "pact_runs"} <= set(contents["plots"])
    assert {"toy", "tug_near", "pact"} <= set(contents["columns"])
    axes = contents["radar"]["second"]
    assert list(axes)[-3:] == ["toy", "tug", "pact"]
    assert axes["toy"] == pytest.approx(1 - axes["1 - entropy"])
    assert (axes["tug"], axes["pact"]) == (axes["focus"], axes["stability"])
    chance = (report / "index.html").read_text()
    assert "tug, far, second: raw" in chance
    assert "toy, second: raw" not in chance  # a score of single maps has no chance level


def test_it_is_in_the_findings_and_cards(toys):
    report, contents = toys
    wrong = [text for kind, text in contents["findings"] if kind == "wrong-way"]
    assert any(text.startswith("The tug of second goes the wrong way") and "near end pulled" in text for text in wrong)
    compared = " ".join(text for kind, text in contents["findings"] if kind in ("alike", "differs"))
    assert "toy" in compared
    assert "pact" in compared
    card = (report / "model-cards" / "second" / "model-card.md").read_text()
    assert "explain2me_toy" in card
    assert "| tug, near | lower |" in card


def test_it_is_on_the_page_and_in_the_notebook(toys):
    report, contents = toys
    page = (report / "index.html").read_text()
    for words in ("Toy of maps", "Is it a toy?", "1: it is.", 'href="#tug"', "Pact of runs", "Runs in a pact"):
        assert words in page
    data = json.loads(page.split('id="report-data">')[1].split("</script>")[0])
    assert {"toy", "tug_near", "pact"} <= {column["key"] for column in data["columns"]}
    assert {"toy", "tug_far", "pact"} <= {telling["score"] for telling in data["telling"]}
    for name in ("toy", "tug", "pact"):
        assert f">{name}</td>" in contents["notebook"]
