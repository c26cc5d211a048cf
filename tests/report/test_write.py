"""Whole reports: every file, partial runs, hostile names, and a report made again."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from explain2me import open_run
from explain2me.config.load import override
from explain2me.errors import Explain2MeError
from explain2me.report.material import gather
from explain2me.report.write import write_report
from explain2me.stages.measure import measure_run
from explain2me.stages.summarise import summarise_run


def test_every_kind_of_file_is_there(reported):
    folder = reported.folder / "report"
    names = {path.stem for path in (folder / "figures").iterdir()}
    expected = (
        "fig2-entropy fig3-noise fig4-noise fig5-transforms fig6-runs fig7-focus fig8-samples fig9-roc fig10-radar"
    )
    expected += (
        " stability-matrix chance mean-maps scatter violin-entropy violin-noise violin-resilience violin-stability"
    )
    assert set(expected.split()) <= names
    for name in names:
        for kind, start in (("pdf", b"%PDF"), ("svg", b"<?xml"), ("png", b"\x89PNG")):
            assert (folder / "figures" / f"{name}.{kind}").read_bytes().startswith(start)
    assert (folder / "model-cards" / "second" / "model-card.md").exists()
    assert (folder / "tables" / "table1-noise.tex").exists()


@pytest.mark.usefixtures("no_pdf")
def test_a_report_made_again_leaves_nothing_of_the_one_before(tmp_path, make_run, images, weights, detector_table):
    text = f'name = "again"\n{detector_table("a", f"{weights}/seed[01].safetensors")}[data]\nmanifest = "{images}"\n'
    text += "[summary]\nbootstrap = 10\n[report]\nimages = 1\n[measures]\nnoise = false\nresilience = false\nfocus = false\n"
    run = make_run(tmp_path, text + '[compute]\ndevice = "cpu"\nbatch_size = 8\n')
    folder = run.folder / "report"
    before = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert "tables/table1-entropy.csv" in before
    (folder / "tables" / "mine.csv").write_text("not ours")
    (folder / ".written").write_text((folder / ".written").read_text() + "../run.json\n")
    config = override(run.config, ["measures.entropy=false"])
    measure_run(run, config)
    summarise_run(run, config)
    write_report(run, config)
    after = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert not [name for name in after if "entropy" in name]
    assert {"tables/mine.csv", "index.html", "figures/fig9-roc.svg"} <= after
    assert (run.folder / "run.json").exists()


OFF = {
    "one measure": ("noise", "resilience", "focus", "stability"),
    "one detector": ("noise", "focus"),
    "no labels": ("noise", "resilience", "focus"),
    "one source": ("noise", "resilience"),
    "nothing but AUROC": ("entropy", "noise", "resilience", "focus", "stability"),
}
"""Measures that say nothing of a case; fewer figures are drawn."""


@pytest.mark.usefixtures("no_pdf")
@pytest.mark.parametrize(
    ("case", "absent", "present"),
    [
        ("one measure", ["Not measured in this run: noise, resilience, focus, stability"], ["Entropy"]),
        ("one detector", ["There is one detector, so nothing is compared"], ["Resilience to transforms"]),
        ("no labels", ["The images have no labels"], ["Stability across training runs"]),
        ("one source", ["All images come from one source"], ["Focus"]),
        ("nothing but AUROC", ["Not measured in this run: entropy, noise"], ["AUROC"]),
    ],
)
def test_a_partial_run_has_a_whole_report(
    tmp_path, make_run, make_images, weights, detector_table, case, absent, present
):
    counts = {("fake", "a"): 6, ("real", "b"): 6}
    manifest = make_images(tmp_path / "images", counts={("x", "a"): 8} if case == "one source" else counts)
    if case in ("no labels", "one source"):
        lines = [line.split(",") for line in manifest.read_text().splitlines()]
        manifest.write_text(
            "\n".join(f"{path},{source if case == 'no labels' else 's'}" for path, _, source, _ in lines).replace(
                "path,s\n", "path,source\n"
            )
            + "\n"
        )
    text = f'name = "part"\n{detector_table("a", f"{weights}/seed[01].safetensors")}'
    if case != "one detector":
        text += detector_table("b", f"{weights}/seed[12].safetensors")
    text += (
        f'[data]\nmanifest = "{manifest}"\n[summary]\nbootstrap = 20\n[report]\nimages = 1\n[compute]\ndevice = "cpu"\n'
    )
    text += "[measures]\n" + "".join(f"{name} = false\n" for name in OFF[case])
    if case in ("no labels", "one source"):
        text = text.replace("[data]\n", '[data]\npositive = "1"\n')
    run = make_run(tmp_path, text)
    page = (run.folder / "report" / "index.html").read_text()
    for words in (*absent, *present):
        assert words in page, words


@pytest.mark.usefixtures("no_pdf")
def test_a_vanished_image_leaves_a_report_without_its_picture(tmp_path, make_run, make_images, weights, detector_table):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 4, ("real", "b"): 4})
    text = f'name = "gone"\n{detector_table("a", f"{weights}/seed[01].safetensors")}[data]\nmanifest = "{manifest}"\n'
    text += '[measures]\nnoise = false\nresilience = false\n[summary]\nbootstrap = 10\n[report]\nimages = 1\n[compute]\ndevice = "cpu"\n'
    run = make_run(tmp_path, text, report=False)
    for path in manifest.parent.rglob("*.png"):
        path.unlink()
    page = write_report(run, run.config)
    data = json.loads(re.search(r'id="report-data">(.*?)</script>', page.read_text(), re.S)[1])
    assert all(item["picture"] is None for item in data["shown"])


def test_without_a_summary_the_error_says_what_to_do(reported, tmp_path):
    import shutil

    shutil.copytree(reported.folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "summary")
    with pytest.raises(Explain2MeError, match="call `explain2me summarise"):
        write_report(open_run(tmp_path / "run"), reported.config)


@pytest.mark.usefixtures("no_pdf")
def test_detectors_of_two_input_sizes_and_a_source_of_two_labels(
    tmp_path, make_run, make_images, weights, detector_table
):
    manifest = make_images(tmp_path / "images", counts={("fake", "a"): 5, ("real", "a"): 5})
    text = f'name = "sizes"\n{detector_table("NAME", f"{weights}/seed[01].safetensors")}'.replace("NAME", "[small] 😀")
    text += detector_table("large", f"{weights}/seed[12].safetensors", size=128)
    text += (
        f'[data]\nmanifest = "{manifest}"\n[summary]\nbootstrap = 10\n[report]\nimages = 1\n[compute]\ndevice = "cpu"\n'
        "[measures]\nnoise = false\nfocus = false\n"
    )
    run = make_run(tmp_path, text)
    folder = run.folder / "report"
    with (folder / "tables" / "table2-transforms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["shift_DR"] for row in rows}.isdisjoint({"-"})
    with (folder / "tables" / "table1-entropy.csv").open() as file:
        assert {"fake a", "real a"} <= set(next(csv.reader(file)))
    tex = (folder / "tables" / "table2-transforms.tex").read_text()
    assert "\\\\relax\n[small]" in tex
    differences = run.summary("differences").to_pandas()
    assert {"shift_DR@7"} == set(differences.condition[differences.condition.str.startswith("shift_DR")])
    assert differences[differences.condition == "shift_DR@7"].ci_low.notna().any()
    assert set(differences.label[differences.source == "a"]) == {"fake", "real"}
    card = (folder / "model-cards" / "[small] 😀" / "model-card.md").read_text()
    assert "😀" in card.split("---")[1]
    sentences = card.split("## What to know")[1].split("## Data")[0].splitlines()
    others = [text for text in sentences if "large" in text.replace("A larger input", "")]
    assert all("better than large" in text or "large is better" in text or "and large" in text for text in others)


def test_hostile_names_are_text_everywhere(hostile):
    folder = hostile.folder / "report"
    page = (folder / "index.html").read_text()
    assert "<img src=x" not in page
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    assert "&lt;img src=x onerror=evil()&gt;" in page
    for path in (folder / "tables").glob("*.csv"):
        with path.open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row if cell.startswith(("=", "+", "-", "@"))]
        assert [
            cell for cell in cells if not re.fullmatch(r"-|([+-]\d+\.\d{3}( ± \d+\.\d{3})?|-)(, \d+\.\d %)?", cell)
        ] == []
    for path in (folder / "tables").glob("*.tex"):
        assert "a$b$" not in path.read_text()
    card = next((folder / "model-cards").glob("*/model-card.md")).read_text()
    body = card.split("---", 2)[2]
    assert "<img" not in body
    head = card.split("---")[1]
    for line in head.strip().splitlines():
        json.loads(line.partition(": ")[2])  # YAML that is JSON: nothing can break out of it


def test_torch_is_left_alone(reported):
    state = torch.get_rng_state()
    gather(reported, images_per_measure=1)
    assert torch.equal(state, torch.get_rng_state())
    assert Path(reported.folder / "report" / "index.html").stat().st_size < 5_000_000
