"""Tables: one set of numbers and formats in the terminal, the page, CSV and LaTeX."""

import csv
import io
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from explain2me.report.export import latex, to_csv, to_latex
from explain2me.report.sheets import sheets
from explain2me.report.sheets.comparisons import aurocs, differences
from explain2me.report.sheets.measures import by_source, details
from explain2me.report.sheets.sheet import Cell, Column, Sheet, stacked
from explain2me.report.summary import AUROC
from explain2me.report.terminal import show_run, split
from explain2me.statistics.scores import MEASURES


def test_numbers_are_those_of_the_summary_everywhere(reported):
    rows = reported.summary().to_pandas()
    rows = rows[(rows.measure == "noise") & (rows.variant == "predicted") & (rows.similarity == "ssim")]
    rows = rows[(rows.condition == "salt_pepper@0.05") & (rows.label == "all") & (rows.source == "all")]
    page = (reported.folder / "report" / "index.html").read_text()
    console = Console(record=True, width=300)
    show_run(reported, console)
    terminal = console.export_text()
    with (reported.folder / "report" / "tables" / "table1-noise.csv").open() as file:
        table = list(csv.DictReader(file))
    card = {
        name: (reported.folder / "report" / "model-cards" / name / "model-card.md").read_text()
        for name in ("first-detector", "second")
    }
    assert len(rows) == 2
    for row in rows.to_dict("records"):
        cell = f"{row['mean']:.3f} ± {row['std']:.3f}"
        lines = [r for r in table if r["detector"] == row["detector"] and r["variant"] == "predicted"]
        assert lines[0]["total"] == cell
        assert cell in page
        assert cell in terminal
        assert f"{row['mean']:.3f}</strong>" in page
        assert str(round(row["mean"], 6)) in card[row["detector"]]
        tex = (reported.folder / "report" / "tables" / "table1-noise.tex").read_text()
        assert cell.replace("±", "$\\pm$") in tex
    auroc = reported.summary("performance").to_pandas()
    auroc = auroc[(auroc.run == "all") & (auroc.score == "softmax") & (auroc.condition == "clean")]
    for row in auroc[(auroc.positives == "all") & (auroc.negatives == "all")].to_dict("records"):
        assert f"{row['auroc']:.3f}</strong>" in page


def rows_of(sheet):
    """Rows as texts, by the names of the columns."""
    return [dict(zip((c.name for c in sheet.columns), (cell.text for cell in row), strict=True)) for row in sheet.rows]


def shown(*tables, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_the_table_of_differences_has_every_pair_score_and_variant(reported, material):
    summary = reported.summary("differences").to_pandas()
    summary = summary[(summary.label == "all") & (summary.source == "all")]
    lines = rows_of(differences(material.tables))
    single = summary[(summary.measure != "resilience") | (summary.condition == "all")]
    assert len(lines) == len(single)
    assert {(line["detector"], line["other detector"]) for line in lines} == {("first-detector", "second")}
    scores = list(dict.fromkeys(line["score"] for line in lines if "pearson" not in line["score"]))
    names = [f"{score.name} {'↑' if score.higher_is_better else '↓'}" for score in (AUROC, *material.tables.columns)]
    assert [score for score in scores if score in names] == names
    rows = summary[(summary.condition == "focus_salient") & (summary.similarity == "ssim")].set_index("variant")
    for variant in ("predicted", "fixed"):
        row = rows.loc[variant]
        (line,) = (x for x in lines if x["score"] == "focus, salient blurred ↓" and x["variant"] == variant)
        assert line["images"] == str(row.num_images)
        assert line["difference"] == f"{row.difference:+.3f}"
        assert line["95 % interval"] == f"[{row.ci_low:+.3f}, {row.ci_high:+.3f}]"
        assert line["above chance"] == f"{row.corrected:+.3f}"
    assert lines[0]["images"] == str(len(reported.image_table))  # AUROC
    marked = {line["score"]: line["95 % interval"].endswith("]*") for line in lines}
    assert marked == {name: name.startswith("stability") for name in marked}  # two runs are one pair
    assert "Differences between detectors" in (reported.folder / "report" / "index.html").read_text()


def test_an_auroc_over_runs_with_other_images_says_how_many(material):
    name, total = material.tables.detectors[0], len(material.run.image_table)
    table = material.tables.performance
    rows = (table.detector == name) & (table.condition == "focus_salient") & (table.positives == table.negatives)
    first, second = (model.run for model in material.run.models_of(name))
    table.loc[rows & (table.run == first), "n"] = 3
    table.loc[rows & (table.run == "all"), "n"] = 3

    def cells():
        sheet = aurocs(material.tables)
        (row,) = (row for row in sheet.rows if [cell.text for cell in row[:3]] == [name, "all", "all"])
        return {column.name: cell for column, cell in zip(sheet.columns, row, strict=True)}

    assert f"\nn = 3 to {total}, before " in cells()["salient region blurred"].below
    assert "n = " not in cells()["as they are"].below
    assert cells()["images of a run"].text == str(total)
    table.loc[rows & (table.run == second), "auroc"] = np.nan  # a run without AUROC is in no mean
    assert "\nn = 3, before " in cells()["salient region blurred"].below


def test_the_auroc_table_has_what_the_summary_has(reported, material):
    table = reported.summary("performance").to_pandas()
    table = table[(table.run == "all") & (table.score == "softmax")]
    words = {"clean": "as they are", "focus_salient": "salient region blurred", "focus_nonsalient": "rest blurred"}
    lines = {(x["detector"], x["positives"], x["negatives"]): x for x in rows_of(aurocs(material.tables))}
    table = table[table.condition.isin(list(words))]
    assert len(table) == 3 * len(lines)
    for row in table.to_dict("records"):
        line = lines[row["detector"], row["positives"], row["negatives"]]
        assert line[words[row["condition"]]] == f"{row['auroc']:.3f}"
        assert line[f"accuracy, {words[row['condition']]}"] == f"{row['accuracy']:.3f}"


def test_details_hold_every_number_of_the_summary_over_all_images(reported, material):
    rows = reported.summary().to_pandas()
    rows = rows[(rows.measure == "resilience") & (rows.label == "all") & (rows.source == "all")]
    rows = rows[rows.condition.isin(["all", "shifts", "flips", "rotations"])]
    lines = rows_of(details(material.tables, MEASURES["resilience"]))
    assert len(lines) == len(rows)
    labels = {("all", "ssim"): "resilience ↑", ("flips", "pearson"): "resilience, flips [pearson] ↑"}
    for (condition, similarity), label in labels.items():
        row = rows[(rows.condition == condition) & (rows.similarity == similarity) & (rows.variant == "fixed")].iloc[1]
        (line,) = (x for x in lines if (x["score"], x["detector"], x["variant"]) == (label, "second", "fixed"))
        assert line["mean ± std"] == f"{row['mean']:.3f} ± {row['std']:.3f}"
        assert line["95 % interval of corrected"] == f"[{row.corrected_low:.3f}, {row.corrected_high:.3f}]"
        assert (line["n"], line["kept"]) == (str(row.n), f"{100 * row.kept_share:.1f} %")
    assert {x["score"] for x in rows_of(details(material.tables, MEASURES["resilience"], groups=False))} == {
        "resilience ↑",
        "resilience [pearson] ↑",
    }
    names = [column.name for column in details(material.tables, MEASURES["entropy"]).columns]
    assert names == ["score", "detector", "variant", "mean ± std", "95 % interval", "n", "dead"]  # nothing is compared


def test_a_source_has_its_chance_level_and_share_of_dead_maps_below(reported, material):
    rows = reported.summary().to_pandas()
    rows = rows[(rows.measure == "stability") & (rows.variant == "predicted") & (rows.similarity == "ssim")]
    row = rows[(rows.source == "gan_b") & (rows.detector == "second")].iloc[0]
    sheet = by_source(material.tables, MEASURES["stability"])
    assert [(c.name, c.detail) for c in sheet.columns[3:]] == [
        ("total", "n = 26"), ("all fake", "n = 17"), ("gan_a", "n = 12"), ("gan_b", "n = 5"), ("camera", "n = 9"),
    ]  # fmt: skip
    (line,) = (x for x in sheet.rows if [c.text for c in x[:3]] == ["stability ↑", "second", "predicted"])
    assert line[6].text == f"{row['mean']:.3f}" + ("" if np.isnan(row["std"]) else f" ± {row['std']:.3f}")
    assert line[6].below == f"{row.chance:.3f}, {100 * row.dead_share:.1f} %"


SHEET = Sheet(
    "name", "data", "Title", (Column("who"), Column("sort"), Column("=first", "n = 3", "chance"), Column("second")),
    [(Cell("=a"), Cell("x", "chance"), Cell("+0.1", "0.2\n0.3"), Cell("1")), (Cell("=a"), Cell("y"), Cell("-"), Cell("2"))],
    2, "A note.",
)  # fmt: skip


def test_csv_has_second_lines_in_their_own_column_and_no_formula():
    assert list(csv.reader(io.StringIO(to_csv(SHEET)))) == [
        ["who", "sort", "'=first", "'=first: chance", "second"],
        ["'=a", "x", "+0.1", "0.2; 0.3", "1"],
        ["'=a", "y", "-", "", "2"],
    ]


def test_latex_has_first_lines_and_runs_nothing():
    assert "=a & x & +0.1 & 1 \\\\\\relax" in to_latex(SHEET)
    assert "{llrr}" in to_latex(SHEET)
    assert latex("<0.001 | >2") == "\\textless{}0.001 \\textbar{} \\textgreater{}2"
    assert latex("\\input{x}") == "\\textbackslash{}input\\{x\\}"
    assert latex("50 % ± 1 ↑") == "50 \\% $\\pm$ 1 $\\uparrow$"


def test_stacked_sheets_share_columns_and_are_empty_where_one_has_none():
    other = SHEET._replace(columns=(*SHEET.columns[:2], Column("third")), rows=[(Cell("b"), Cell("z"), Cell("3"))])
    sheet = stacked("Both", [SHEET, other, SHEET._replace(rows=[])])
    assert [column.name for column in sheet.columns] == ["who", "sort", "=first", "second", "third"]
    assert [cell.text for cell in sheet.rows[0]] == ["=a", "x", "+0.1", "1", "-"]
    assert [cell.text for cell in sheet.rows[2]] == ["b", "z", "-", "-", "3"]
    assert stacked("None", [SHEET._replace(rows=[])]) is None


def test_a_label_is_printed_once_in_a_block_of_rows():
    text = shown(*split(SHEET, 80), width=80)
    assert text.count("=a") == 1
    assert "n = 3" in text
    assert "0.2" in text
    assert "0.3" in text


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_sheet_fits_any_terminal_with_its_labels_and_all_of_its_numbers(material, width):
    for sheet in sheets(material.tables):
        if sheet.heads > 4 and width < 200:
            continue  # words only: these columns fold
        texts = [shown(table, width=width) for table in split(sheet, width)]
        assert max(len(line) for text in texts for line in text.splitlines()) <= width
        words = " ".join(texts).split()
        for row in sheet.rows:
            for cell in row[sheet.heads :]:
                assert set(cell.text.split()) <= set(words), cell
        assert all("…" not in text for text in texts)
    overview = next(sheets(material.tables))
    narrow, wide = (list(split(overview, width)) for width in (80, 300))
    assert len(narrow) > 1 == len(wide)
    assert all("first-detector" in shown(table, width=80) for table in narrow)


def test_show_waits_neither_for_torch_nor_for_matplotlib(reported):
    script = f"""
import sys
from explain2me.report.terminal import show_run
from explain2me.run.folder import open_run
from rich.console import Console
show_run(open_run({str(reported.folder)!r}), Console(width=120, highlight=False))
print("heavy:", *({{"torch", "matplotlib", "sklearn", "scipy"}} & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "Measures over all images" in output
    assert output.splitlines()[-1] == "heavy:"


@pytest.mark.slow
def test_latex_compiles_where_there_is_one(reported, tmp_path):
    import shutil

    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex here")
    table = reported.folder / "report" / "tables" / "table1-noise.tex"
    (tmp_path / "a.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}" + table.read_text() + "\\end{document}"
    )
    subprocess.run(["pdflatex", "-halt-on-error", "a.tex"], cwd=tmp_path, check=True, capture_output=True)
